"""Random nf4 matrices for the tests of their products."""

from __future__ import annotations

import torch
from torch import Tensor

from lamina.kernels.nf4 import Nf4


def random_weight(
    out_features: int,
    in_features: int,
    experts: int | None = None,
    *,
    seed: int = 0,
    apart: int = 0,
    device: str = "cpu",
) -> Nf4:
    """Any codes, with scales that make products of about unit size.

    Args:
        apart: bytes between two experts' codes, and between their scales.
    """
    generator = torch.Generator().manual_seed(seed)
    n = out_features * in_features
    nbytes, blocks = -(-n // 2), -(-n // 64)
    stack = experts or 1
    codes = torch.randint(0, 256, (stack, nbytes + apart), generator=generator).to(torch.uint8)
    scales = torch.rand(stack, blocks + apart // 2, generator=generator) + 0.5
    absmax = (scales * 2 / in_features**0.5).bfloat16()
    codes, absmax = codes.to(device)[:, :nbytes], absmax.to(device)[:, :blocks]
    if experts is None:
        codes, absmax = codes[0], absmax[0]
    return Nf4(codes, absmax, out_features, in_features)


def random_rows(
    rows: int, features: int, dtype: torch.dtype, *, seed: int = 1, device: str = "cpu"
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, features, generator=generator).to(dtype).to(device)


def distance(a: Tensor, b: Tensor) -> float:
    """`||a - b|| / ||b||`; NaN never passes a comparison."""
    if not b.numel():
        return 0.0
    return float((a.double() - b.double()).norm() / b.double().norm())
