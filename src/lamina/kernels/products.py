"""Products with nf4 weights: which way each is computed.

There are two ways. *Fused*: a Triton kernel decodes the weights in its main loop; they are never
materialized, and each is decoded anew for every tile of rows. *Dequantize*: the weights are written
out once, and the vendor's matrix product reads them (`torch.nn.functional.grouped_mm` for several
experts at once, where their weights fit the workspace; otherwise one expert after the other).

The rule (`choose`): fused, where Triton runs, up to `MOST_FUSED_ROWS` rows an expert. Writing and
reading a bf16 weight takes about 5 bytes of memory traffic, and a row's product with it 2
floating-point operations; with a matrix rate R, a memory rate M and a fused kernel at a part f of
R, the ways are even at `2.5 R / M * f / (1 - f)` rows: 600 to 900 where R / M is 170 to 230 and f
0.6 to 0.65. That is an estimate; `bench/gpu.py` measures both ways.
"""

from __future__ import annotations

import importlib.util
import math
from functools import lru_cache
from types import ModuleType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.kernels.nf4 import Groups, Nf4, decode_flat

__all__ = [
    "MOST_FUSED_ROWS",
    "Way",
    "choose",
    "dequantize",
    "fused_runs_on",
    "input_grad",
    "linear",
]

Way = Literal["fused", "dequantize"]

#: From more rows an expert on, weights are written out for the vendor's product.
MOST_FUSED_ROWS = 512


