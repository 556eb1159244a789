"""What the engine asks of its weights, and weights that are simply there.

`engine/streamed.py` gives the same from a store, so that streamed training can be compared with
resident training bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol

from torch import Tensor

from lamina.lora.experts import ExpertWeights
from lamina.models.spec import Block
from lamina.store.stream import StreamStats

#: A forward over all blocks, or a forward and the backward over the same blocks reversed.
Walk = Literal["forward", "step"]


class WeightSource(Protocol):
    """Gives a block's weights for as long as a context lasts, in the compute type."""

    def begin(self, walk: Walk, *, then: Walk | None) -> None:
        """A walk over the blocks begins, and `then` will follow it: its reads may start early."""
        ...

    @property
    def store_bytes(self) -> int:
        """What reading every weight once reads."""
        ...

    def take_stats(self) -> StreamStats:
        """What was read, and waited for, since the last call."""
        ...

    def routed(self, block: Block, experts: Sequence[int]) -> None:
        """These of a block's experts will be taken, in this order."""
        ...

    def dense(self, block: Block) -> AbstractContextManager[Mapping[str, Tensor]]:
        """A block's norms, router and matrices, by name."""
        ...

    def expert(self, block: Block, expert: int) -> AbstractContextManager[ExpertWeights]:
        """One of its routed experts."""
        ...


class ResidentSource:
    """Weights that are all in memory.

    Args:
        dense: block name -> tensors by name.
        experts: block name -> its experts.
    """

    def __init__(
        self,
        dense: Mapping[str, Mapping[str, Tensor]],
        experts: Mapping[str, list[ExpertWeights]],
    ):
        self._dense = dense
        self._experts = experts

    def begin(self, walk: Walk, *, then: Walk | None) -> None:
        pass

    @property
    def store_bytes(self) -> int:
        return 0

    def take_stats(self) -> StreamStats:
        return StreamStats()

    def routed(self, block: Block, experts: Sequence[int]) -> None:
        pass

    def dense(self, block: Block) -> AbstractContextManager[Mapping[str, Tensor]]:
        return nullcontext(self._dense[block.name])

    def expert(self, block: Block, expert: int) -> AbstractContextManager[ExpertWeights]:
        return nullcontext(self._experts[block.name][expert])
