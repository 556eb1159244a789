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
    vocab_size = head_VH.shape[0]
    # At its peak a chunk holds its logits in fp32 and twice in the compute type.
    bytes_a_token = vocab_size * (4 + 2 * head_VH.element_size())
    chunk = max(1, chunk_bytes // bytes_a_token)
    logp_L = torch.empty(x_LH.shape[0], dtype=torch.float32, device=x_LH.device)
    dlogp_LH = torch.empty_like(x_LH) if gradient else None
    for start in range(0, x_LH.shape[0], chunk):
        part = slice(start, start + chunk)
        targets_C1 = targets_L[part, None]
        x_CH = x_LH[part].detach().requires_grad_(gradient)
        with torch.set_grad_enabled(gradient):
            n_CH = norm(x_CH)
        with torch.no_grad():
            logp_CV = torch.log_softmax(n_CH @ head_VH.T, dim=-1, dtype=torch.float32)
            logp_L[part] = logp_CV.gather(1, targets_C1).squeeze(1)
            if dlogp_LH is None:
                continue
            # p - 1 at the target, subtracted before rounding: near certainty it is tiny.
            error_CV = logp_CV.exp_()
            rows_C = torch.arange(error_CV.shape[0], device=error_CV.device)
            error_CV[rows_C, targets_L[part]] -= 1.0
            dn_CH = (error_CV.to(head_VH.dtype) @ head_VH).neg_()
        (dx_CH,) = torch.autograd.grad([n_CH], [x_CH], [dn_CH])
        dlogp_LH[part] = dx_CH
    return logp_L, dlogp_LH
