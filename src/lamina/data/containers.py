"""Files to raw rows. A row comes with the line it stands on, or with the reason why it is none.

Nothing is known here of what a row means: that is the part of `shapes`. Compression and container
are told by a file's first bytes, and by its name only where these leave a choice.
"""

from __future__ import annotations

import glob
import gzip
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from lamina.data import columnar
from lamina.data.jsonio import loads
from lamina.data.messages import RowError
from lamina.data.readers import RawRow, TextRows, parse_lines, read_json, read_table, read_text
from lamina.errors import DataError

__all__ = [
    "SUFFIXES",
    "Compression",
    "Container",
    "Source",
    "find_sources",
    "open_bytes",
    "read_source",
    "reading",
]

Container = Literal[
    "jsonl", "json", "csv", "tsv", "parquet", "arrow", "text", "saved-dataset", "hub"
]
Compression = Literal["none", "gzip", "zstd"]

#: What a file begins with.
_MAGIC: dict[bytes, Container] = {
    b"PAR1": "parquet",
    b"ARROW1": "arrow",
    b"\xff\xff\xff\xff": "arrow",
}

SUFFIXES: dict[str, Container] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".jsonlines": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "text",
    ".md": "text",
    ".text": "text",
}


@dataclass(frozen=True)
class Source:
    """A place that rows are read from.

    Args:
        path: the file or folder; for a dataset on the hub, its name.
        bom: whether the file starts with a byte order mark.
    """

    path: Path
    container: Container
    compression: Compression = "none"
    bom: bool = False
    hub: columnar.HubName | None = None

    @property
    def name(self) -> str:
        return str(self.hub) if self.hub else str(self.path)


def find_sources(paths: Path | str | Iterable[Path | str]) -> list[Source]:
    """What the given paths, glob patterns and names of hub datasets stand for, in order.

    Raises:
        DataError: names every path that stands for nothing readable.
    """
    given = [paths] if isinstance(paths, Path | str) else list(paths)
    if not given:
        raise DataError("No data was given.", hint="Name a data file, for instance data.jsonl.")
    sources: list[Source] = []
    wrong: list[str] = []
    for path in given:
        try:
            sources += _sources_of(path)
        except DataError as error:
            wrong.append(error.message)
        except OSError as error:
            wrong.append(f"{path} can't be read: {error.strerror or error}.")
    if wrong:
        raise DataError(
            "The data can't be read.", problems=wrong, hint="Check the spelling of the paths."
        )
    return sources


def _sources_of(given: Path | str) -> list[Source]:
    path = Path(given)
    if path.is_dir():
        if columnar.is_saved_dataset(path):
            return [Source(path, "saved-dataset")]
        raise DataError(
            f"{path} is a folder, but not one that a dataset was saved in: name its files."
        )
    if path.exists():
        if not path.is_file():
            # A pipe would silently lose what was read to tell its container.
            raise DataError(
                f"{path} is not an ordinary file, and data is read more than once: save it first."
            )
        return [_examine(path)]
    if any(char in str(given) for char in "*?["):
        matches = sorted(p for p in glob.glob(str(given), recursive=True) if Path(p).is_file())
        if not matches:
            raise DataError(f"{given} matches no file.")
        return [_examine(Path(match)) for match in matches]
    hub = columnar.hub_name(str(given)) if isinstance(given, str) else None
    if hub is None:
        raise DataError(f"{given} does not exist.")
    return [Source(path, "hub", hub=hub)]


