"""The inputs of the blocks, kept in host memory from a step's forward to its backward.

They lie in one slab that is allocated once and grows only when a step brings more tokens. Kept as
tensors of their own they would lie between the temporaries of the blocks, and the holes that these
leave cost half of the process's memory, or a third of its time where they are given back
(docs/log.md).
"""

from __future__ import annotations

import torch
from torch import Tensor

from lamina.store.reader import aligned_buffer


class Boundaries:
    """Block inputs `[T, H]`, by their place in the walk.

    Args:
        count: how many blocks.
        device: where the blocks run; `take` brings a boundary there.
    """

    def __init__(self, count: int, device: torch.device):
        self._count = count
        self._device = device
        self._slab_NTH: Tensor | None = None

    def put(self, place: int, x_TH: Tensor) -> None:
        """Keep a block's input."""
        slab_NTH = self._slab_NTH
        if slab_NTH is None or slab_NTH.dtype != x_TH.dtype or slab_NTH.shape[1] < len(x_TH):
            # A step's first boundary: none of this step's is lost.
            self._slab_NTH = slab_NTH = _allocated(
                (self._count, *x_TH.shape), x_TH.dtype, pinned=self._device.type == "cuda"
            )
        slab_NTH[place, : len(x_TH)].copy_(x_TH)

    def take(self, place: int, tokens: int) -> Tensor:
        """A block's input again; on CPU it is a view, not to be written into."""
        assert self._slab_NTH is not None
        return self._slab_NTH[place, :tokens].to(self._device)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return 0 if self._slab_NTH is None else self._slab_NTH.nbytes


def _allocated(shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool) -> Tensor:
    if pinned:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    return aligned_buffer(nbytes).view(dtype).view(shape)
