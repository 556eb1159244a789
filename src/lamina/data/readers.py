"""The bytes of text files to raw rows: JSON, tables, plain text."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

from lamina.data.jsonio import JsonParser, array_items, json_type
from lamina.data.messages import RowError
from lamina.errors import DataError

__all__ = ["RawRow", "TextRows", "parse_lines", "read_json", "read_table", "read_text"]

TextRows = Literal["document", "paragraph", "line"]

#: Columns that hold lists in one row: an object that has such a list is a row, and not columns.
_LIST_COLUMNS = ("messages", "conversations", "input_ids", "labels", "chosen", "rejected", "prompt")


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


def read_json(file: BinaryIO) -> Iterator[RawRow]:
    """The rows of an array, which is read as it comes; of an object of columns; or one object, a
    row."""
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


def read_table(file: BinaryIO, delimiter: str, path: Path) -> Iterator[RawRow]:
    """The rows of a table whose first line names its columns.

    Args:
        delimiter: what stands between cells. Where it is a comma and the first line has none, it
            may also be a semicolon, as spreadsheets write it in half of the world, or a tab.
        path: the file, for messages.

    Raises:
        DataError: the header can't be used.
    """
    # The library's default of 128 KiB a cell is less than a long conversation.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
    line = 1
    try:
        first = text.readline()
        if delimiter == "," and not {*',"'} & {*first}:
            delimiter = next((mark for mark in ";\t" if mark in first), delimiter)
        reader = csv.reader(chain([first], text), delimiter=delimiter, strict=True)
        header = next(reader, None)
        if header is None:
            return
        if _is_broken("".join(header)):
            raise DataError(f"{path} is not UTF-8 in its header.", hint="Save it as UTF-8.")
        if not all(header) or len({*header}) != len(header):
            raise DataError(
                f"{path} has no usable header: its first line must name every column, "
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


def read_text(file: BinaryIO, text_rows: TextRows) -> Iterator[RawRow]:
    """The rows of plain text; empty lines are passed over."""
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
