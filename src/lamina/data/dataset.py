"""Data files to tokenized samples, held compactly: four bytes a token, whatever the model."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.data.containers import Source
from lamina.data.formats import Input, Places, Problems, Row
from lamina.data.messages import Example, RowError
from lamina.data.template import Renderer, Sample
from lamina.errors import DataError

__all__ = ["Dataset", "Dropped", "load_dataset"]


@dataclass(frozen=True, slots=True)
class Dropped:
    """A sample left out because it is too long."""

    place: str
    num_tokens: int

    def __str__(self) -> str:
        return f"{self.place} has {self.num_tokens} tokens"


class Dataset:
    """Tokenized samples; `dataset[i]` is a `Sample`.

    Args:
        coded: `[all tokens]` int32: a token's id if it is learned, `~id` if it isn't.
        offsets: `[len + 1]` int64: sample i is `coded[offsets[i]:offsets[i + 1]]`.
        rows: `[len]` int64: the row of each sample, from 0.
        places: where each row comes from.
        dropped: the samples left out because they are too long.
    """

    def __init__(
        self,
        coded: NDArray[np.int32],
        offsets: NDArray[np.int64],
        rows: NDArray[np.int64],
        places: Places,
        dropped: Sequence[Dropped] = (),
    ):
        self._coded = coded
        self._offsets = offsets
        self._rows = rows
        self._places = places
        self.dropped = tuple(dropped)

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
    renderer: Renderer | None = None,
    progress: Callable[[int], None] | None = None,
) -> Dataset:
    """Read and tokenize data files.

    Args:
        paths: the data, or its files, in any format that is known.
        tokenizer: a transformers tokenizer.
        max_length: samples with more tokens are dropped, and named in `Dataset.dropped`.
        renderer: the renderer to use, if there is one already for this tokenizer.
        progress: called with the number of rows read so far, now and then.

    Raises:
        DataError: a file can't be read; any row is malformed (all such rows are reported at once);
            or nothing remains to train on.
    """
    data = paths if isinstance(paths, Input) else Input(paths)
    loader = _Loader(data.sources, renderer or Renderer(tokenizer), max_length)
    source = data.rows()
    while rows := list(islice(source, 256)):
        loader.add(rows)
        if progress is not None:
            progress(len(loader.places.lines))
    return loader.finish()


class _Loader:
    def __init__(self, sources: list[Source], renderer: Renderer, max_length: int | None):
        self.places = Places(sources)
        self._sources = sources
        self._renderer = renderer
        self._max_length = max_length
        self._problems = Problems()
        self._coded = array("i")
        self._offsets = array("q", [0])
        self._rows = array("q")
        self._dropped: list[Dropped] = []

    def add(self, rows: Sequence[Row]) -> None:
        examples: list[Example] = []
        good: list[Row] = []
        for row in rows:
            self.places.add(row.file, [row.raw.line])
            if isinstance(row.example, RowError):
                self._problem(row, row.example)
            else:
                examples.append(row.example)
                good.append(row)
        for row, result in zip(good, self._renderer.render_many(examples), strict=True):
            if isinstance(result, RowError):
                self._problem(row, result)
            else:
                for sample in result:
                    self._add(row, sample)

    def _add(self, row: Row, sample: Sample) -> None:
        size = len(sample.input_ids)
        if self._max_length is not None and size > self._max_length:
            self._dropped.append(Dropped(self.places.name(row.index), size))
            return
        coded = np.where(sample.loss_mask, sample.input_ids, ~sample.input_ids)
        self._coded.frombytes(coded.astype(np.int32).tobytes())
        self._offsets.append(self._offsets[-1] + size)
        self._rows.append(row.index)

    def _problem(self, row: Row, error: RowError) -> None:
        self._problems.add(self.places.name(row.index), error.message)

    def finish(self) -> Dataset:
        names = ", ".join(source.name for source in self._sources)
        if self._problems.count:
            rows = len(self.places.lines)
            raise DataError(
                f"{self._problems.count} of {rows} rows of {names} can't be trained on.",
                problems=self._problems.listed(),
                hint="Mend these rows or take them out. A chat row has 'messages', each with "
                "'role' and 'content', and at least one answer of the assistant.",
            )
        if not self._rows:
            if not self._dropped:
                raise DataError(f"{names}: there is nothing to train on, no row was found.")
            shortest = min(dropped.num_tokens for dropped in self._dropped)
            raise DataError(
                f"{names}: nothing remains to train on, all {len(self._dropped)} samples have more "
                f"tokens than max_length={self._max_length}.",
                hint=f"The shortest has {shortest} tokens: raise max_length.",
            )
        return Dataset(
            np.frombuffer(self._coded, dtype=np.int32),
            np.frombuffer(self._offsets, dtype=np.int64),
            np.frombuffer(self._rows, dtype=np.int64),
            self.places,
            self._dropped,
        )
