"""Files to raw rows. A row comes with the line it stands on, or with the reason why it is none.

Nothing is known here of what a row means: that is `shapes`' part.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina.data.messages import RowError
from lamina.errors import DataError

__all__ = ["RawRow", "read_rows"]


@dataclass(slots=True)
class RawRow:
    """A row of a file.

    Args:
        line: the line it stands on, from 1.
        value: its fields, or the reason why it can't be read.
    """

    line: int
    value: dict[str, Any] | RowError


def read_rows(path: Path) -> Iterator[RawRow]:
    """The rows of a JSON-lines file. Empty lines are passed over; a byte order mark is dropped.

    Raises:
        DataError: the file is missing, is a folder, or can't be read.
    """
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                content = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if not content.isspace() and content:
                    yield RawRow(number, _parse_line(content))
    except OSError as error:
        raise DataError(
            f"{path} can't be read: {error.strerror or error}.",
            hint="Give the path of a file in JSON lines (one JSON object a line).",
        ) from error


def _parse_line(line: bytes) -> dict[str, Any] | RowError:
    try:
        value = json.loads(line)
    except UnicodeDecodeError as error:
        return RowError("encoding", f"is not UTF-8 (byte {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        return RowError("not-json", f"is not JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return RowError("not-json", "is not usable JSON: it is nested too deeply")
    if not isinstance(value, dict):
        return RowError("not-object", f"is a JSON {json_type(value)}, not an object")
    return value


def json_type(value: object) -> str:
    """What JSON calls this value's type, for messages."""
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")
