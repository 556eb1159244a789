"""Matrices in nf4, and products with them in plain PyTorch: what the kernels must agree with.

The packing is the store's (`store/codec.py`): the flattened matrix in blocks of 64 with a bf16
scale each, two weights a byte, the first of them in the high half.

Shapes: E = experts, O = out features, I = in features, N = O * I, G = blocks of 64 weights,
P = rows of all experts, those of expert 0 first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise

import torch
from torch import Tensor

NF4_BLOCK = 64

#: The 16 levels of NF4 (QLoRA, arXiv:2305.14314, appendix E), as float32 like bitsandbytes.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

#: Weights that `decode_flat` works on at once: 8 MiB of fp32.
_CHUNK = 1 << 21


@dataclass(frozen=True)
class Nf4:
    """A matrix `[O, I]`, or the same matrix of E experts.

    Args:
        codes: uint8, `[ceil(N/2)]` or `[E, ceil(N/2)]`; an expert's are contiguous, experts may lie
            apart (as they do in a stretch of a store).
        absmax: bf16, `[G]` or `[E, G]`, likewise.
        out_features, in_features: O and I.

    Raises:
        ValueError: types, shapes or strides are others.
    """

    codes: Tensor
    absmax: Tensor
    out_features: int
    in_features: int

    def __post_init__(self) -> None:
        n = self.out_features * self.in_features
        nbytes, blocks = -(-n // 2), -(-n // NF4_BLOCK)
        stack = tuple(self.codes.shape[:-1])
        if len(stack) > 1 or tuple(self.codes.shape) != (*stack, nbytes):
            raise ValueError(f"codes are {tuple(self.codes.shape)}, needed is {(*stack, nbytes)}")
        if tuple(self.absmax.shape) != (*stack, blocks):
            raise ValueError(f"absmax is {tuple(self.absmax.shape)}, needed is {(*stack, blocks)}")
        if self.codes.dtype != torch.uint8 or self.absmax.dtype != torch.bfloat16:
            types = f"{self.codes.dtype} and {self.absmax.dtype}"
            raise ValueError(f"{types} aren't uint8 and bfloat16")
        if (nbytes > 1 and self.codes.stride(-1) != 1) or (
            blocks > 1 and self.absmax.stride(-1) != 1
        ):
            raise ValueError("the codes and the scales of a matrix must each be contiguous")
        if n >= 1 << 31:
            raise ValueError(f"{n} weights are more than the kernels' 32-bit offsets reach")

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def num_experts(self) -> int | None:
        """E, or None for a single matrix."""
        return self.codes.shape[0] if self.codes.dim() == 2 else None

    @property
    def shape(self) -> tuple[int, ...]:
        """`(O, I)` or `(E, O, I)`."""
        return (*self.codes.shape[:-1], self.out_features, self.in_features)

    def expert(self, e: int) -> Nf4:
        """One expert's matrix, as a view."""
        return Nf4(self.codes[e], self.absmax[e], self.out_features, self.in_features)


@dataclass(frozen=True)
class Groups:
    """How many rows each expert has, in the order of the experts; some may have none.

    Args:
        counts: the rows of each expert.
        offsets: int32 `[E + 1]` on the rows' device: where each expert's rows begin, and the end.
    """

    counts: tuple[int, ...]
    offsets: Tensor

    @classmethod
    def of(cls, counts: Sequence[int], device: torch.device | str) -> Groups:
        """Built once for all products over the same rows: it brings the offsets to the device."""
        offsets = torch.tensor([0, *accumulate(counts)], dtype=torch.int32)
        return cls(tuple(counts), offsets.to(device, non_blocking=True))

    @property
    def num_rows(self) -> int:
        return sum(self.counts)

    @property
    def slices(self) -> list[slice]:
        """Each expert's rows."""
        return [slice(start, stop) for start, stop in pairwise([0, *accumulate(self.counts)])]


@lru_cache
def levels(device: torch.device) -> Tensor:
    """The code book on a device, fp32 `[16]`."""
    return torch.tensor(NF4_LEVELS, dtype=torch.float32, device=device)


@lru_cache
def _pairs(device: torch.device) -> Tensor:
    """The two levels of each byte, `[256, 2]`."""
    byte = torch.arange(256, device=device)
    return torch.stack([levels(device)[byte >> 4], levels(device)[byte & 15]], dim=1)


def decode_flat(codes: Tensor, absmax_G: Tensor, out_N: Tensor) -> None:
    """Level times scale in fp32, rounded to the type of `out_N`, into it."""
    for start in range(0, out_N.numel(), _CHUNK):
        part_N = out_N[start : start + _CHUNK]
        n, first = part_N.numel(), start // NF4_BLOCK
        part = codes[start // 2 : -(-(start + n) // 2)]
        scales_G = absmax_G[first : first + -(-n // NF4_BLOCK)].float()
        values_N = _pairs(codes.device).index_select(0, part.int()).view(-1)
        whole = n - n % NF4_BLOCK
        values_N[:whole].view(-1, NF4_BLOCK).mul_(scales_G[: whole // NF4_BLOCK, None])
        if whole < n:
            values_N[whole:n].mul_(scales_G[-1])
        part_N.copy_(values_N[:n])


def reference_dequantize(weight: Nf4, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights, `[O, I]` or `[E, O, I]`."""
    out = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    stack = weight.codes.shape[:-1]
    rows = math.prod(stack)
    codes, absmax = weight.codes.reshape(rows, -1), weight.absmax.reshape(rows, -1)
    for e, flat_N in enumerate(out.view(rows, -1)):
        decode_flat(codes[e], absmax[e], flat_N)
    return out


def reference_linear(x_PI: Tensor, weight: Nf4, groups: Groups | None = None) -> Tensor:
    """`x @ W^T`, `[P, O]`, with weights rounded to the type of `x`, accumulated in fp32."""
    w = reference_dequantize(weight, x_PI.dtype).float()
    if groups is None:
        return (x_PI.float() @ w.T).to(x_PI.dtype)
    parts = [x_PI[rows].float() @ w[e].T for e, rows in enumerate(groups.slices)]
    return torch.cat(parts).to(x_PI.dtype)


def reference_input_grad(dy_PO: Tensor, weight: Nf4, groups: Groups | None = None) -> Tensor:
    """`dy @ W`, `[P, I]`, likewise."""
    w = reference_dequantize(weight, dy_PO.dtype).float()
    if groups is None:
        return (dy_PO.float() @ w).to(dy_PO.dtype)
    parts = [dy_PO[rows].float() @ w[e] for e, rows in enumerate(groups.slices)]
    return torch.cat(parts).to(dy_PO.dtype)
