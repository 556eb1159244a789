"""Rows to files. A file appears under its name only when it is whole, and never over an input."""

from __future__ import annotations

import csv
import gzip
import importlib
import io
import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, BinaryIO, ClassVar, cast

from lamina.data.columnar import pyarrow
from lamina.data.containers import SUFFIXES, Compression, Container, Source
from lamina.data.jsonio import dump_line
from lamina.data.messages import RowError
from lamina.errors import DataError

__all__ = ["LinesWriter", "RowWriter", "check_output", "new_file", "open_writer", "rejected_path"]

#: Columns whose value in a table is text that is not JSON, so that a list would not be read back.
_TEXT_CELLS = frozenset({"prompt", "completion", "chosen", "rejected", "input", "output"})


class RowWriter(ABC):
    """Writes rows to one file."""

    container: ClassVar[Container]

    def __init__(self, file: BinaryIO):
        self._file = file

    @abstractmethod
    def write(self, row: dict[str, Any]) -> None:
        """
        Raises:
            RowError: the container can't carry the row.
        """

    def finish(self) -> None:
        """Write what stands at the end."""
        self._file.flush()


class LinesWriter(RowWriter):
    """JSON lines."""

    container = "jsonl"

    def write(self, row: dict[str, Any]) -> None:
        self._file.write(dump_line(row))

    def write_lines(self, lines: bytes) -> None:
        """Write rows that are lines already."""
        self._file.write(lines)


class _JsonArray(RowWriter):
    container = "json"
    _between = b"[\n"

    def write(self, row: dict[str, Any]) -> None:
        line = dump_line(row)
        self._file.write(self._between + line[:-1])
        self._between = b",\n"

    def finish(self) -> None:
        self._file.write(b"[]\n" if self._between == b"[\n" else b"\n]\n")


class _Csv(RowWriter):
    """A table. Its columns are those of the first row: a row with others is refused."""

    container: ClassVar[Container] = "csv"
    _delimiter = ","

    def __init__(self, file: BinaryIO):
        super().__init__(file)
        self._text = io.TextIOWrapper(file, encoding="utf-8", newline="", write_through=True)
        self._csv = csv.writer(self._text, delimiter=self._delimiter, lineterminator="\n")
        self._header: list[str] | None = None

    def write(self, row: dict[str, Any]) -> None:
        header = self._header or list(row)
        if new := [key for key in row if key not in header]:
            raise RowError(
                "cannot-carry", f"has the column {new[0]!r}, which the first row of the table lacks"
            )
        cells = [_cell(key, row.get(key)) for key in header]
        if self._header is None:
            self._csv.writerow([_cell("", key) for key in header])
            self._header = header
        self._csv.writerow(cells)

    def finish(self) -> None:
        self._text.flush()
        self._text.detach()


class _Tsv(_Csv):
    container = "tsv"
    _delimiter = "\t"


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        text = value
    elif isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, list | dict):
        if key in _TEXT_CELLS:
            raise RowError("cannot-carry", f"has messages in {key!r}, which a table can't hold")
        text = dump_line({"": value})[5:-2].decode()
    else:
        text = str(value)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RowError("encoding", "has half of a surrogate pair") from None
    return text


class _Text(RowWriter):
    """One document a line."""

    container = "text"

    def write(self, row: dict[str, Any]) -> None:
        text = row.get("text")
        if not isinstance(text, str) or len(row) > 1:
            raise RowError("cannot-carry", "is more than a text, which is all that this file holds")
        if "\n" in text or "\r" in text:
            raise RowError("cannot-carry", "has a line break, and the file has one text a line")
        try:
            self._file.write(text.encode() + b"\n")
        except UnicodeEncodeError:
            raise RowError("encoding", "has half of a surrogate pair") from None


class _Columnar(RowWriter):
    """Parquet or Arrow. The columns' types are only known after the last row, so rows wait in a
    temporary file. Objects without fixed keys, such as tools, are kept as JSON text."""

    _BATCH = 4096

    def __init__(self, file: BinaryIO, path: Path):
        super().__init__(file)
        self._arrow = pyarrow(path)
        self._path = path
        # Beside the output, where there is room for it.
        self._waiting = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115
        self._schema: Any = None
        self._batch: list[dict[str, Any]] = []

    def write(self, row: dict[str, Any]) -> None:
        line = dump_line({key: _columnar(key, value) for key, value in row.items()})
        self._waiting.write(line)
        self._batch.append(json.loads(line))
        if len(self._batch) == self._BATCH:
            self._learn_types()

    def _learn_types(self) -> None:
        arrow = self._arrow
        try:
            schema = _table_of(arrow, self._batch).schema
            if self._schema is not None:
                schema = arrow.unify_schemas([self._schema, schema], promote_options="permissive")
        except arrow.ArrowException as error:
            reason = str(error).splitlines()[0].rstrip(".")
            raise DataError(
                f"{self._path} can't hold these rows: a column has values of several types "
                f"({reason}).",
                hint="Write JSON lines instead, which can.",
            ) from error
        self._schema = schema
        self._batch = []

    def finish(self) -> None:
        try:
            self._learn_types()
            self._waiting.seek(0)
            batches = (
                self._arrow.Table.from_pylist(rows, schema=self._schema)
                for rows in _batched(self._waiting, self._BATCH)
            )
            self._write_all(batches)
        finally:
            self.discard()

    def discard(self) -> None:
        # Closing writes what is still held back, which a full disk can't take.
        with suppress(OSError):
            self._waiting.close()

    @abstractmethod
    def _write_all(self, tables: Iterable[Any]) -> None: ...


