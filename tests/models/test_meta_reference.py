"""Llama 4 against Meta's own implementation (`llama_models.llama4`): the same logits.

Meta's code wants fairscale's parallel layers and a GPU for its cache; on one CPU these are plain
layers and plain memory.
"""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import reference
from torch import nn

from lamina.engine.step import Engine


class _Linear(nn.Linear):
    def __init__(self, in_: int, out: int, bias: bool = True, **_: Any):
        super().__init__(in_, out, bias=bias)


class _Embedding(nn.Embedding):
    def __init__(self, size: int, dim: int, **_: Any):
        super().__init__(size, dim)


@pytest.fixture
def meta(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """`llama_models.llama4.model`, importable without fairscale."""

    def module(name: str, **contents: Any) -> None:
        made = types.ModuleType(name)
        made.__dict__.update(contents)
        monkeypatch.setitem(sys.modules, name, made)

    root = "fairscale.nn.model_parallel"
    for name in ("fairscale", "fairscale.nn", root):
        module(name)
    module(f"{root}.initialize", get_model_parallel_world_size=lambda: 1)
    sys.modules[root].initialize = sys.modules[f"{root}.initialize"]  # type: ignore[attr-defined]
    module(
        f"{root}.layers",
        ColumnParallelLinear=_Linear,
        RowParallelLinear=_Linear,
        VocabParallelEmbedding=_Embedding,
    )
    module(f"{root}.mappings", reduce_from_model_parallel_region=lambda x: x)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    from llama_models.llama4 import model

    return model


@pytest.mark.parametrize("scaled_rope", [False, True])
@pytest.mark.parametrize("every_layer", [False, True])
def test_logits_equal_metas(
    meta: types.ModuleType, every_layer: bool, scaled_rope: bool, tmp_path: Path
) -> None:
    from llama_models.llama4.args import ModelArgs, MoEArgs

    step = 1 if every_layer else 2
    args = ModelArgs(
        dim=64,
        n_layers=4,
        n_heads=4,
        n_kv_heads=2,
        head_dim=16,
        vocab_size=83,
        multiple_of=8,
        ffn_dim_multiplier=1.0,
        ffn_exp=1.5,
        norm_eps=1e-5,
        attention_chunk_size=8,
        rope_theta=10_000,
        use_scaled_rope=scaled_rope,
        rope_scaling_factor=8.0 if scaled_rope else None,
        rope_high_freq_factor=4.0 if scaled_rope else None,
        nope_layer_interval=4,
        use_qk_norm=True,
        attn_temperature_tuning=True,
        floor_scale=4.0,
        moe_args=MoEArgs(num_experts=6, top_k=1, interleave_moe_layer_step=step),
        max_batch_size=1,
        max_seq_len=64,
    )
    theirs = meta.Transformer(args).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in theirs.parameters():
            fan_in = parameter.shape[-1]
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise / 10 if parameter.ndim == 1 else noise / fan_in**0.5)
    moe = [hasattr(layer.feed_forward, "experts") for layer in theirs.layers]
    assert any(moe)
    assert all(moe) == every_layer

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0}
    if scaled_rope:
        rope |= {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    first_moe = theirs.layers[moe.index(True)].feed_forward
    dense = 56 if every_layer else theirs.layers[0].feed_forward.w1.weight.shape[0]
    ours = reference.tiny_llama4(
        hidden_size=64,
        num_attention_heads=4,
        intermediate_size=first_moe.experts.w1.shape[-1],
        intermediate_size_mlp=dense,
        interleave_moe_layer_step=step,
        no_rope_layers=[1, 1, 1, 0],
        rope_parameters=rope,
    )
    with torch.no_grad():
        for mine, layer in zip(ours.model.layers, theirs.layers, strict=True):
            mine.input_layernorm.weight.copy_(layer.attention_norm.weight)
            mine.post_attention_layernorm.weight.copy_(layer.ffn_norm.weight)
            for name, weight in (
                ("q_proj", layer.attention.wq),
                ("k_proj", layer.attention.wk),
                ("v_proj", layer.attention.wv),
                ("o_proj", layer.attention.wo),
            ):
                getattr(mine.self_attn, name).weight.copy_(weight.weight)
            feed = layer.feed_forward
            dense_ours, dense_theirs = mine.feed_forward, feed
            if hasattr(feed, "experts"):
                mine.feed_forward.router.weight.copy_(feed.router_DE.T)
                gate_up = torch.cat((feed.experts.w1, feed.experts.w3), dim=-1)
                mine.feed_forward.experts.gate_up_proj.copy_(gate_up)
                mine.feed_forward.experts.down_proj.copy_(feed.experts.w2)
                dense_ours, dense_theirs = mine.feed_forward.shared_expert, feed.shared_expert
            dense_ours.gate_proj.weight.copy_(dense_theirs.w1.weight)
            dense_ours.up_proj.weight.copy_(dense_theirs.w3.weight)
            dense_ours.down_proj.weight.copy_(dense_theirs.w2.weight)
        ours.model.embed_tokens.weight.copy_(theirs.tok_embeddings.weight)
        ours.model.norm.weight.copy_(theirs.norm.weight)
        ours.lm_head.weight.copy_(theirs.output.weight)
    folder = reference.save(ours, tmp_path / "model")
    family = reference.family_of(folder)
    engine = Engine(family, reference.resident_source(family, folder), None)

    from llama_models.llama4.datatypes import TransformerInput

    sequence = reference.random_sequences((29,))
    expected = theirs(TransformerInput(tokens=torch.tensor([sequence[0][0]]), tokens_position=0))
    logits = engine.logits(reference.batch_of(sequence))
    assert reference.distance(logits, expected.logits[0]) < 1e-5
