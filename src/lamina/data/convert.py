"""Any format to any other that can carry the content, with an account of every row."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from lamina.data.formats import Input, Row
from lamina.data.jsonio import dump_line
from lamina.data.messages import RowError
from lamina.data.shapes import Shape, candidates, shape_named
from lamina.data.shapes.base import uncarried
from lamina.data.writers import check_output, new_file, open_writer, rejected_path

__all__ = ["Conversion", "Rejects", "convert"]

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
    """Writes rejected rows, one JSON object a line: `file`, `line`, `code`, `reason` and the row,
    as `row` or, if it couldn't be parsed, as `raw` text. The file is made with the first of them.

    Args:
        path: the file.
    """

    def __init__(self, path: Path, data: Input):
        self.path = path
        self.count = 0
        self.reasons: Counter[str] = Counter()
        self._data = data
        self._stack = contextlib.ExitStack()
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Rejects:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def add(self, row: Row, reason: RowError) -> None:
        if self._file is None:
            self._file = self._stack.enter_context(new_file(self.path))
        entry: dict[str, Any] = {
            "file": self._data.sources[row.file].name,
            "line": row.raw.line,
            "code": reason.code,
            "reason": reason.message,
        }
        raw = row.raw.raw.decode("utf-8", "backslashreplace").rstrip("\r\n")
        kept = {"raw": raw} if isinstance(row.raw.value, RowError) else {"row": row.raw.value}
        try:
            line = dump_line({**entry, **kept})
        except (RowError, RecursionError):
            # What JSON can't hold (bytes, half a surrogate pair) is kept in an escaped form.
            kept = {"raw": repr(row.raw.value)}
            line = json.dumps({**entry, **kept}).encode() + b"\n"
        self._file.write(line)
        self.count += 1
        self.reasons[reason.code] += 1


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
    shape = shape_named(to)
    rejects_file = rejected_path(output)
    for path in (output, rejects_file):
        check_output(path, data.sources, force=force)
    result = Conversion(output, to)
    with Rejects(rejects_file, data) as rejects:
        with open_writer(output) as writer:
            for row, written in written_rows(data, shape):
                result.rows_in += 1
                if row.shape is not None:
                    result.shapes[row.shape.name] += 1
                try:
                    if isinstance(written, RowError):
                        raise written
                    writer.write(written)
                    result.rows_out += 1
                except RowError as error:
                    rejects.add(row, error)
                if progress is not None and result.rows_in % PROGRESS_EVERY == 0:
                    progress(result.rows_in)
        result.rejected, result.reasons = rejects.count, rejects.reasons
    if not result.rejected:
        rejects_file.unlink(missing_ok=True)  # of an earlier conversion
    result.rejected_file = rejects_file if result.rejected else None
    return result


def written_rows(data: Input, shape: Shape) -> Iterator[tuple[Row, dict[str, Any] | RowError]]:
    """Each row with its form in `shape`, or why it has none."""
    known: set[tuple[str, ...]] = set()
    for row in data.rows():
        if isinstance(row.example, RowError):
            yield row, row.example
            continue
        written: dict[str, Any] | RowError
        try:
            written = shape.write(row.example)
            if tuple(written) not in known:
                _check_readable(written, shape)
                known.add(tuple(written))
        except RowError as error:
            written = error
        except RecursionError:
            written = RowError("not-json", "is nested too deeply")
        yield row, written


def _check_readable(row: dict[str, Any], shape: Shape) -> None:
    """
    Raises:
        RowError: the columns carried along make the row look like another shape.
    """
    found = candidates(row)[0][0]
    if found is not shape:
        raise uncarried(f"with its further columns it would be read as {found.title}")
