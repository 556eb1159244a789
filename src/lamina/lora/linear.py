"""A frozen matrix with a LoRA adapter: `y = x W^T + s drop(x) A^T B^T`.

Written as one autograd function, so that the backward keeps `x` and nothing else, and so that a
recompute can leave out an output that no gradient needs. `reference` is the same in plain PyTorch;
a test holds the two together.

Shapes: T = tokens, I = in features, O = out features, R = rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Dropout:
    """LoRA dropout whose mask can be drawn again: it follows from the seed alone.

    Args:
        p: the probability that an input is zeroed.
        seed: names the place (step, block, matrix, group of tokens) that the mask is for.
    """

    p: float
    seed: int

    def mask(self, like: Tensor) -> Tensor:
        """Zeros and `1 / (1 - p)`, of the shape, type and device of `like`."""
        generator = torch.Generator(like.device).manual_seed(self.seed)
        keep = torch.rand(like.shape, generator=generator, device=like.device) >= self.p
        return keep.to(like.dtype).div_(1 - self.p)


@dataclass(frozen=True)
class Pair:
    """An adapter's two factors, `a [R, I]` and `b [O, R]`, and what their product is scaled by."""

    a: Tensor
    b: Tensor
    scaling: float
    dropout: Dropout | None = None


def reference(x_TI: Tensor, w_OI: Tensor, pair: Pair | None) -> Tensor:
    """The readable definition, `[T, O]`."""
    y_TO = F.linear(x_TI, w_OI)
    if pair is None:
        return y_TO
    dropped_TI = x_TI * pair.dropout.mask(x_TI) if pair.dropout else x_TI
    a, b = pair.a.to(x_TI.dtype), pair.b.to(x_TI.dtype)
    return y_TO + pair.scaling * F.linear(F.linear(dropped_TI, a), b)


def lora_linear(x_TI: Tensor, w_OI: Tensor, pair: Pair | None, *, skip_output: bool) -> Tensor:
    """`x [..., I] -> [..., O]`.

    Args:
        skip_output: return zeros: the caller is a recompute, and the output's value isn't needed.
    """
    if not torch.is_grad_enabled():
        return _forward(x_TI, w_OI, pair)
    tensors = (pair.a, pair.b) if pair is not None else (None, None)
    output: Tensor = _LoraLinear.apply(x_TI, w_OI, *tensors, pair, skip_output)  # type: ignore[no-untyped-call]
    return output


def _forward(x_TI: Tensor, w_OI: Tensor, pair: Pair | None) -> Tensor:
    y_TO = F.linear(x_TI, w_OI)
    if pair is not None:
        dropped_TI = x_TI * pair.dropout.mask(x_TI) if pair.dropout else x_TI
        z_TR = dropped_TI @ pair.a.to(x_TI.dtype).T
        y_TO.addmm_(z_TR, pair.b.to(x_TI.dtype).T, alpha=pair.scaling)
    return y_TO


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        w_OI: Tensor,
        a_RI: Tensor | None,
        b_OR: Tensor | None,
        pair: Pair | None,
        skip_output: bool,
    ) -> Tensor:
        # x is kept only where a gradient of the factors needs it. The factors are arguments for
        # autograd's sake; the backward finds them in the pair.
        ctx.save_for_backward(x_TI if pair is not None else None, w_OI)
        ctx.pair = pair
        if skip_output:
            return x_TI.new_zeros(()).expand(*x_TI.shape[:-1], w_OI.shape[0])
        return _forward(x_TI, w_OI, pair)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_TO,) = grads
        x_TI, w_OI = ctx.saved_tensors
        pair: Pair | None = ctx.pair
        dx_TI = dy_TO @ w_OI if ctx.needs_input_grad[0] else None
        if pair is None:
            return dx_TI, None, None, None, None, None
        dz_TR, da_RI, db_OR = factor_gradients(x_TI, dy_TO, pair)
        if dx_TI is not None:
            add_input_gradient(dx_TI, dz_TR, pair)
        return dx_TI, None, da_RI, db_OR, None, None


def factor_gradients(x_TI: Tensor, dy_TO: Tensor, pair: Pair) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of an adapter's factors from its input and its output's gradient.

    Returns:
        the gradient `[T, R]` of `drop(x) A^T`, and the gradients of `a` and `b` in their own type.
    """
    a, b = pair.a.to(x_TI.dtype), pair.b.to(x_TI.dtype)
    dropped_TI = x_TI * pair.dropout.mask(x_TI) if pair.dropout else x_TI
    dz_TR = (dy_TO @ b).mul_(pair.scaling)
    da_RI = (dz_TR.T @ dropped_TI).to(pair.a.dtype)
    db_OR = (dy_TO.T @ (dropped_TI @ a.T)).to(pair.b.dtype).mul_(pair.scaling)
    return dz_TR, da_RI, db_OR


def add_input_gradient(dx_TI: Tensor, dz_TR: Tensor, pair: Pair) -> None:
    """Add the adapter's share `mask * (dz A)` of the input's gradient to `dx`, in place."""
    a = pair.a.to(dx_TI.dtype)
    if pair.dropout is None:
        dx_TI.addmm_(dz_TR, a)
    else:
        dx_TI.add_((dz_TR @ a).mul_(pair.dropout.mask(dx_TI)))
