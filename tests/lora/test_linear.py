"""The LoRA linear against its readable definition, gradients included."""

from __future__ import annotations

import pytest
import torch

from lamina.lora.linear import Dropout, Pair, lora_linear, reference


def pair(dropout: Dropout | None = None) -> Pair:
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(3, 10, generator=generator).requires_grad_()
    b = torch.randn(7, 3, generator=generator).requires_grad_()
    return Pair(a, b, 0.7, dropout)


@pytest.mark.parametrize("dropout", [None, Dropout(0.4, 9)])
@pytest.mark.parametrize("skip_output", [False, True])
@pytest.mark.parametrize("input_grad", [False, True])
def test_equals_reference(dropout: Dropout | None, skip_output: bool, input_grad: bool) -> None:
    x, w, dy = torch.randn(5, 10), torch.randn(7, 10), torch.randn(5, 7)
    results = []
    for fast in (False, True):
        adapter = pair(dropout)
        x_TI = x.clone().requires_grad_(input_grad)
        if fast:
            y = lora_linear(x_TI, w, adapter, skip_output=skip_output)
        else:
            y = reference(x_TI, w, adapter)
        y.backward(dy)
        results.append((y.detach(), x_TI.grad, adapter.a.grad, adapter.b.grad))
    (y0, *grads0), (y1, *grads1) = results
    if skip_output:
        assert not y1.any()
    else:
        torch.testing.assert_close(y1, y0)
    for ours, theirs in zip(grads1, grads0, strict=True):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours, theirs)


def test_without_an_adapter_and_without_grad() -> None:
    x, w = torch.randn(5, 10), torch.randn(7, 10)
    torch.testing.assert_close(lora_linear(x, w, None, skip_output=False), reference(x, w, None))
    with torch.no_grad():
        y = lora_linear(x, w, pair(), skip_output=True)  # nothing is recomputed without grad
        torch.testing.assert_close(y, reference(x, w, pair()))


def test_dropout_keeps_the_mean_and_its_seed() -> None:
    like = torch.empty(200, 300)
    mask = Dropout(0.25, 3).mask(like)
    assert torch.equal(mask, Dropout(0.25, 3).mask(like))
    assert not torch.equal(mask, Dropout(0.25, 4).mask(like))
    assert mask.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float(mask.mean()) == pytest.approx(1.0, abs=0.01)
