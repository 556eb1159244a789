"""The attention cores: ragged against a plain masked softmax, cached against ragged."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lamina.models.common import CachedAttention, RaggedAttention

A, K, D = 6, 2, 8


def qkv(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(tokens, A, D, generator=generator),
        torch.randn(tokens, K, D, generator=generator),
        torch.randn(tokens, K, D, generator=generator),
    )


def positions(lengths: list[int]) -> Tensor:
    return torch.cat([torch.arange(length) for length in lengths])


def plain(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], chunk: int | None) -> Tensor:
    """One masked softmax over everything."""
    row = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    place = positions(lengths)
    seen = (row[:, None] == row) & (place[:, None] >= place)
    if chunk is not None:
        seen &= place[:, None] // chunk == place // chunk
    k, v = k.repeat_interleave(A // K, 1), v.repeat_interleave(A // K, 1)
    scores = torch.einsum("tad,sad->ats", q, k) / math.sqrt(D)
    return torch.einsum("ats,sad->tad", scores.masked_fill(~seen, -math.inf).softmax(-1), v)


@pytest.mark.parametrize("chunk", [None, 4, 100])
@pytest.mark.parametrize("lengths", [[7], [5, 5, 5], [9, 1, 5, 9, 4, 8], [150, 64, 150]])
def test_ragged(lengths: list[int], chunk: int | None) -> None:
    q, k, v = qkv(sum(lengths))
    core = RaggedAttention(lengths, positions(lengths))
    out = core(0, q, k, v, scale=D**-0.5, chunk_size=chunk)
    torch.testing.assert_close(out, plain(q, k, v, lengths, chunk))


@pytest.mark.parametrize("chunk", [None, 4])
def test_cached_tokens_equal_the_whole(chunk: int | None) -> None:
    """Prompts of unequal length, then tokens one by one; a sequence leaves on the way."""
    prompts, new = [3, 7, 1], 6
    whole = [length + new for length in prompts]
    q, k, v = qkv(sum(whole))
    expected = plain(q, k, v, whole, chunk)
    starts = [0, *torch.tensor(whole).cumsum(0).tolist()]
    core = CachedAttention(prompts, max(whole), torch.device("cpu"))
    alive = [0, 1, 2]
    for step in range(new):
        if step == 0:
            index = torch.cat([torch.arange(starts[n], starts[n] + prompts[n]) for n in alive])
        else:
            index = torch.tensor([starts[n] + prompts[n] + step - 1 for n in alive])
        out = core(0, q[index], k[index], v[index], scale=D**-0.5, chunk_size=chunk)
        torch.testing.assert_close(out, expected[index])
        assert torch.equal(
            core.position_ids_T[core.last_tokens_N],
            torch.tensor([prompts[n] + step - 1 for n in alive]),
        )
        core.advance()
        if step == 2:
            alive = [0, 2]
            core.keep(alive)