class _Parquet(_Columnar):
    container = "parquet"

    def _write_all(self, tables: Iterable[Any]) -> None:
        parquet = importlib.import_module("pyarrow.parquet")
        with parquet.ParquetWriter(self._file, self._schema, compression="zstd") as writer:
            for table in tables:
                writer.write_table(table)


class _Arrow(_Columnar):
    container = "arrow"

    def _write_all(self, tables: Iterable[Any]) -> None:
        with self._arrow.ipc.new_stream(self._file, self._schema) as writer:
            for table in tables:
                writer.write_table(table)


def _columnar(key: str, value: Any) -> Any:
    if isinstance(value, dict) or (isinstance(value, list) and key in ("tools", "history")):
        return dump_line({"": value})[5:-2].decode()
    return value


def _table_of(arrow: Any, rows: list[dict[str, Any]]) -> Any:
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(row)
    return arrow.table({name: [row.get(name) for row in rows] for name in names})


def _batched(lines: Iterable[bytes], size: int) -> Iterator[list[dict[str, Any]]]:
    batch: list[dict[str, Any]] = []
    for line in lines:
        batch.append(json.loads(line))
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


_WRITERS: dict[Container, type[RowWriter]] = {
    writer.container: writer for writer in (LinesWriter, _JsonArray, _Csv, _Tsv, _Text)
}
_COLUMNAR: dict[Container, type[_Columnar]] = {"parquet": _Parquet, "arrow": _Arrow}


def rejected_path(output: Path) -> Path:
    """Where the rows go that an output can't take."""
    return output.with_name(output.name + ".rejected.jsonl")


def check_output(output: Path, inputs: Iterable[Source], *, force: bool = False) -> None:
    """
    Raises:
        DataError: the output is an input, or exists and `force` isn't given, or its folder is
            missing.
    """
    if output.is_dir():
        raise DataError(f"{output} is a folder.", hint="Name a file to write.")
    if not output.parent.is_dir():
        raise DataError(f"{output} can't be written: the folder {output.parent} does not exist.")
    if not output.exists():
        return
    if any(source.hub is None and _same_file(output, source.path) for source in inputs):
        raise DataError(
            f"{output} is one of the inputs, which are never written over.",
            hint="Give --out another name.",
        )
    if not force:
        raise DataError(f"{output} exists.", hint="Give --out another name, or --force.")


def _same_file(one: Path, other: Path) -> bool:
    return other.exists() and os.path.samefile(one, other)


@contextmanager
def new_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes its name when the block ends well, and else leaves nothing behind.

    Raises:
        DataError: it can't be written.
    """
    partial: Path | None = None
    try:
        with _fresh(path.with_name(path.name + ".partial")) as file:
            partial = Path(file.name)
            yield file
        partial.replace(path)
    except OSError as error:
        raise DataError(f"{path} can't be written: {error.strerror or error}.") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def _fresh(path: Path) -> BinaryIO:
    """A file of that name or, if there is one already (it could be an input), of one like it."""
    number = 0
    while True:
        with suppress(FileExistsError):
            return path.with_name(f"{path.name}{number or ''}").open("xb")
        number += 1


@contextmanager
def open_writer(path: Path) -> Iterator[RowWriter]:
    """A writer for a file, whose name tells its container and compression.

    Raises:
        DataError: the name tells no container that can be written.
    """
    container, compression = _output_kind(path)
    with new_file(path) as raw, _compressed(raw, compression, path) as file:
        if container in _COLUMNAR:
            columnar = _COLUMNAR[container](file, path)
            try:
                yield columnar
                columnar.finish()
            finally:
                columnar.discard()
        else:
            writer = _WRITERS[container](file)
            yield writer
            writer.finish()


def _output_kind(path: Path) -> tuple[Container, Compression]:
    name = path.name.lower()
    compression: Compression = "none"
    for suffix, kind in ((".gz", "gzip"), (".zst", "zstd"), (".zstd", "zstd")):
        if name.endswith(suffix):
            name, compression = name.removesuffix(suffix), cast(Compression, kind)
    container = SUFFIXES.get(Path(name).suffix)
    if container is None:
        known = ", ".join(SUFFIXES)
        raise DataError(
            f"The name {path.name} doesn't tell what to write.",
            hint=f"End it with one of {known}, and .gz or .zst if it is to be compressed.",
        )
    if compression != "none" and container in _COLUMNAR:
        raise DataError(f"{path.name}: {container} files are compressed inside; leave out the end.")
    return container, compression


@contextmanager
def _compressed(raw: IO[bytes], compression: Compression, path: Path) -> Iterator[BinaryIO]:
    if compression == "gzip":
        # No time and no name inside: the same rows give the same bytes.
        with gzip.GzipFile("", "wb", fileobj=raw, mtime=0, compresslevel=6) as zipped:
            buffered = io.BufferedWriter(cast(io.RawIOBase, zipped))
            yield cast(BinaryIO, buffered)
            buffered.flush()
            buffered.detach()
    elif compression == "zstd":
        arrow = pyarrow(path)
        sink = arrow.PythonFile(raw, mode="w")
        with arrow.CompressedOutputStream(sink, "zstd") as stream:
            yield cast(BinaryIO, stream)
    else:
        yield cast(BinaryIO, raw)
