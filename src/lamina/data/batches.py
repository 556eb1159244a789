"""The optimizer steps of a run: which sequences each holds, and their ragged tensors.

T = tokens of the step, L = tokens of it that carry loss, N = its sequences, laid end to end without
padding. The order depends on nothing but (seed, epoch), so a run can be taken up at any step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, pairwise
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from lamina.data.order import fill, shuffled
from lamina.data.template import Sample
from lamina.errors import DataError

__all__ = ["Batch", "Group", "Samples", "Steps", "make_batch", "plan_steps"]


class Samples(Protocol):
    """Something that holds samples: a `Dataset`, or any sequence with these two."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sample."""

    def __getitem__(self, index: int, /) -> Sample: ...


@dataclass(frozen=True)
class Group:
    """Consecutive whole sequences of a batch: sequences `[first, last)`, tokens `[start, stop)`."""

    first: int
    last: int
    start: int
    stop: int

    @property
    def num_tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Batch:
    """The ragged tokens of one optimizer step.

    Args:
        input_ids_T: int64.
        cu_seqlens: N+1 numbers; sequence n is `input_ids_T[cu_seqlens[n]:cu_seqlens[n + 1]]`.
        position_ids_T: int64, from 0 in each sequence.
        loss_index_L: int64, ascending: the positions whose *next* token, in the same sequence, is
            learned.
        targets_L: int64: those next tokens.
        rows: the dataset's row of each sequence.
    """

    input_ids_T: Tensor
    cu_seqlens: list[int]
    position_ids_T: Tensor
    loss_index_L: Tensor
    targets_L: Tensor
    rows: list[int]

    @property
    def num_tokens(self) -> int:
        return self.cu_seqlens[-1]

    @property
    def num_loss_tokens(self) -> int:
        return self.loss_index_L.numel()

    @property
    def num_sequences(self) -> int:
        return len(self.cu_seqlens) - 1

    @property
    def max_length(self) -> int:
        """Tokens of the longest sequence."""
        return max(b - a for a, b in pairwise(self.cu_seqlens))

    def groups(self, max_tokens: int) -> list[Group]:
        """The sequences in consecutive groups of at most `max_tokens` tokens; a sequence that is
        longer than that is a group by itself."""
        result: list[Group] = []
        first = 0
        for n in range(1, self.num_sequences + 1):
            full = n == self.num_sequences
            if full or self.cu_seqlens[n + 1] - self.cu_seqlens[first] > max_tokens:
                result.append(Group(first, n, self.cu_seqlens[first], self.cu_seqlens[n]))
                first = n
        return result


def make_batch(
    sequences: Sequence[tuple[ArrayLike, ArrayLike]], rows: Sequence[int] | None = None
) -> Batch:
    """A batch from (ids, loss mask) pairs, each at least one token long.

    Args:
        rows: the row of each sequence; counted from 0 if None.

    Raises:
        ValueError: there is no sequence, one is empty, or a mask has another length.
    """
    ids = [np.asarray(i, dtype=np.int64) for i, _ in sequences]
    masks = [np.asarray(m, dtype=np.bool_) for _, m in sequences]
    if not ids or any(i.size == 0 or i.shape != m.shape for i, m in zip(ids, masks, strict=True)):
        raise ValueError("a batch needs sequences of at least one token, each with its mask")
    cu_seqlens = [0, *np.cumsum([i.size for i in ids]).tolist()]
    ids_T = np.concatenate(ids)
    mask_T = np.concatenate(masks)
    mask_T[cu_seqlens[:-1]] = (
        False  # the first token of a sequence has nothing to be predicted from
    )
    targets = np.flatnonzero(mask_T)
    return Batch(
        input_ids_T=torch.from_numpy(ids_T),
        cu_seqlens=cu_seqlens,
        position_ids_T=torch.from_numpy(np.concatenate([np.arange(i.size) for i in ids])),
        loss_index_L=torch.from_numpy(targets - 1),
        targets_L=torch.from_numpy(ids_T[targets]),
        rows=list(range(len(ids))) if rows is None else list(rows),
    )


