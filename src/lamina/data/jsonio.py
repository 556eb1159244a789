"""JSON as datasets have it: read with the mistakes that a plain parser passes over."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, BinaryIO

from lamina.data.messages import RowError

__all__ = ["JsonParser", "array_items", "dump_line", "json_type", "loads"]

#: Characters of an array's text that are read at once.
_CHUNK = 1 << 20


def loads(text: str | bytes) -> Any:
    """A JSON value.

    Raises:
        ValueError: it isn't JSON, or is nested too deeply.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


class JsonParser:
    """Parses JSON and remembers what is odd about it.

    Attributes:
        duplicate: a key that the last value parsed has twice in one object, or None.
        constant: `NaN`, `Infinity` or `-Infinity` if it was in the last value parsed, or None.
    """

    def __init__(self) -> None:
        self.duplicate: str | None = None
        self.constant: str | None = None
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant
        )

    def line(self, line: bytes) -> Any:
        """The value in a line.

        Raises:
            RowError: it is not UTF-8, not JSON, or ambiguous (a key twice).
        """
        self.duplicate = self.constant = None
        try:
            text = line.decode()
            value = self._decoder.decode(text)
        except UnicodeDecodeError as error:
            raise RowError(
                "encoding", f"is not UTF-8 (byte {error.start + 1} of the line)"
            ) from None
        except json.JSONDecodeError as error:
            raise RowError(
                "not-json", f"is not JSON: {error.msg} at column {error.colno}"
            ) from None
        except RecursionError:
            raise RowError("not-json", "is not usable JSON: it is nested too deeply") from None
        except ValueError as error:
            raise RowError("not-json", f"is not usable JSON: {error}") from None
        if self.duplicate is not None:
            raise RowError("duplicate-key", f"has the key {self.duplicate!r} twice in one object")
        if "\\u" in text:
            refuse_surrogates(value)
        return value

    def at(self, text: str, position: int) -> tuple[Any, int]:
        """The value that starts at a position, and where it ends.

        Raises:
            ValueError, RecursionError: there is no whole value.
        """
        self.duplicate = self.constant = None
        return self._decoder.raw_decode(text, position)

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            seen: set[str] = set()
            for key, _ in pairs:
                if key in seen:
                    self.duplicate = key
                seen.add(key)
        return result

    def _constant(self, name: str) -> float:
        self.constant = name
        return float(name)


def refuse_surrogates(value: Any) -> None:
    """
    Raises:
        RowError: half of a surrogate pair is in a text, which no tokenizer can read.
    """
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RowError(
            "encoding", "has half of a surrogate pair (an escape like \\ud83d)"
        ) from None


def array_items(file: BinaryIO, parser: JsonParser) -> Iterator[tuple[int, Any | RowError]]:
    """The items of a JSON array, each with its line, read as they come. What comes after a syntax
    error can't be read: the error is the last item."""
    reader = _Text(file)
    try:
        reader.skip()
        reader.position += 1  # the opening bracket
        reader.skip()
        if reader.peek() == "]":
            return
        while True:
            yield reader.line(), reader.value(parser)
            reader.skip()
            after = reader.peek()
            reader.position += 1
            if after == "]":
                reader.skip()
                if reader.peek():
                    raise ValueError("there is more after the end of the array")
                return
            if after != ",":
                raise ValueError("the array breaks off" if not after else "expected ',' or ']'")
            reader.skip()
    except UnicodeDecodeError:
        yield reader.line(), RowError("encoding", "begins a part that is not UTF-8")
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or str(error) or "it is nested too deeply"
        yield reader.line(), RowError("not-json", f"is not JSON from here on: {reason}")


class _Text:
    """A window on a text that is read chunk by chunk."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._pending = b""
        self._text = ""
        self._lines = 1
        self._counted = 0
        self._done = False
        self.position = 0

    def line(self) -> int:
        """The line, from 1, that the position is on."""
        self._lines += self._text.count("\n", self._counted, self.position)
        self._counted = self.position
        return self._lines

    def peek(self) -> str:
        if self.position >= len(self._text):
            self._more()
        return self._text[self.position : self.position + 1]

    def skip(self) -> None:
        """Pass over white space."""
        while (char := self.peek()) and char in " \t\r\n\ufeff":
            self.position += 1

    def value(self, parser: JsonParser) -> Any | RowError:
        size = _CHUNK
        while True:
            try:
                value, end = parser.at(self._text, self.position)
            except ValueError:
                # The value may only go on in a part that isn't read yet.
                if self._done:
                    raise
                size *= 2
                self._more(size)
                continue
            if not self._done and (end == len(self._text) or self._text[end] not in ",] \t\r\n"):
                self._more()  # a number may go on in the next part
                continue
            self.position = end
            if parser.duplicate is not None:
                return RowError(
                    "duplicate-key", f"has the key {parser.duplicate!r} twice in one object"
                )
            try:
                refuse_surrogates(value)
            except RowError as error:
                return error
            return value

    def _more(self, size: int = _CHUNK) -> None:
        self.line()
        self._text = self._text[self.position :]
        self.position = self._counted = 0
        read = self._file.read(size)
        self._done = not read
        data = self._pending + read
        try:
            text, self._pending = data.decode(), b""
        except UnicodeDecodeError as error:
            # A character may be cut in two by the end of the chunk.
            if self._done or error.start < len(data) - 3:
                raise
            text, self._pending = data[: error.start].decode(), data[error.start :]
        self._text += text


def dump_line(row: dict[str, Any]) -> bytes:
    """A row as one line of JSON.

    Raises:
        RowError: it holds something that JSON can't.
    """
    try:
        text = json.dumps(row, ensure_ascii=False, default=_plain)
        if not text.isascii():
            # Some readers take these for the ends of lines.
            for char, escape in (("\x85", "\\u0085"), ("\u2028", "\\u2028"), ("\u2029", "\\u2029")):
                text = text.replace(char, escape)
        return text.encode() + b"\n"
    except UnicodeEncodeError:
        raise RowError("encoding", "has half of a surrogate pair") from None


def _plain(value: object) -> Any:
    """Values of columnar files that JSON doesn't know."""
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Decimal):
        return str(value)
    raise RowError("not-text", f"has a column with {type(value).__name__}, which JSON can't hold")


def json_type(value: object) -> str:
    """What JSON calls this value's type, for messages, with its article."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} (not a number that JSON has)"
    names = {
        dict: "an object",
        list: "an array",
        str: "a string",
        bool: "a boolean",
        type(None): "null",
    }
    return names.get(type(value), "a number")
