"""The inputs of the blocks, kept in host memory from a step's forward to its backward."""

from __future__ import annotations

import torch
from torch import Tensor


class Boundaries:
    """Block inputs `[T, H]` by block name; `take` gives one back and forgets it."""

    def __init__(self, device: torch.device):
        self._device = device
        self._kept: dict[str, Tensor] = {}

    def put(self, block: str, x_TH: Tensor) -> None:
        """Keep a block's input. The engine never writes into it afterwards, so on CPU it is kept as
        it is."""
        self._kept[block] = x_TH.to("cpu", non_blocking=False)

    def take(self, block: str) -> Tensor:
        return self._kept.pop(block).to(self._device)

    @property
    def nbytes(self) -> int:
        """Bytes kept now."""
        return sum(x.numel() * x.element_size() for x in self._kept.values())
