"""Data files to tokenized samples, held compactly: four bytes a token, whatever the model."""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from lamina.data.codes import CODES
from lamina.data.formats import Input, Places, Problems, Row, count_rows
from lamina.data.lengths import TooLong, fit
from lamina.data.messages import Example, Feedback, Preference, RowError
from lamina.data.rules import findings
from lamina.data.shapes import shadowed
from lamina.data.template import Renderer, Sample
from lamina.errors import DataError

__all__ = ["Dataset", "Dropped", "Shortened", "load_dataset"]

#: Rows between two calls of a progress function.
_PROGRESS_EVERY = 256


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row of which nothing is left, because it is too long."""

    place: str
    num_tokens: int

    def __str__(self) -> str:
        return f"{self.place} has {self.num_tokens} tokens"


@dataclass(frozen=True, slots=True)
class Shortened:
    """A row that was too long.

    Args:
        num_tokens: how many tokens it had.
        kept: how many it has now.
        parts: how many samples these are.
    """

    place: str
    num_tokens: int
    kept: int
    parts: int

    def __str__(self) -> str:
        parts = f" in {self.parts} samples" if self.parts != 1 else ""
        return f"{self.place} had {self.num_tokens} tokens and has {self.kept}{parts}"


class Dataset:
    """Tokenized samples; `dataset[i]` is a `Sample`.

    Args:
        coded: `[all tokens]` int32: a token's id if it is learned, `~id` if it isn't.
        offsets: `[len + 1]` int64: sample i is `coded[offsets[i]:offsets[i + 1]]`.
        rows: `[len]` int64: the row of each sample, from 0.
        places: where each row comes from.
        dropped: the rows left out because they are too long.
        shortened: the rows of which a part was kept, because they are too long.
        notes: how rows were understood that could be meant otherwise, as sentences.
    """

    def __init__(
        self,
        coded: NDArray[np.int32],
        offsets: NDArray[np.int64],
        rows: NDArray[np.int64],
        places: Places,
        dropped: Sequence[Dropped] = (),
        shortened: Sequence[Shortened] = (),
        notes: Sequence[str] = (),
    ):
        self._coded = coded
        self._offsets = offsets
        self._rows = rows
        self._places = places
        self.dropped = tuple(dropped)
        self.shortened = tuple(shortened)
        self.notes = tuple(notes)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        coded = self._coded[self._offsets[index] : self._offsets[index + 1]]
        learned = coded >= 0
        return Sample(np.where(learned, coded, ~coded), learned, int(self._rows[index]))

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample."""
        return np.diff(self._offsets)

    @property
    def num_rows(self) -> int:
        """Rows read, including those dropped."""
        return len(self._places.lines)

    @property
    def num_tokens(self) -> int:
        return int(self._offsets[-1])

    @property
    def num_loss_tokens(self) -> int:
        return int((self._coded >= 0).sum())

    def place(self, row: int) -> str:
        """Where a row comes from, as `file:line`."""
        return self._places.name(row)


def load_dataset(
    paths: Input | Path | str | Iterable[Path | str],
    tokenizer: Any,
    max_length: int | None = None,
    *,
    too_long: TooLong = "drop",
    renderer: Renderer | None = None,
    progress: Callable[[int], None] | None = None,
) -> Dataset:
    """Read and tokenize data.

    Args:
        paths: the data, or its files, in any format that is known.
        tokenizer: a transformers tokenizer.
        max_length: the most tokens that a sample may have.
        too_long: what happens to longer ones: see `lengths`.
        renderer: the renderer to use, if there is one already for this tokenizer.
        progress: called with the number of rows read so far, now and then.

    Raises:
        DataError: a file can't be read; any row has an error, as `check` finds them (all such rows
            are reported at once); or nothing remains to train on.
    """
    data = paths if isinstance(paths, Input) else Input(paths)
    loader = _Loader(data, renderer or Renderer(tokenizer), max_length, too_long)
    loader.read(progress or (lambda rows: None))
    return loader.finish()


