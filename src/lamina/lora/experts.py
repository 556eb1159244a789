"""Routed experts with LoRA, expert-major: one expert at a time over all tokens routed to it.

In the forward each expert is visited once, and in the backward once more: the visit recomputes the
expert's activations and takes all its gradients, so that its weights are needed once. The recompute
leaves out the down projection, whose value no gradient needs: the gradient of a routing weight is
`<dy, y> = <dy, D h> = <D^T dy, h>`, and `D^T dy` is the gradient of `h`, which is there anyway.

Shapes: T = tokens, K = experts a token goes to, P = one expert's tokens (tensors that end in `_PH`
and the like may have further rows of zeros), H = hidden size, I = intermediate size, F = 2I (gate,
then up), E = experts, R = rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.lora.linear import Dropout, Pair, add_input_gradient, factor_gradients


@dataclass(frozen=True)
class ExpertWeights:
    """One expert: `gate_up_FH` (gate first) and `down_HI`."""

    gate_up_FH: Tensor
    down_HI: Tensor


#: Gives an expert's weights for as long as the context lasts.
Take = Callable[[int], AbstractContextManager[ExpertWeights]]


@dataclass(frozen=True)
class StackedPair:
    """The adapters of one projection of all experts: `a [E, R, in]`, `b [E, out, R]`, with
    gradients of the same shapes that a backward adds to. They may be on another device than the
    experts' tokens."""

    a: Tensor
    b: Tensor
    scaling: float
    dropout: float = 0.0

    def pair(self, expert: int, seed: int, device: torch.device) -> Pair:
        """One expert's adapter, on `device`."""
        dropout = Dropout(self.dropout, seed + expert) if self.dropout else None
        a, b = self.a[expert].to(device), self.b[expert].to(device)
        return Pair(a, b, self.scaling, dropout)

    def accumulate(self, expert: int, da: Tensor, db: Tensor) -> None:
        if self.a.grad is None:
            self.a.grad = torch.zeros_like(self.a)
        if self.b.grad is None:
            self.b.grad = torch.zeros_like(self.b)
        self.a.grad[expert] += da.to(self.a.grad.device)
        self.b.grad[expert] += db.to(self.b.grad.device)


@dataclass(frozen=True)
class ExpertsLora:
    """The adapters of a block's experts; `seed` names the step and the block, for dropout.

    gate and up share one `a`, as they share one parameter in transformers and PEFT.
    """

    gate_up: StackedPair | None = None
    down: StackedPair | None = None
    seed: int = 0

    def pairs(self, expert: int, device: torch.device) -> tuple[Pair | None, Pair | None]:
        # Two seeds an expert, so that the masks of its two projections are independent.
        return (
            self.gate_up.pair(expert, 2 * self.seed, device) if self.gate_up else None,
            self.down.pair(expert, 2 * self.seed + 1_000_003, device) if self.down else None,
        )


