"""Files to raw rows. A row comes with the line it stands on, or with the reason why it is none.

Nothing is known here of what a row means: that is the part of `shapes`. Compression and container
are told by a file's first bytes, and by its name only where these leave a choice.
"""

from __future__ import annotations

import csv
import glob
import gzip
import io
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from lamina.data import columnar
from lamina.data.jsonio import JsonParser, array_items, json_type, loads
from lamina.data.messages import RowError
from lamina.errors import DataError

__all__ = [
    "SUFFIXES",
    "Compression",
    "Container",
    "RawRow",
    "Source",
    "TextRows",
    "find_sources",
    "open_bytes",
    "parse_lines",
    "read_source",
    "reading",
]

Container = Literal[
    "jsonl", "json", "csv", "tsv", "parquet", "arrow", "text", "saved-dataset", "hub"
]
Compression = Literal["none", "gzip", "zstd"]
TextRows = Literal["document", "paragraph", "line"]

#: Columns that hold lists in one row: an object that has such a list is a row, and not columns.
_LIST_COLUMNS = ("messages", "conversations", "input_ids", "labels", "chosen", "rejected", "prompt")

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


@dataclass(slots=True)
class RawRow:
    """A row of a file.

    Args:
        line: the line it begins on, from 1; in a columnar file, the number of the row.
        value: its fields, or the reason why it can't be read.
        notes: codes of what is odd about it without making it unusable.
        raw: the bytes of a line that can't be read.
    """

    line: int
    value: dict[str, Any] | RowError
    notes: tuple[str, ...] = ()
    raw: bytes = b""


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
    if head.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
        return "parquet" if head.startswith(b"PAR1") else "arrow"
    if named in ("csv", "tsv", "text", "jsonl", "parquet", "arrow"):
        return named
    start = head.lstrip()
    if start.startswith(b"["):
        return "json"
    if start.startswith(b"{"):
        first = start.partition(b"\n")[0]
        try:
            loads(first)
        except ValueError:
            # One object over several lines, unless its first line is just very long.
            return "json" if b"\n" in start else named or "jsonl"
        alone = named == "json" and not start[len(first) :].strip()
        return "json" if alone else "jsonl"
    return named or "text"


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
                yield from _numbered(columnar.read_columnar(source.path, source.container))
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
            yield from _read_json(file)
        case "csv" | "tsv":
            yield from _read_csv(source, file)
        case _:
            yield from _read_text(file, text_rows)


# -- JSON -----------------------------------------------------------------------------------------


def parse_lines(lines: Iterable[bytes], first: int = 1) -> Iterator[RawRow]:
    """The rows in lines of JSON; empty lines are passed over.

    Args:
        first: the number of the first line.
    """
    parser = JsonParser()
    for number, line in enumerate(lines, first):
        if line.isspace():
            continue
        try:
            value = parser.line(line)
        except RowError as error:
            yield RawRow(number, error, raw=line)
            continue
        if isinstance(value, dict):
            yield RawRow(number, value, () if parser.constant is None else ("nan",))
        else:
            yield RawRow(number, _not_an_object(value), raw=line)


def _not_an_object(value: object) -> RowError:
    return RowError("not-object", f"is {json_type(value)}, not an object")


def _read_json(file: BinaryIO) -> Iterator[RawRow]:
    start = file.read(1)
    while start.isspace():
        start = file.read(1)
    parser = JsonParser()
    if start == b"[":
        chained = io.BufferedReader(cast(io.RawIOBase, _Chained(start, file)))
        for line, item in array_items(chained, parser):
            value = item if isinstance(item, dict | RowError) else _not_an_object(item)
            yield RawRow(line, value, () if parser.constant is None else ("nan",))
        return
    try:
        value = parser.line(start + file.read())
    except RowError as error:
        yield RawRow(1, error)
        return
    if not isinstance(value, dict):
        yield RawRow(1, _not_an_object(value))
        return
    notes = () if parser.constant is None else ("nan",)
    for number, row in enumerate(_rows_of_object(value), 1):
        yield RawRow(number, row, notes)


def _rows_of_object(value: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of an object of columns; or the object itself, if it is a row."""
    columns = list(value.values())
    one_row = (
        not columns
        or not all(isinstance(c, list) and len(c) == len(columns[0]) for c in columns)
        or any(value.get(k) and not isinstance(value[k][0], list | str) for k in _LIST_COLUMNS)
    )
    if one_row:
        yield value
    else:
        for cells in zip(*columns, strict=True):
            yield dict(zip(value, cells, strict=True))


class _Chained(io.RawIOBase):
    """A few bytes, and then a file."""

    def __init__(self, start: bytes, file: BinaryIO):
        self._start = start
        self._file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._start or self._file.read(len(buffer))
        self._start = b""
        buffer[: len(data)] = data
        return len(data)


# -- tables and text ------------------------------------------------------------------------------


def _read_csv(source: Source, file: BinaryIO) -> Iterator[RawRow]:
    # The library's default of 128 KiB a cell is less than a long conversation.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    delimiter = "\t" if source.container == "tsv" else ","
    reader = csv.reader(text, delimiter=delimiter, strict=True)
    line = 1
    try:
        header = next(reader, None)
        if header is None:
            return
        if _is_broken("".join(header)):
            raise DataError(f"{source.path} is not UTF-8 in its header.", hint="Save it as UTF-8.")
        if not all(header) or len({*header}) != len(header):
            raise DataError(
                f"{source.path} has no usable header: its first line must name every column, "
                f"each once (it has {', '.join(map(repr, header[:8]))})."
            )
        while True:
            line = reader.line_num + 1
            cells = next(reader, None)
            if cells is None:
                break
            if cells:
                yield RawRow(line, _csv_row(header, cells))
    except csv.Error as error:
        yield RawRow(line, RowError("not-csv", f"can't be read from here on: {error}"))
    finally:
        text.detach()


def _csv_row(header: list[str], cells: list[str]) -> dict[str, Any] | RowError:
    if len(cells) != len(header):
        return RowError(
            "csv-columns", f"has {len(cells)} cells, but the header has {len(header)} columns"
        )
    row: dict[str, Any] = dict(zip(header, cells, strict=True))
    for key, cell in row.items():
        if _is_broken(cell):
            return RowError("encoding", f"is not UTF-8 in the column {key!r}")
    return row


def _is_broken(text: str) -> bool:
    """Whether bytes that aren't UTF-8 were read into a text."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _read_text(file: BinaryIO, text_rows: TextRows) -> Iterator[RawRow]:
    if text_rows == "document":
        yield _text_row(1, file.read())
        return
    lines: list[bytes] = []
    begin = 1
    number = 0
    for number, line in enumerate(file, 1):
        if text_rows == "line":
            if not line.isspace():
                yield _text_row(number, line)
        elif line.isspace():
            if lines:
                yield _text_row(begin, b"".join(lines))
            lines = []
        else:
            begin = begin if lines else number
            lines.append(line)
    if lines:
        yield _text_row(begin, b"".join(lines))


def _text_row(line: int, raw: bytes) -> RawRow:
    try:
        return RawRow(line, {"text": raw.decode().rstrip("\r\n")})
    except UnicodeDecodeError as error:
        return RawRow(line, RowError("encoding", f"is not UTF-8 (byte {error.start + 1})"))
