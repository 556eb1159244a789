"""The head: log probabilities of the tokens that carry loss, and their gradients, in one pass.

The logits `[L, V]` never exist at once. A token's log probability depends on its own hidden state
alone, so its gradient can be taken before its weight in the loss is known: an objective turns log
probabilities into weights afterwards, and a weight scales its token's gradient.

Shapes: L = tokens that carry loss, C = those of a chunk, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def logits(x_LH: Tensor, norm: Callable[[Tensor], Tensor], head_VH: Tensor) -> Tensor:
    """The readable definition: `[L, V]`, fp32."""
    return (norm(x_LH) @ head_VH.T).float()


#: On a CPU the softmax goes over so many bytes at a time: they stay in its cache.
_CACHE_BYTES = 4 << 20


def logprobs(
    x_LH: Tensor,
    targets_L: Tensor,
    norm: Callable[[Tensor], Tensor],
    head_VH: Tensor,
    *,
    chunk_bytes: int,
    gradient: bool,
) -> tuple[Tensor, Tensor | None]:
    """Log probabilities of the targets and, if asked, each one's gradient.

    Args:
        x_LH: hidden states before the last norm.
        chunk_bytes: how much memory the logits of a chunk may take.
        gradient: whether gradients are wanted.

    Returns:
        the log probabilities `[L]` in fp32, and the gradients `[L, H]` of each with respect to its
        own hidden state.
    """
    vocab_size, on_cpu = head_VH.shape[0], x_LH.device.type == "cpu"
    # Of a chunk's logits, all are held in the compute type, and those of a slice in fp32 too.
    if on_cpu:
        slice_rows = max(1, _CACHE_BYTES // (vocab_size * 4))
        rows = (chunk_bytes - slice_rows * vocab_size * 4) // (vocab_size * head_VH.itemsize)
    else:
        slice_rows = rows = chunk_bytes // (vocab_size * (4 + head_VH.itemsize))
    rows = min(max(1, rows), max(1, x_LH.shape[0]))
    logits_CV = x_LH.new_empty(rows, vocab_size)
    slice_SV = logits_CV.new_empty(min(rows, max(1, slice_rows)), vocab_size, dtype=torch.float32)
    logp_L = torch.empty(x_LH.shape[0], dtype=torch.float32, device=x_LH.device)
    dlogp_LH = torch.empty_like(x_LH) if gradient else None
    for start in range(0, x_LH.shape[0], rows):
        part = slice(start, start + rows)
        x_CH = x_LH[part].detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            n_CH = norm(x_CH)
        with torch.no_grad():
            part_CV = torch.mm(n_CH, head_VH.T, out=logits_CV[: len(n_CH)])
            for first in range(0, len(part_CV), len(slice_SV)):
                within = slice(first, first + len(slice_SV))
                logp_L[part][within] = _softmax(
                    part_CV[within], targets_L[part][within], slice_SV, gradient=gradient
                )
            if dlogp_LH is None:
                continue
            dn_CH = (part_CV @ head_VH).neg_()
        (dx_CH,) = torch.autograd.grad([n_CH], [x_CH], [dn_CH])
        dlogp_LH[part] = dx_CH
    return logp_L, dlogp_LH


def _softmax(logits_SV: Tensor, targets_S: Tensor, work_SV: Tensor, *, gradient: bool) -> Tensor:
    """The targets' log probabilities `[S]`, in fp32. With `gradient`, the logits become the
    negative of their gradient: the probabilities, minus one at the target."""
    targets_S1 = targets_S[:, None]
    soft_SV = work_SV[: len(logits_SV)].copy_(logits_SV)
    largest_S1 = soft_SV.amax(1, keepdim=True)
    logp_S1 = soft_SV.gather(1, targets_S1) - largest_S1
    total_S1 = soft_SV.sub_(largest_S1).exp_().sum(1, keepdim=True)
    logp_S1 -= total_S1.log()
    if gradient:
        soft_SV.div_(total_S1)
        # Subtracted before rounding to the compute type: near certainty the difference is tiny.
        soft_SV.scatter_add_(1, targets_S1, torch.full_like(logp_S1, -1.0))
        logits_SV.copy_(soft_SV)
    return logp_S1.squeeze(1)