def _examine(path: Path) -> Source:
    """Tell a file's compression and container by its first bytes."""
    with path.open("rb") as file:
        magic = file.read(8)
    compression: Compression = "none"
    if magic.startswith(b"\x1f\x8b"):
        compression = "gzip"
    elif magic.startswith(b"\x28\xb5\x2f\xfd"):
        compression = "zstd"
    names = path.name.lower().removesuffix(".gz").removesuffix(".zst").removesuffix(".zstd")
    named = SUFFIXES.get(Path(names).suffix)
    try:
        with open_bytes(Source(path, "text", compression)) as file:
            head = file.read(1 << 16)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} can't be decompressed: {error}.") from error
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path} is UTF-16: save it as UTF-8.")
    bom = head.startswith(b"\xef\xbb\xbf")
    return Source(path, _container(head.removeprefix(b"\xef\xbb\xbf"), named), compression, bom)


def _container(head: bytes, named: Container | None) -> Container:
    for magic, container in _MAGIC.items():
        if head.startswith(magic):
            return container
    start = head.lstrip()
    first = start.partition(b"\n")[0]
    # What a line of JSON can't be.
    opens_array = named == "jsonl" and first.strip() == b"["
    if named in ("csv", "tsv", "text", "jsonl", "parquet", "arrow") and not opens_array:
        return named
    if start.startswith(b"["):
        return "json"
    if start.startswith(b"{"):
        return _object_or_lines(start, first, named)
    return named or "text"


def _object_or_lines(start: bytes, first: bytes, named: Container | None) -> Container:
    """What begins with an opening brace.

    Args:
        first: its first line, as far as it is known.
    """
    try:
        loads(first)
    except ValueError:
        # One object over several lines, unless its first line is just very long.
        return "json" if b"\n" in start else named or "jsonl"
    alone = named == "json" and not start[len(first) :].strip()
    return "json" if alone else "jsonl"


@contextmanager
def open_bytes(source: Source) -> Iterator[BinaryIO]:
    """The bytes of a file, decompressed."""
    with source.path.open("rb") as raw:
        if source.compression == "gzip":
            with gzip.open(raw, "rb") as unzipped:
                yield cast(BinaryIO, unzipped)
        elif source.compression == "zstd":
            yield columnar.open_zstd(raw, source.path)
        else:
            yield raw


@contextmanager
def _decompressed(source: Source) -> Iterator[Path]:
    """A file or folder to read from anywhere in it, which a compressed one can't be."""
    if source.compression == "none":
        yield source.path
        return
    with tempfile.NamedTemporaryFile() as plain, open_bytes(source) as file:
        shutil.copyfileobj(file, plain)
        plain.flush()
        yield Path(plain.name)


@contextmanager
def reading(source: Source) -> Iterator[None]:
    """Turns what can go wrong while a source is read into a `DataError`."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = str(getattr(error, "strerror", None) or error).rstrip(".")
        raise DataError(f"{source.name} can't be read: {reason}.") from error


def read_source(source: Source, *, text_rows: TextRows = "document") -> Iterator[RawRow]:
    """The rows of one source, in order.

    Args:
        text_rows: what a row of a plain text file is.

    Raises:
        DataError: it can't be read at all, or not to its end.
    """
    with reading(source):
        match source.container:
            case "parquet" | "arrow" | "saved-dataset":
                with _decompressed(source) as path:
                    rows = columnar.read_columnar(path, source.container, source.name)
                    yield from _numbered(rows)
            case "hub":
                assert source.hub is not None
                yield from _numbered(columnar.read_hub(source.hub))
            case _:
                with open_bytes(source) as file:
                    if source.bom:
                        file.read(3)
                    yield from _text_reader(source, file, text_rows)


def _numbered(rows: Iterable[dict[str, Any] | RowError]) -> Iterator[RawRow]:
    return (RawRow(number, row) for number, row in enumerate(rows, 1))


def _text_reader(source: Source, file: BinaryIO, text_rows: TextRows) -> Iterator[RawRow]:
    match source.container:
        case "jsonl":
            yield from parse_lines(file)
        case "json":
            yield from read_json(file)
        case "csv" | "tsv":
            yield from read_table(file, "\t" if source.container == "tsv" else ",", source.path)
        case _:
            yield from read_text(file, text_rows)