@lru_cache
def _kernels() -> ModuleType | None:
    """The Triton kernels, where Triton is installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    from lamina.kernels import triton_nf4

    return triton_nf4


@lru_cache
def fused_runs_on(device: torch.device) -> bool:
    """Whether the Triton kernels run there: on NVIDIA cards from sm_80 on, or interpreted."""
    kernels = _kernels()
    if kernels is None:
        return False
    if device.type == "cuda" and torch.version.hip is None:
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return bool(kernels.INTERPRETED)


def choose(x: Tensor, groups: Groups | None) -> Way:
    """The way that is likely the faster one, for rows `x`. Interpreted kernels are only for tests:
    they run where they are asked for."""
    if x.device.type != "cuda" or not fused_runs_on(x.device):
        return "dequantize"
    busy = sum(count > 0 for count in groups.counts) if groups is not None else 1
    return "fused" if x.shape[0] <= MOST_FUSED_ROWS * busy else "dequantize"


def dequantize(weight: Nf4, out: Tensor) -> Tensor:
    """The weights, written into `out` and returned: level times scale, rounded once.

    Args:
        out: contiguous, `[O, I]` or `[E, O, I]`, of any float type.

    Raises:
        ValueError: `out` doesn't fit.
    """
    if tuple(out.shape) != weight.shape or not out.is_contiguous():
        raise ValueError(f"out is {tuple(out.shape)}, needed is a contiguous {weight.shape}")
    kernels = _kernels()
    if kernels is not None and weight.device.type == "cuda" and fused_runs_on(weight.device):
        kernels.decode(weight, out)
    elif weight.num_experts is None:
        decode_flat(weight.codes, weight.absmax, out.view(-1))
    else:
        for e in range(weight.num_experts):
            decode_flat(weight.codes[e], weight.absmax[e], out[e].view(-1))
    return out


def linear(
    x_PI: Tensor,
    weight: Nf4,
    groups: Groups | None = None,
    *,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    way: Way | None = None,
) -> Tensor:
    """`x @ W^T`, `[P, O]`, accumulated in fp32. No autograd.

    Args:
        x_PI: bf16 or fp32, its rows contiguous; P may be 0.
        groups: each expert's rows, for a stack of experts; None for a single matrix.
        out: where to write the product, of the type of `x`.
        workspace: one-dimensional, of the type of `x`: where weights may be written out. Fresh
            memory for one expert is taken where it is too small or None.
        way: instead of the one that `choose` gives.

    Raises:
        ValueError: shapes or types don't fit.
    """
    return _product(x_PI, weight, groups, out, workspace, way, gradient=False)


def input_grad(
    dy_PO: Tensor,
    weight: Nf4,
    groups: Groups | None = None,
    *,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
    way: Way | None = None,
) -> Tensor:
    """`dy @ W`, `[P, I]`: the gradient of the input of `linear`, whose arguments these are."""
    return _product(dy_PO, weight, groups, out, workspace, way, gradient=True)


def _product(
    x: Tensor,
    weight: Nf4,
    groups: Groups | None,
    out: Tensor | None,
    workspace: Tensor | None,
    way: Way | None,
    *,
    gradient: bool,
) -> Tensor:
    _check(x, weight, groups, out, gradient)
    way = way or choose(x, groups)
    if way == "dequantize":
        return _dequantized_product(x, weight, groups, out, workspace, gradient=gradient)
    kernels = _kernels()
    if kernels is None or not fused_runs_on(x.device):
        raise ValueError(f"Triton's kernels don't run on {x.device}")
    if out is None:
        out = x.new_empty(_out_shape(x, weight, gradient))
    # The kernel reads rows; what lies between them doesn't matter.
    kernels.product(
        x if x.stride(-1) == 1 else x.contiguous(), weight, groups, out, gradient=gradient
    )
    return out


def _out_shape(x: Tensor, weight: Nf4, gradient: bool) -> tuple[int, int]:
    return (x.shape[0], weight.in_features if gradient else weight.out_features)


def _check(
    x: Tensor, weight: Nf4, groups: Groups | None, out: Tensor | None, gradient: bool
) -> None:
    summed = weight.out_features if gradient else weight.in_features
    if x.dim() != 2 or x.shape[1] != summed:
        raise ValueError(f"rows are {tuple(x.shape)}, needed is [P, {summed}]")
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"rows are {x.dtype}, needed is bfloat16 or float32")
    if (groups is None) != (weight.num_experts is None):
        raise ValueError("a stack of experts needs groups of rows, and a single matrix has none")
    if groups is not None and (
        len(groups.counts) != weight.num_experts or groups.num_rows != x.shape[0]
    ):
        raise ValueError(
            f"groups are of {len(groups.counts)} experts and {groups.num_rows} rows, there are "
            f"{weight.num_experts} and {x.shape[0]}"
        )
    shape = _out_shape(x, weight, gradient)
    if out is not None and (
        tuple(out.shape) != shape or out.dtype != x.dtype or out.stride(-1) != 1
    ):
        raise ValueError(f"out is {tuple(out.shape)} {out.dtype}, needed is {shape} {x.dtype}")


def _dequantized_product(
    x: Tensor,
    weight: Nf4,
    groups: Groups | None,
    out: Tensor | None,
    workspace: Tensor | None,
    *,
    gradient: bool,
) -> Tensor:
    if groups is not None and _groups_at_once(x, weight, workspace):
        assert workspace is not None
        w = dequantize(weight, workspace[: math.prod(weight.shape)].view(weight.shape))
        w = w if gradient else w.transpose(1, 2)
        y = F.grouped_mm(x, w, offs=groups.offsets[1:])
        return y if out is None else out.copy_(y)
    if out is None:
        out = x.new_empty(_out_shape(x, weight, gradient))
    size = weight.out_features * weight.in_features
    if workspace is None or workspace.numel() < size:
        workspace = x.new_empty(size)
    w_OI = workspace[:size].view(weight.out_features, weight.in_features)
    experts = [(weight, slice(0, x.shape[0]))]
    if groups is not None:
        experts = [(weight.expert(e), rows) for e, rows in enumerate(groups.slices)]
    for one, rows in experts:
        if rows.start < rows.stop:
            dequantize(one, w_OI)
            torch.mm(x[rows], w_OI if gradient else w_OI.T, out=out[rows])
    return out


def _groups_at_once(x: Tensor, weight: Nf4, workspace: Tensor | None) -> bool:
    """Whether `grouped_mm` takes these (it wants bf16, and rows in multiples of 16 bytes) and the
    workspace holds all the weights."""
    return (
        hasattr(F, "grouped_mm")
        and x.dtype == torch.bfloat16
        and x.shape[0] > 0
        and x.stride(0) % 8 == 0
        and x.stride(1) == 1
        and weight.in_features % 8 == 0
        and weight.out_features % 8 == 0
        and workspace is not None
        and workspace.numel() >= math.prod(weight.shape)
    )