class Steps:
    """The steps of a run, in order: `steps[k]` is the batch of step k, from 0.

    Each epoch visits every sample once, in an order of its own. A step is filled with whole samples
    in that order for as long as they fit, and never reaches into the next epoch.
    """

    def __init__(
        self,
        samples: Samples,
        tokens_per_step: int,
        *,
        epochs: int | None,
        max_steps: int | None,
        seed: int,
        shuffle: bool,
    ):
        self._samples = samples
        self._seed = seed
        self._shuffle = shuffle
        self._lengths = np.asarray(samples.lengths, dtype=np.int64)
        self._cached: tuple[int, NDArray[np.int64]] | None = None
        #: For each epoch, where its steps begin in its order; ends with the number of samples.
        self._starts: list[NDArray[np.int64]] = []
        steps = 0
        for epoch in count():
            if (epochs is not None and epoch >= epochs) or (
                max_steps is not None and steps >= max_steps
            ):
                break
            starts = fill(self._lengths[self._order(epoch)], tokens_per_step)
            self._starts.append(starts)
            steps += len(starts) - 1
        self._len = steps if max_steps is None else min(steps, max_steps)

    def __len__(self) -> int:
        return self._len

    def __getitem__(self, step: int) -> Batch:
        if not 0 <= step < self._len:
            raise IndexError(step)
        epoch, k = self._place(step)
        starts = self._starts[epoch]
        chosen = [self._samples[int(i)] for i in self._order(epoch)[starts[k] : starts[k + 1]]]
        return make_batch(
            [(sample.input_ids, sample.loss_mask) for sample in chosen],
            [sample.row for sample in chosen],
        )

    def __iter__(self) -> Iterator[Batch]:
        return self.start_at(0)

    def start_at(self, step: int) -> Iterator[Batch]:
        """The batches from `step` on."""
        return (self[k] for k in range(step, self._len))

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that a step belongs to."""
        return self._place(step)[0]

    def progress(self, step: int) -> float:
        """How many epochs are done when `step` is, e.g. 1.25."""
        epoch, k = self._place(step)
        return epoch + float(self._starts[epoch][k + 1]) / len(self._lengths)

    @cached_property
    def steps_per_epoch(self) -> int:
        """Steps of the first epoch; others may differ by a few, since samples fall otherwise."""
        return len(self._starts[0]) - 1

    def _place(self, step: int) -> tuple[int, int]:
        for epoch, starts in enumerate(self._starts):
            if step < len(starts) - 1:
                return epoch, step
            step -= len(starts) - 1
        raise IndexError(step)

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if self._cached is None or self._cached[0] != epoch:
            size = len(self._lengths)
            order = shuffled(size, self._seed, epoch) if self._shuffle else np.arange(size)
            self._cached = (epoch, order)
        return self._cached[1]


def plan_steps(
    samples: Samples,
    tokens_per_step: int,
    *,
    epochs: int | None = None,
    max_steps: int | None = None,
    seed: int = 0,
    shuffle: bool = True,
) -> Steps:
    """The steps of a run over `samples`.

    Args:
        tokens_per_step: the most tokens that a step may hold.
        epochs: how often each sample is seen. With `max_steps` too, whichever ends first.
        max_steps: how many steps; without `epochs` the samples come round as often as needed.

    Raises:
        DataError: there is no sample, or one is longer than a step.
        ValueError: neither `epochs` nor `max_steps` is given.
    """
    if epochs is None and max_steps is None:
        raise ValueError("plan_steps needs epochs or max_steps")
    lengths = np.asarray(samples.lengths)
    if not len(lengths):
        raise DataError("There is nothing to train on: the data has no samples.")
    too_long = np.flatnonzero(lengths > tokens_per_step)
    if len(too_long):
        named = [
            f"Row {samples[int(i)].row + 1} has {int(lengths[i])} tokens." for i in too_long[:10]
        ]
        if len(too_long) > len(named):
            named.append(f"... and {len(too_long) - len(named)} more.")
        raise DataError(
            f"tokens_per_step is {tokens_per_step}, but {len(too_long)} of {len(lengths)} samples "
            f"have more tokens than that.",
            problems=named,
            hint=f"Set tokens_per_step to at least {int(lengths.max())}, or lower max_length.",
        )
    return Steps(
        samples, tokens_per_step, epochs=epochs, max_steps=max_steps, seed=seed, shuffle=shuffle
    )
