"""Files to examples: containers and shapes put together, with a place for every mistake."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from lamina.data.containers import Source, read_source
from lamina.data.messages import Example, RowError
from lamina.data.shapes import ShapeFinder

__all__ = ["Problems", "Row", "read_examples"]

#: How many mistakes a message lists before it only counts them.
SHOWN = 10


@dataclass(slots=True)
class Row:
    """A row of a dataset.

    Args:
        index: its number among the rows of all files, from 0.
        file: which file, as an index into the paths that were read.
        line: its line in that file, from 1.
        example: what it holds, or the reason why it can't be used.
    """

    index: int
    file: int
    line: int
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


def read_examples(sources: Sequence[Source], finder: ShapeFinder | None = None) -> Iterator[Row]:
    """The rows of all sources, in order. Never raises for a row: its mistake is in `Row.example`.

    Raises:
        DataError: a source can't be read.
    """
    index = 0
    finder = finder or ShapeFinder()
    for file, source in enumerate(sources):
        for raw in read_source(source):
            example: Example | RowError
            if isinstance(raw.value, RowError):
                example = raw.value
            else:
                try:
                    row = finder.renamed(raw.value)
                    example = finder.find(row).read(row)
                except RowError as error:
                    example = error
            yield Row(index, file, raw.line, example)
            index += 1
