"""Files to examples: containers and shapes put together, with a place for every mistake."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lamina.data.containers import read_rows
from lamina.data.messages import Example, RowError
from lamina.data.shapes import parse_row
from lamina.errors import DataError

__all__ = ["Problems", "Row", "read_examples", "resolve_paths"]

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


def resolve_paths(paths: Path | str | Iterable[Path | str]) -> list[Path]:
    """The files to read.

    Raises:
        DataError: names every path that is missing or a folder.
    """
    given = [paths] if isinstance(paths, Path | str) else list(paths)
    resolved = [Path(path) for path in given]
    wrong = [f"{path} does not exist." for path in resolved if not path.exists()]
    wrong += [f"{path} is a folder, not a file." for path in resolved if path.is_dir()]
    if not resolved:
        raise DataError("No data file was given.", hint="Name at least one JSON-lines file.")
    if wrong:
        raise DataError(
            "The data can't be read.", problems=wrong, hint="Check the spelling of the paths."
        )
    return resolved


def read_examples(paths: Sequence[Path]) -> Iterator[Row]:
    """The rows of all files, in order. Never raises for a row: its mistake is in `Row.example`.

    Raises:
        DataError: a file can't be read.
    """
    index = 0
    for file, path in enumerate(paths):
        for raw in read_rows(path):
            example: Example | RowError
            if isinstance(raw.value, RowError):
                example = raw.value
            else:
                try:
                    example = parse_row(raw.value)
                except RowError as error:
                    example = error
            yield Row(index, file, raw.line, example)
            index += 1