class _Loader:
    def __init__(self, data: Input, renderer: Renderer, max_length: int | None, too_long: TooLong):
        self.places = Places(data.sources)
        self._data = data
        self._renderer = renderer
        self._max_length = max_length
        self._too_long: TooLong = too_long
        self._problems = Problems()
        self._coded = array("i")
        self._offsets = array("q", [0])
        self._rows = array("q")
        self._dropped: list[Dropped] = []
        self._shortened: list[Shortened] = []
        self._chosen = self._disliked = 0
        self._hidden: Counter[tuple[str, str]] = Counter()

    def read(self, progress: Callable[[int], None]) -> None:
        """Read and tokenize all rows."""
        waiting: deque[Row] = deque()

        def examples() -> Iterator[Example | RowError]:
            for row in self._data.rows():
                self.places.add(row.file, [row.raw.line])
                waiting.append(row)
                yield _without_errors(row.example)

        done = 0
        for done, result in enumerate(self._renderer.render_many(examples()), 1):
            self._take(waiting.popleft(), result)
            if done % _PROGRESS_EVERY == 0:
                progress(done)
        progress(done)

    def _take(self, row: Row, result: list[Sample] | RowError) -> None:
        example = row.example
        if isinstance(result, RowError) or isinstance(example, RowError):
            assert isinstance(result, RowError)
            self._problems.add(self.places.name(row.index), result.message)
            return
        self._chosen += isinstance(example, Preference)
        self._disliked += isinstance(example, Feedback) and not example.label
        if self._data.columns and isinstance(row.raw.value, dict):
            self._hidden.update(shadowed(row.raw.value, self._data.columns))
        self._add(row, example, result)

    def _add(self, row: Row, example: Example, samples: list[Sample]) -> None:
        longest = max((len(sample.input_ids) for sample in samples), default=0)
        limit = self._max_length
        if limit is not None and longest > limit:
            place = self.places.name(row.index)
            before = sum(len(sample.input_ids) for sample in samples)
            samples = fit(self._renderer, example, samples, limit, self._too_long)
            kept = sum(len(sample.input_ids) for sample in samples)
            if samples:
                self._shortened.append(Shortened(place, before, kept, len(samples)))
            else:
                self._dropped.append(Dropped(place, longest))
        for sample in samples:
            coded = np.where(sample.loss_mask, sample.input_ids, ~sample.input_ids)
            self._coded.frombytes(coded.astype(np.int32).tobytes())
            self._offsets.append(self._offsets[-1] + len(coded))
            self._rows.append(row.index)

    def finish(self) -> Dataset:
        names = self._data.name
        if self._problems.count:
            rows = len(self.places.lines)
            raise DataError(
                f"{self._problems.count} of {rows} rows of {names} can't be trained on.",
                problems=self._problems.listed(),
                hint="Mend these rows or take them out. A chat row has 'messages', each with "
                "'role' and 'content', and at least one answer of the assistant.",
            )
        if not self._rows:
            self._refuse_nothing(names)
        return Dataset(
            np.frombuffer(self._coded, dtype=np.int32),
            np.frombuffer(self._offsets, dtype=np.int64),
            np.frombuffer(self._rows, dtype=np.int64),
            self.places,
            self._dropped,
            self._shortened,
            self._notes(),
        )

    def _refuse_nothing(self, names: str) -> NoReturn:
        if self._dropped:
            shortest = min(dropped.num_tokens for dropped in self._dropped)
            raise DataError(
                f"{names}: nothing remains to train on, all {len(self._dropped)} samples have more "
                f"tokens than max_length={self._max_length}.",
                hint=f"The shortest has {shortest} tokens: raise max_length.",
            )
        if self._disliked:
            raise DataError(
                f"{names}: there is nothing to train on, all {self._disliked} answers are disliked."
            )
        raise DataError(f"{names}: there is nothing to train on, no row was found.")

    def _notes(self) -> list[str]:
        notes = []
        if self._chosen:
            has = f"{count_rows(self._chosen, 'has', 'have')} a pair"
            notes.append(f"{has} of answers, of which the chosen one is trained.")
        if self._disliked:
            has = f"{count_rows(self._disliked, 'has', 'have')} a disliked"
            notes.append(f"{has} answer, which is not trained.")
        for (name, source), count in self._hidden.items():
            has = f"{count_rows(count, 'has', 'have')} a column {name!r} that is not read"
            notes.append(f"{has}, for {source!r} is mapped to that name.")
        return notes


def _without_errors(example: Example | RowError) -> Example | RowError:
    """The example, or the first of its mistakes that stop a run."""
    if not isinstance(example, RowError):
        for code, message in findings(example):
            if CODES[code].severity == "error":
                return RowError(code, message)
    return example
