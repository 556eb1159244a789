"""The inputs of the blocks, kept in host memory from a step's forward to its backward.

They lie in one slab that is allocated once and grows only when a step brings more tokens. Kept as
tensors of their own they would lie between the temporaries of the blocks, and the holes that these
leave cost half of the process's memory, or a third of its time where they are given back
(docs/log.md).

As float8 (e4m3, arXiv 2209.05433, with a scale a token) they take half the memory; a block's
gradients are then those at an input that is a few percent off in each element.
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
        float8: whether they are kept as float8.
    """

    def __init__(self, count: int, device: torch.device, *, float8: bool = False):
        self._count = count
        self._device = device
        self._float8 = float8
        self._dtype = torch.float32
        self._slab_NTH: Tensor | None = None
        self._scale_NT1: Tensor | None = None

    def put(self, place: int, x_TH: Tensor) -> None:
        """Keep a block's input."""
        self._dtype = x_TH.dtype
        kept_dtype = torch.float8_e4m3fn if self._float8 else x_TH.dtype
        slab_NTH = self._slab_NTH
        if slab_NTH is None or slab_NTH.dtype != kept_dtype or slab_NTH.shape[1] < len(x_TH):
            # A step's first boundary: none of this step's is lost.
            pinned = self._device.type == "cuda"
            shape = (self._count, *x_TH.shape)
            self._slab_NTH = slab_NTH = _allocated(shape, kept_dtype, pinned=pinned)
            if self._float8:
                shape = (self._count, len(x_TH), 1)
                self._scale_NT1 = _allocated(shape, torch.float32, pinned=pinned)
        if self._scale_NT1 is not None:
            scale_T1 = x_TH.abs().amax(-1, keepdim=True).float() / _FLOAT8_MAX
            scale_T1.clamp_(min=torch.finfo(torch.float32).tiny)
            self._scale_NT1[place, : len(x_TH)].copy_(scale_T1)
            x_TH = (x_TH.float() / scale_T1).to(kept_dtype)
        slab_NTH[place, : len(x_TH)].copy_(x_TH)

    def take(self, place: int, tokens: int) -> Tensor:
        """A block's input again; on CPU it may be a view, not to be written into."""
        assert self._slab_NTH is not None
        x_TH = self._slab_NTH[place, :tokens].to(self._device)
        if self._scale_NT1 is None:
            return x_TH
        return (x_TH.float() * self._scale_NT1[place, :tokens].to(self._device)).to(self._dtype)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(t.nbytes for t in (self._slab_NTH, self._scale_NT1) if t is not None)


_FLOAT8_MAX = torch.finfo(torch.float8_e4m3fn).max


def _allocated(shape: tuple[int, ...], dtype: torch.dtype, *, pinned: bool) -> Tensor:
    if pinned:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    nbytes = torch.Size(shape).numel() * dtype.itemsize
    return aligned_buffer(nbytes).view(dtype).view(shape)
