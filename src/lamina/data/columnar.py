"""Datasets in Arrow's formats: Parquet, Arrow and Feather files, saved datasets, the hub.

pyarrow, which also brings zstd, and `datasets` are only needed for these.
"""

from __future__ import annotations

import importlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from lamina.data.messages import RowError
from lamina.errors import DataError

__all__ = [
    "HubName",
    "hub_name",
    "is_saved_dataset",
    "open_zstd",
    "pyarrow",
    "read_columnar",
    "read_hub",
]

_BATCH = 512


@dataclass(frozen=True)
class HubName:
    """A dataset on the hub: `owner/name`, `owner/name:config`, each with `@split` if need be."""

    name: str
    config: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        config = f":{self.config}" if self.config else ""
        return self.name + config + (f"@{self.split}" if self.split else "")


def hub_name(text: str) -> HubName | None:
    """The hub dataset that a text names, or None if it doesn't look like one."""
    pattern = r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?::([\w.-]+))?(?:@([\w.\[\]:%-]+))?"
    match = re.fullmatch(pattern, text)
    suffix = Path(match[1]).suffix if match else ""
    if match is None or suffix in (".jsonl", ".json", ".csv", ".parquet", ".txt", ".gz", ".zst"):
        return None
    return HubName(match[1], match[2], match[3])


def pyarrow(path: Path | str) -> Any:
    """The pyarrow module.

    Raises:
        DataError: it isn't installed.
    """
    try:
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise DataError(
            f"{path} needs the package pyarrow, which is not installed.",
            hint="pip install 'lamina[data]'",
        ) from error


def open_zstd(raw: BinaryIO, path: Path) -> BinaryIO:
    """A zstd file, decompressed."""
    arrow = pyarrow(path)
    stream = arrow.CompressedInputStream(arrow.PythonFile(raw, mode="r"), "zstd")
    return cast(BinaryIO, io.BufferedReader(stream))


def is_saved_dataset(path: Path) -> bool:
    """Whether a folder was written by `datasets`' `save_to_disk`."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def read_columnar(path: Path, container: str, name: str) -> Iterator[dict[str, Any] | RowError]:
    """The rows of a Parquet or Arrow file, or of a saved dataset.

    Args:
        name: what the user calls it.

    Raises:
        DataError: it is damaged, or needs a choice of split.
    """
    arrow = pyarrow(name)
    try:
        if container == "parquet":
            parquet = importlib.import_module("pyarrow.parquet")
            with parquet.ParquetFile(path) as file:
                yield from _rows(file.iter_batches(batch_size=_BATCH), arrow)
        elif container == "arrow":
            yield from _rows(_arrow_batches(arrow, path), arrow)
        else:
            for part in _saved_files(path):
                yield from _rows(_arrow_batches(arrow, part), arrow)
    except arrow.ArrowException as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise DataError(f"{name} is damaged or not what it looks like: {reason}.") from error


def _arrow_batches(arrow: Any, path: Path) -> Iterator[Any]:
    """Record batches of an Arrow file, in the file format or the stream format."""
    with arrow.memory_map(str(path)) as source:
        try:
            reader = arrow.ipc.open_file(source)
        except arrow.ArrowInvalid:
            source.seek(0)
            yield from arrow.ipc.open_stream(source)
            return
        for index in range(reader.num_record_batches):
            yield reader.get_batch(index)


def _saved_files(path: Path) -> list[Path]:
    """The Arrow files of a dataset that `save_to_disk` wrote."""
    try:
        if (path / "dataset_dict.json").is_file():
            splits = json.loads((path / "dataset_dict.json").read_bytes())["splits"]
            raise DataError(
                f"{path} holds several splits: {', '.join(splits)}.",
                hint=f"Name one of them, for instance {path / splits[0]}.",
            )
        state = json.loads((path / "state.json").read_bytes())
        return [path / file["filename"] for file in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DataError(f"{path} is not a dataset saved with save_to_disk: {error}.") from error


def read_hub(name: HubName) -> Iterator[dict[str, Any] | RowError]:
    """The rows of a dataset on the hub, as they arrive.

    Raises:
        DataError: `datasets` isn't installed, or the dataset can't be had.
    """
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise DataError(
            f"{name} is not a file; reading it from the hub needs the package datasets.",
            hint="pip install 'lamina[data]', or check the spelling of the path.",
        ) from error
    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name.name, name.config, split=name.split, streaming=True)
        if isinstance(loaded, dict):
            if len(loaded) > 1 and "train" not in loaded:
                raise DataError(
                    f"{name} has the splits {', '.join(loaded)}.",
                    hint=f"Name one: {name}@{next(iter(loaded))}.",
                )
            loaded = loaded.get("train") or next(iter(loaded.values()))
        for row in loaded:
            yield _pruned(row)
    except DataError:
        raise
    except Exception as error:  # network, authorization, format: whatever stops it
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise DataError(
            f"The dataset {name} can't be read from the hub: {reason}.",
            hint="Check its name and the network, or download it and name its files.",
        ) from error


def _rows(batches: Iterator[Any], arrow: Any) -> Iterator[dict[str, Any] | RowError]:
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH):
            part = batch.slice(start, _BATCH)
            try:
                yield from _values(part)
            except (arrow.ArrowInvalid, ValueError, OverflowError):
                for index in range(part.num_rows):
                    yield _one_row(part.slice(index, 1), arrow)


def _values(part: Any) -> list[dict[str, Any]]:
    # Damaged offsets would be followed out of the memory: they have to be looked at first.
    part.validate(full=True)
    return [_pruned(row) for row in part.to_pylist()]


def _one_row(part: Any, arrow: Any) -> dict[str, Any] | RowError:
    try:
        return _values(part)[0]
    except (arrow.ArrowInvalid, ValueError, OverflowError) as error:
        if "utf8" in str(error).lower() or isinstance(error, UnicodeDecodeError):
            return RowError("encoding", "is not UTF-8")
        if isinstance(error, arrow.ArrowInvalid):
            raise
        return RowError("wrong-type", f"has a value that can't be read: {error}")


def _pruned(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the nulls inside its columns: Arrow gives every object of a column the same
    keys, so an absent key comes back as null."""
    return {
        key: _prune(value) if isinstance(value, list | dict) else value
        for key, value in row.items()
    }


def _prune(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _prune(v) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_prune(item) for item in value]
    return value
