"""The head's log probabilities and their gradients, chunk by chunk, against plain autograd."""

from __future__ import annotations

import pytest
import torch

from lamina.engine import head
from lamina.engine.head import logits, logprobs

TOKENS, HIDDEN, VOCAB = 37, 16, 91


@pytest.mark.parametrize("chunk_bytes", [1, 9 * VOCAB * 4, 1 << 30])
@pytest.mark.parametrize("cache_bytes", [VOCAB * 4, 5 * VOCAB * 4, 1 << 22])
def test_chunks_give_what_autograd_gives(
    chunk_bytes: int, cache_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "_CACHE_BYTES", cache_bytes)
    torch.manual_seed(0)
    x_LH = torch.randn(TOKENS, HIDDEN)
    head_VH = torch.randn(VOCAB, HIDDEN) * 3
    targets_L = torch.randint(0, VOCAB, (TOKENS,))

    def norm(x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)

    leaf_LH = x_LH.clone().requires_grad_()
    expected_L = torch.log_softmax(logits(leaf_LH, norm, head_VH), dim=-1)[
        torch.arange(TOKENS), targets_L
    ]
    expected_L.sum().backward()

    for gradient in (True, False):
        logp_L, dlogp_LH = logprobs(
            x_LH, targets_L, norm, head_VH, chunk_bytes=chunk_bytes, gradient=gradient
        )
        torch.testing.assert_close(logp_L, expected_L.detach(), rtol=1e-5, atol=1e-5)
        if not gradient:
            assert dlogp_LH is None
            continue
        assert dlogp_LH is not None
        torch.testing.assert_close(dlogp_LH, leaf_LH.grad, rtol=1e-4, atol=1e-5)


def test_a_nearly_certain_token_keeps_its_gradient_in_bf16() -> None:
    x_LH = torch.ones(1, HIDDEN, dtype=torch.bfloat16)
    head_VH = torch.zeros(VOCAB, HIDDEN, dtype=torch.bfloat16)
    head_VH[3] = 1.0
    logp_L, dlogp_LH = logprobs(
        x_LH,
        torch.tensor([3]),
        lambda x: x,
        head_VH,
        chunk_bytes=1 << 20,
        gradient=True,
    )
    # p = e^16 / (e^16 + 90): 1 - p is 1.01e-5, which bf16 can't tell from zero after 1 - p.
    expected = 90 / (torch.e**16 + 90)
    assert logp_L[0].item() == pytest.approx(-expected, rel=2e-2)
    assert dlogp_LH is not None
    assert dlogp_LH[0, 0].item() == pytest.approx(expected, rel=2e-2)


def test_no_tokens_give_no_log_probabilities() -> None:
    logp_L, dlogp_LH = logprobs(
        torch.empty(0, HIDDEN),
        torch.empty(0, dtype=torch.int64),
        lambda x: x,
        torch.randn(VOCAB, HIDDEN),
        chunk_bytes=1 << 20,
        gradient=True,
    )
    assert logp_L.shape == (0,)
    assert dlogp_LH is not None
    assert dlogp_LH.shape == (0, HIDDEN)
