"""Any format to any other that can carry the content, with an account of every row."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lamina.data.formats import Input, understand
from lamina.data.jsonio import dump_line
from lamina.data.messages import Example, RowError
from lamina.data.parallel import Message, line_blocks, map_blocks
from lamina.data.readers import RawRow, parse_lines
from lamina.data.shapes import Shape, ShapeFinder, candidates, present, shape_named
from lamina.data.shapes.base import uncarried
from lamina.data.writers import (
    LinesWriter,
    RowWriter,
    check_output,
    new_file,
    open_writer,
    rejected_path,
)

__all__ = ["Conversion", "Rejects", "convert", "convert_block", "rejected_line"]

#: Rows between two calls of a progress function.
PROGRESS_EVERY = 1000


@dataclass
class Conversion:
    """What `convert` did: `rows_in == rows_out + rejected`.

    Args:
        shapes: how many rows had each shape.
        reasons: how many rows were rejected for each kind of mistake, by its code.
        rejected_file: where the rejected rows are, if there are any.
    """

    output: Path
    to: str
    rows_in: int = 0
    rows_out: int = 0
    rejected: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    rejected_file: Path | None = None


class Rejects:
    """Writes rejected rows. The file is made with the first of them."""

    def __init__(self, path: Path):
        self.path = path
        self.count = 0
        self._stack = contextlib.ExitStack()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Rejects:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(self, lines: bytes, count: int = 1) -> None:
        if not count:
            return
        if self._file is None:
            self._file = self._stack.enter_context(new_file(self.path))
        self._file.write(lines)
        self.count += count

    def finished(self) -> Path | None:
        """The file, if there is one; one of an earlier time is removed."""
        if not self.count:
            self.path.unlink(missing_ok=True)
        return self.path if self.count else None


def rejected_line(name: str, raw: RawRow, reason: RowError) -> bytes:
    """A rejected row as a line: an object with `file`, `line`, `code`, `reason`, and the row as
    `row` or, if it couldn't be parsed, as `raw` text."""
    entry = {"file": name, "line": raw.line, "code": reason.code, "reason": reason.message}
    text = raw.raw.decode("utf-8", "backslashreplace").rstrip("\r\n")
    kept = {"raw": text} if isinstance(raw.value, RowError) else {"row": raw.value}
    try:
        return dump_line({**entry, **kept})
    except (RowError, RecursionError):
        # What JSON can't hold (bytes, half a surrogate pair) is kept in an escaped form.
        return json.dumps({**entry, "raw": repr(raw.value)}).encode() + b"\n"


def convert(
    data: Input,
    output: Path,
    *,
    to: str = "messages",
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Conversion:
    """Write the rows of `data` in another shape, in the container that the output's name tells.

    Args:
        to: the name of the shape to write.
        force: write over an output that exists.
        progress: called with the number of rows read, now and then.

    Raises:
        DataError: the output can't be written, or a source can't be read. Nothing is left behind.
    """
    shape_named(to)
    rejects_file = rejected_path(output)
    for path in (output, rejects_file):
        check_output(path, data.sources, force=force)
    result = Conversion(output, to)
    with Rejects(rejects_file) as rejects, open_writer(output) as writer:
        for index, source in enumerate(data.sources):
            if source.container == "jsonl" and isinstance(writer, LinesWriter):
                _convert_blocks(data, index, result, writer, rejects, progress)
            else:
                _convert_rows(data, index, result, writer, rejects, progress)
    result.rejected = rejects.count
    result.rejected_file = rejects.finished()
    return result


def _convert_rows(
    data: Input,
    index: int,
    result: Conversion,
    writer: RowWriter,
    rejects: Rejects,
    progress: Callable[[int], None] | None,
) -> None:
    """Convert one source in this process."""
    known = _Readable(shape_named(result.to))
    for row in data.rows_of(index):
        result.rows_in += 1
        if row.shape is not None:
            result.shapes[row.shape.name] += 1
        try:
            writer.write(known.written(row.example))
            result.rows_out += 1
        except RowError as error:
            result.reasons[error.code] += 1
            rejects.add(rejected_line(data.sources[index].name, row.raw, error))
        if progress is not None and result.rows_in % PROGRESS_EVERY == 0:
            progress(result.rows_in)


def _convert_blocks(
    data: Input,
    index: int,
    result: Conversion,
    writer: LinesWriter,
    rejects: Rejects,
    progress: Callable[[int], None] | None,
) -> None:
    """Convert one JSON-lines source to JSON lines, in several processes if it is large."""
    source = data.sources[index]
    options = {
        "shape": data.shape and data.shape.name,
        "columns": data.columns,
        "to": result.to,
        "name": source.name,
    }
    size = source.path.stat().st_size
    blocks = line_blocks(index, source)
    for _, message in map_blocks("convert", convert_block, options, blocks, size):
        written, rejected = message.blobs
        writer.write_lines(written)
        rejects.add(rejected, sum(message.values["reasons"].values()))
        result.rows_in += message.values["rows"]
        result.rows_out += message.values["rows"] - sum(message.values["reasons"].values())
        result.shapes.update(message.values["shapes"])
        result.reasons.update(message.values["reasons"])
        if progress is not None:
            progress(result.rows_in)


_STATE: dict[str, tuple[ShapeFinder, _Readable]] = {}


def convert_block(options: dict[str, Any], first: int, data: bytes) -> Message:
    """`parallel`'s task: convert lines of JSON. The results are the lines written and the lines
    rejected.

    Args:
        options: `shape` and `columns` of an `Input`; `to`, the shape to write; `name`, the file's.
        first: the number of the first line.
    """
    key = str(options)
    if key not in _STATE:
        shape = options["shape"]
        finder = ShapeFinder(shape and shape_named(shape), options["columns"])
        _STATE[key] = finder, _Readable(shape_named(options["to"]))
    finder, known = _STATE[key]
    written: list[bytes] = []
    rejected: list[bytes] = []
    shapes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    rows = 0
    for raw in parse_lines(io.BytesIO(data), first):
        rows += 1
        try:
            if isinstance(raw.value, RowError):
                raise raw.value
            shape, example = understand(finder, raw.value)
            if shape is not None:
                shapes[shape.name] += 1
            written.append(dump_line(known.written(example)))
        except RowError as error:
            reasons[error.code] += 1
            rejected.append(rejected_line(options["name"], raw, error))
    values = {"rows": rows, "shapes": shapes, "reasons": reasons}
    return Message(values, [b"".join(written), b"".join(rejected)])


class _Readable:
    """Writes examples in a shape, and sees to it that they will be read back as that shape."""

    def __init__(self, shape: Shape):
        self._shape = shape
        self._known: set[tuple[str, ...]] = set()

    def written(self, example: Example | RowError) -> dict[str, Any]:
        """
        Raises:
            RowError: there is no example, or the shape can't carry it.
        """
        if isinstance(example, RowError):
            raise example
        try:
            row = self._shape.write(example)
        except RecursionError:
            raise RowError("not-json", "is nested too deeply") from None
        columns = tuple(present(row))
        if columns not in self._known:
            _check_readable(present(row), self._shape)
            self._known.add(columns)
        return row


def _check_readable(row: dict[str, Any], shape: Shape) -> None:
    """
    Raises:
        RowError: the columns carried along make the row look like another shape.
    """
    found = candidates(row)[0][0]
    if found is not shape:
        raise uncarried(f"with its further columns it would be read as {found.title}")
