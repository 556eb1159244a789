"""Files to examples: containers and shapes put together, with a place for every mistake."""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lamina.data.containers import Source, find_sources, read_source
from lamina.data.messages import Example, RowError
from lamina.data.readers import RawRow, TextRows
from lamina.data.shapes import Shape, ShapeFinder, shape_named
from lamina.errors import DataError

__all__ = ["ALIASES", "Input", "Places", "Problems", "Row", "count_rows"]

#: How many mistakes a message lists before it only counts them.
SHOWN = 10

#: What columns can be mapped to: those that some shape gives a meaning.
_MAPPABLE = [
    "messages",
    "conversations",
    "user",
    "assistant",
    "system",
    "prompt",
    "completion",
    "text",
    "instruction",
    "input",
    "output",
    "history",
    "chosen",
    "rejected",
    "label",
    "tools",
    "segments",
    "input_ids",
    "labels",
]

#: What a table's columns are called in everyday words.
ALIASES = {"question": "user", "answer": "assistant"}


@dataclass(slots=True)
class Row:
    """A row of a dataset.

    Args:
        index: its number among the rows of all sources, from 0.
        file: which source, as an index into `Input.sources`.
        raw: the row as it stands there.
        shape: how its columns were understood, or None.
        example: what it holds, or the reason why it can't be used.
    """

    index: int
    file: int
    raw: RawRow
    shape: Shape | None
    example: Example | RowError


@dataclass
class Problems:
    """Mistakes, of which the first few are kept and the others counted."""

    shown: list[str] = field(default_factory=list)
    count: int = 0

    def add(self, place: str, message: str) -> None:
        self.count += 1
        if len(self.shown) < SHOWN:
            self.shown.append(f"{place} {message}.")

    def listed(self) -> list[str]:
        """The mistakes as sentences, with the number of those left out."""
        more = self.count - len(self.shown)
        return [*self.shown, f"... and {more} more."] if more else list(self.shown)


class Input:
    """Data files, and how to understand them.

    Args:
        paths: files, glob patterns, saved datasets or names of hub datasets.
        shape: the name of the shape of all rows; found row by row if None.
        columns: what a column of a shape is called in these files, e.g. `{"user": "Frage"}`.
            `question` and `answer` are other words for `user` and `assistant`. Where the files have
            a column of a mapped name besides, that one is not read.
        text_rows: what a row of a plain text file is; a document if None.

    Raises:
        DataError: a path stands for nothing, or the shape or a column isn't known.
    """

    def __init__(
        self,
        paths: Path | str | Iterable[Path | str],
        *,
        shape: str | None = None,
        columns: Mapping[str, str] | None = None,
        text_rows: TextRows | None = None,
    ):
        self.sources = find_sources(paths)
        self.shape = None if shape is None else shape_named(shape)
        self.columns = {ALIASES.get(name, name): column for name, column in (columns or {}).items()}
        self.text_rows: TextRows = text_rows or "document"
        #: Whether somebody said so.
        self.names_text_rows = text_rows is not None
        unknown = [column for column in self.columns if column not in _MAPPABLE]
        if unknown:
            raise DataError(
                f"Nothing can be mapped to {', '.join(map(repr, unknown))}.",
                hint=f"Known columns: {', '.join([*_MAPPABLE, *ALIASES])}.",
            )
        twice = [name for alias, name in ALIASES.items() if {alias, name} <= set(columns or {})]
        if twice:
            raise DataError(f"Two columns are mapped to {', '.join(map(repr, twice))}.")
        sources = [*self.columns.values()]
        if shared := sorted({source for source in sources if sources.count(source) > 1}):
            raise DataError(f"Two names are mapped to the column {', '.join(map(repr, shared))}.")

    @property
    def name(self) -> str:
        """The sources, for messages."""
        return ", ".join(source.name for source in self.sources)

    def rows(self) -> Iterator[Row]:
        """The rows of all sources, in order. Never raises for a row: its mistake is in
        `Row.example`.

        Raises:
            DataError: a source can't be read.
        """
        index = 0
        for file in range(len(self.sources)):
            for row in self.rows_of(file):
                row.index = index
                index += 1
                yield row

    def rows_of(self, file: int) -> Iterator[Row]:
        """The rows of one source, numbered from 0.

        Raises:
            DataError: it can't be read.
        """
        finder = ShapeFinder(self.shape, self.columns)
        raws = read_source(self.sources[file], text_rows=self.text_rows)
        for index, raw in enumerate(raws):
            if isinstance(raw.value, RowError):
                yield Row(index, file, raw, None, raw.value)
                continue
            shape, example = understand(finder, raw.value)
            yield Row(index, file, raw, shape, example)

    def place(self, row: Row) -> str:
        """Where a row stands, as `file:line`."""
        return f"{self.sources[row.file].name}:{row.raw.line}"


def understand(
    finder: ShapeFinder, value: dict[str, Any]
) -> tuple[Shape | None, Example | RowError]:
    """The shape and the example of a raw row, or why it has none."""
    shape: Shape | None = None
    try:
        row = finder.view(value)
        shape = finder.find(row)
        example = shape.read(row)
        example.extra.update(finder.unseen(value, shape))
        return shape, example
    except RowError as error:
        return shape, error
    except RecursionError:
        return shape, RowError("not-json", "is nested too deeply")


def count_rows(count: int, one: str = "", many: str = "") -> str:
    """`1 row` or `2 rows`, with a verb in its form if one is given."""
    words = ["1 row", one] if count == 1 else [f"{count} rows", many]
    return " ".join(filter(None, words))


class Places:
    """Where rows come from: a file and a line, eight bytes a row.

    Args:
        sources: those that the rows are read from, in order.
    """

    def __init__(self, sources: Sequence[Source]):
        self._names = [source.name for source in sources]
        self._first_rows: list[int] = []
        self.lines = array("q")

    def add(self, file: int, lines: Iterable[int]) -> None:
        """Add rows of a file, after all those of the files before it."""
        while len(self._first_rows) <= file:
            self._first_rows.append(len(self.lines))
        self.lines.extend(lines)

    def name(self, row: int) -> str:
        file = bisect_right(self._first_rows, row) - 1
        return f"{self._names[file]}:{self.lines[row]}"
