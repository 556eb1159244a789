"""What a dataset amounts to, in numbers: rows, turns, tokens, and what a recipe makes of it."""

from __future__ import annotations

import heapq
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lamina.data.formats import Input, Row
from lamina.data.lengths import TooLong, fit
from lamina.data.messages import Conversation, Example, Feedback, Preference, RowError
from lamina.data.order import fill, shuffled
from lamina.data.template import Renderer, Sample

__all__ = ["Bin", "Long", "Quantiles", "Stats", "stats"]

_PROGRESS_EVERY = 256
_LONGEST = 10
_BINS = 12


@dataclass(frozen=True)
class Quantiles:
    """How numbers are spread."""

    minimum: int
    p5: int
    p25: int
    median: int
    p75: int
    p95: int
    p99: int
    maximum: int
    mean: float

    @staticmethod
    def of(values: NDArray[np.int64]) -> Quantiles:
        if not len(values):
            return Quantiles(0, 0, 0, 0, 0, 0, 0, 0, 0.0)
        points = np.percentile(values, [0, 5, 25, 50, 75, 95, 99, 100], method="nearest")
        p0, p5, p25, p50, p75, p95, p99, p100 = (int(point) for point in points)
        return Quantiles(p0, p5, p25, p50, p75, p95, p99, p100, float(values.mean()))


@dataclass(frozen=True)
class Bin:
    """A bar of a histogram: samples with `low` to `high` tokens."""

    low: int
    high: int
    count: int


@dataclass(frozen=True)
class Long:
    """One of the longest rows."""

    place: str
    num_tokens: int


@dataclass
class Stats:
    """What a dataset amounts to.

    Args:
        rows: rows read, usable or not.
        unusable: rows with a mistake that stops a run, by its code.
        shapes: how many rows have each shape.
        roles: how many turns each role has.
        turns: turns of a conversation.
        samples: sequences that are trained; more than the rows where a template needs several.
        several: rows that became several samples.
        lengths: tokens of a sample, before anything is done about long ones.
        num_tokens, num_loss_tokens: of all samples, likewise.
        longest: the longest rows.
        too_long: rows longer than `max_length`.
        dropped, shortened: what becomes of these under the recipe's policy.
        kept_tokens: tokens that remain.
        steps_per_epoch: optimizer steps that visit every remaining sample once, or None if
            `tokens_per_step` isn't known or is too small.
    """

    rows: int = 0
    unusable: Counter[str] = field(default_factory=Counter)
    shapes: Counter[str] = field(default_factory=Counter)
    roles: Counter[str] = field(default_factory=Counter)
    turns: Quantiles = field(default_factory=lambda: Quantiles.of(np.array([])))
    samples: int = 0
    several: int = 0
    lengths: Quantiles = field(default_factory=lambda: Quantiles.of(np.array([])))
    histogram: list[Bin] = field(default_factory=list)
    num_tokens: int = 0
    num_loss_tokens: int = 0
    longest: list[Long] = field(default_factory=list)
    too_long: int = 0
    dropped: int = 0
    shortened: int = 0
    kept_tokens: int = 0
    steps_per_epoch: int | None = None

    @property
    def loss_share(self) -> float:
        """The share of the tokens that is learned."""
        return self.num_loss_tokens / self.num_tokens if self.num_tokens else 0.0


def stats(
    data: Input,
    renderer: Renderer,
    *,
    max_length: int | None = None,
    too_long: TooLong = "drop",
    tokens_per_step: int | None = None,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> Stats:
    """Read and tokenize a dataset, and say what it amounts to. Mistakes are counted, not raised.

    Args:
        max_length, too_long, tokens_per_step, seed: as in the recipe, for what it would do.
        progress: called with the number of rows read, now and then.

    Raises:
        DataError: the data can't be read at all.
    """
    counter = _Counter(data, renderer, max_length, too_long)
    counter.read(progress or (lambda rows: None))
    return counter.finish(tokens_per_step, seed)


class _Counter:
    def __init__(self, data: Input, renderer: Renderer, max_length: int | None, too_long: TooLong):
        self.result = Stats()
        self._data, self._renderer = data, renderer
        self._max_length = max_length
        self._too_long: TooLong = too_long
        self._turns = array("i")
        self._lengths = array("q")
        self._kept = array("q")
        self._longest: list[tuple[int, int, str]] = []

    def read(self, progress: Callable[[int], None]) -> None:
        """Read and tokenize all rows."""
        waiting: deque[Row] = deque()

        def examples() -> Iterator[Example | RowError]:
            for row in self._data.rows():
                waiting.append(row)
                yield row.example

        for samples in self._renderer.render_many(examples()):
            self._take(waiting.popleft(), samples)
            if self.result.rows % _PROGRESS_EVERY == 0:
                progress(self.result.rows)
        progress(self.result.rows)

    def _take(self, row: Row, samples: list[Sample] | RowError) -> None:
        result, example = self.result, row.example
        result.rows += 1
        if row.shape is not None:
            result.shapes[row.shape.name] += 1
        if not isinstance(example, RowError):
            self._count_turns(example)
        if isinstance(samples, RowError) or isinstance(example, RowError):
            assert isinstance(samples, RowError)
            result.unusable[samples.code] += 1
            return
        sizes = [len(sample.input_ids) for sample in samples]
        self._lengths.extend(sizes)
        result.several += len(sizes) > 1
        result.num_loss_tokens += sum(sample.num_loss_tokens for sample in samples)
        entry = (sum(sizes), -row.index, self._data.place(row))
        if len(self._longest) < _LONGEST:
            heapq.heappush(self._longest, entry)
        else:
            heapq.heappushpop(self._longest, entry)
        limit = self._max_length
        if limit is not None and max(sizes, default=0) > limit:
            result.too_long += 1
            left = fit(self._renderer, example, samples, limit, self._too_long)
            sizes = [len(sample.input_ids) for sample in left]
            result.dropped += not left
            result.shortened += bool(left)
        self._kept.extend(sizes)

    def _count_turns(self, example: Example) -> None:
        match example:
            case Conversation(messages):
                pass
            case Preference(list(prompt), list(chosen)) | Feedback(list(prompt), list(chosen)):
                messages = [*prompt, *chosen]
            case _:
                return
        self._turns.append(len(messages))
        self.result.roles.update(m.role for m in messages)

    def finish(self, tokens_per_step: int | None, seed: int) -> Stats:
        result = self.result
        lengths = np.frombuffer(self._lengths, dtype=np.int64)
        result.turns = Quantiles.of(np.frombuffer(self._turns, dtype=np.int32).astype(np.int64))
        result.samples = len(lengths)
        result.lengths = Quantiles.of(lengths)
        result.histogram = _histogram(lengths)
        result.num_tokens = int(lengths.sum())
        result.longest = [
            Long(place, size) for size, _, place in sorted(self._longest, reverse=True)
        ]
        kept = np.frombuffer(self._kept, dtype=np.int64)
        result.kept_tokens = int(kept.sum())
        if tokens_per_step is not None and len(kept) and kept.max() <= tokens_per_step:
            order = shuffled(len(kept), seed, 0)
            result.steps_per_epoch = len(fill(kept[order], tokens_per_step)) - 1
        return result


def _histogram(lengths: NDArray[np.int64]) -> list[Bin]:
    """Bars of equal width that together hold all samples."""
    if not len(lengths):
        return []
    width = max(1, -(-(int(lengths.max()) + 1) // _BINS))
    counts = np.bincount(lengths // width)
    return [Bin(k * width, (k + 1) * width - 1, int(count)) for k, count in enumerate(counts)]