@dataclass(frozen=True)
class Dispatch:
    """Which tokens go to which expert.

    Args:
        token_P, slot_P: for all choices, sorted by expert: the token, and which of its K choices.
        ranges: expert -> its part of those, for experts that have tokens.
    """

    token_P: Tensor
    slot_P: Tensor
    ranges: dict[int, slice]

    @classmethod
    def of(cls, indices_TK: Tensor, num_experts: int) -> Dispatch:
        flat = indices_TK.flatten()
        order = torch.argsort(flat, stable=True)
        counts = torch.bincount(flat, minlength=num_experts).tolist()
        ranges, start = {}, 0
        for expert, count in enumerate(counts):
            if count:
                ranges[expert] = slice(start, start + count)
            start += count
        top_k = indices_TK.shape[1]
        return cls(order // top_k, order % top_k, ranges)


#: An expert's tokens are filled up with rows of zeros to a multiple of this: oneDNN compiles a
#: kernel for each new shape (1 ms, 0.6 MB), and token counts are hardly ever the same. A row of
#: zeros gives zeros, forward and backward.
_ROWS = 64

#: What the seeds of two parts of an expert's tokens differ by.
_PART_SEED = 1 << 40


def _parts(where: slice, most: int) -> Iterator[slice]:
    """A range in parts of about one size, at most `most` each: little memory, and few shapes."""
    count = where.stop - where.start
    size = -(-count // -(-count // most))
    if size > _ROWS:
        size = min(-(-size // _ROWS) * _ROWS, most)
    for start in range(where.start, where.stop, size):
        yield slice(start, min(start + size, where.stop))


def _gathered(x_TH: Tensor, token_P: Tensor) -> Tensor:
    """One expert's rows of `x`, filled up with zeros: `[at least P, H]`."""
    count = token_P.numel()
    rows = -(-count // _ROWS) * _ROWS if count > _ROWS else count
    if rows == count:
        return x_TH[token_P]
    out = x_TH.new_empty(rows, x_TH.shape[1])
    torch.index_select(x_TH, 0, token_P, out=out[:count])
    out[count:] = 0
    return out


def _weights_of(weights_TK: Tensor, token_P: Tensor, slot_P: Tensor, rows: int) -> Tensor:
    """Its tokens' routing weights `[rows, 1]`, filled up with zeros."""
    out = weights_TK.new_zeros(rows, 1)
    out[: token_P.numel(), 0] = weights_TK[token_P, slot_P]
    return out


def _of_part(pair: Pair | None, number: int) -> Pair | None:
    """The adapter as a part of an expert's tokens sees it: with a dropout mask of its own."""
    if pair is None or pair.dropout is None:
        return pair
    dropout = Dropout(pair.dropout.p, pair.dropout.seed + _PART_SEED * number)
    return Pair(pair.a, pair.b, pair.scaling, dropout)


def _add_adapter(y: Tensor, x: Tensor, pair: Pair | None) -> Tensor:
    if pair is None:
        return y
    dropped = x * pair.dropout.mask(x) if pair.dropout else x
    z = dropped @ pair.a.to(x.dtype).T
    return y.addmm_(z, pair.b.to(x.dtype).T, alpha=pair.scaling)


def experts_forward(
    x_TH: Tensor,
    dispatch: Dispatch,
    weights_TK: Tensor,
    take: Take,
    lora: ExpertsLora,
    out_TH: Tensor,
    *,
    scale_input: bool,
    most_rows: int,
) -> None:
    """Add the routed experts' outputs to `out_TH`, in place. No autograd.

    Args:
        weights_TK: the routing weights; they multiply an expert's input if `scale_input` is set,
            its output otherwise.
        most_rows: how many of an expert's tokens are worked on at once.
    """
    weights_TK = weights_TK.to(x_TH.dtype)
    for expert, where in dispatch.ranges.items():
        pairs = lora.pairs(expert, x_TH.device)
        with take(expert) as weights:
            for number, part in enumerate(_parts(where, most_rows)):
                token_P, slot_P = dispatch.token_P[part], dispatch.slot_P[part]
                gate_up_pair, down_pair = (_of_part(pair, number) for pair in pairs)
                x_PH = _gathered(x_TH, token_P)
                weight_P1 = _weights_of(weights_TK, token_P, slot_P, len(x_PH))
                if scale_input:
                    x_PH.mul_(weight_P1)
                gate_up_PF = _add_adapter(F.linear(x_PH, weights.gate_up_FH), x_PH, gate_up_pair)
                gate_PI, up_PI = gate_up_PF.chunk(2, dim=-1)
                h_PI = F.silu(gate_PI).mul_(up_PI)
                y_PH = _add_adapter(F.linear(h_PI, weights.down_HI), h_PI, down_pair)
                if not scale_input:
                    y_PH.mul_(weight_P1)
                out_TH.index_add_(0, token_P, y_PH[: len(token_P)])


def experts_backward(
    x_TH: Tensor,
    dispatch: Dispatch,
    weights_TK: Tensor,
    take: Take,
    lora: ExpertsLora,
    dout_TH: Tensor,
    *,
    scale_input: bool,
    most_rows: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of the routed experts; the adapters' are added to their `.grad`. No autograd.

    Experts are visited in falling order: what the forward read last is needed first.

    Returns:
        the gradients of `x_TH` and of `weights_TK` (fp32).
    """
    dx_TH = torch.zeros_like(x_TH)
    dweights_TK = torch.zeros_like(weights_TK, dtype=torch.float32)
    weights_TK = weights_TK.to(x_TH.dtype)
    for expert in reversed(dispatch.ranges):
        with take(expert) as weights:
            pairs = lora.pairs(expert, x_TH.device)
            for number, part in enumerate(_parts(dispatch.ranges[expert], most_rows)):
                token_P, slot_P = dispatch.token_P[part], dispatch.slot_P[part]
                x_PH, dy_PH = _gathered(x_TH, token_P), _gathered(dout_TH, token_P)
                weight_P1 = _weights_of(weights_TK, token_P, slot_P, len(x_PH))
                gate_up_pair, down_pair = (_of_part(pair, number) for pair in pairs)
                dx_PH, dweight_P = _backward_part(
                    expert,
                    weights,
                    lora,
                    (gate_up_pair, down_pair),
                    x_PH,
                    weight_P1,
                    dy_PH,
                    scale_input=scale_input,
                )
                dweights_TK[token_P, slot_P] = dweight_P[: len(token_P)]
                dx_TH.index_add_(0, token_P, dx_PH[: len(token_P)])
    return dx_TH, dweights_TK


def _backward_part(
    expert: int,
    weights: ExpertWeights,
    lora: ExpertsLora,
    pairs: tuple[Pair | None, Pair | None],
    x_PH: Tensor,
    weight_P1: Tensor,
    dy_PH: Tensor,
    *,
    scale_input: bool,
) -> tuple[Tensor, Tensor]:
    """The gradients of some of an expert's tokens and of their routing weights."""
    gate_up_pair, down_pair = pairs
    scaled_PH = x_PH * weight_P1 if scale_input else x_PH
    gate_up_PF = _add_adapter(F.linear(scaled_PH, weights.gate_up_FH), scaled_PH, gate_up_pair)
    gate_PI, up_PI = gate_up_PF.chunk(2, dim=-1)
    silu_PI = F.silu(gate_PI)
    h_PI = silu_PI * up_PI

    dh_PI = dy_PH @ weights.down_HI
    if down_pair is not None:
        # The factors' gradients see the weighted gradient, dh the unweighted one: h's own gradient
        # is needed without the weight first, for the weight's gradient.
        weighted_PH = dy_PH if scale_input else dy_PH * weight_P1
        dz_PR, da_RI, db_HR = factor_gradients(h_PI, weighted_PH, down_pair)
        assert lora.down is not None
        lora.down.accumulate(expert, da_RI, db_HR)
        if not scale_input:
            dz_PR = (dy_PH @ down_pair.b.to(dy_PH.dtype)).mul_(down_pair.scaling)
        add_input_gradient(dh_PI, dz_PR, down_pair)
    if not scale_input:
        dweight_P = (dh_PI * h_PI).sum(-1, dtype=torch.float32)
        dh_PI.mul_(weight_P1)

    dgate_up_PF = torch.empty_like(gate_up_PF)
    dgate_PI, dup_PI = dgate_up_PF.chunk(2, dim=-1)
    torch.mul(dh_PI, silu_PI, out=dup_PI)
    torch.ops.aten.silu_backward.grad_input(dh_PI.mul_(up_PI), gate_PI, grad_input=dgate_PI)
    dx_PH = dgate_up_PF @ weights.gate_up_FH
    if gate_up_pair is not None:
        dz_PR, da_RH, db_FR = factor_gradients(scaled_PH, dgate_up_PF, gate_up_pair)
        assert lora.gate_up is not None
        lora.gate_up.accumulate(expert, da_RH, db_FR)
        add_input_gradient(dx_PH, dz_PR, gate_up_pair)
    if scale_input:
        dweight_P = (dx_PH * x_PH).sum(-1, dtype=torch.float32)
        dx_PH.mul_(weight_P1)
    return dx_PH, dweight_P
