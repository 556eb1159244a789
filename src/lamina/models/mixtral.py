"""Mixtral (arXiv 2401.04088), as transformers' `MixtralForCausalLM`.

What differs from the textbook: RoPE pairs are half-split; the router's softmax is over all experts
in fp32, and the k largest are renormalized; a routing weight multiplies its expert's output; the
auxiliary loss pools all layers.

Shapes: T = tokens, H = hidden size, A = query heads, K = key/value heads (or chosen experts, in
`_TK`), D = head dimension, E = experts, I = an expert's intermediate size.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from lamina.errors import CheckpointError
from lamina.models.common import (
    AttentionCore,
    RotaryEmbedding,
    Routing,
    Weights,
    rms_norm,
    rotate_half_split,
)
from lamina.models.spec import (
    Block,
    Experts,
    Linear,
    Part,
    Plain,
    embed_block,
    head_block,
    norm_weight,
)


class Mixtral:
    model_types: ClassVar = ("mixtral",)
    checkpoint_prefixes: ClassVar = ("",)
    weights_scale_input: ClassVar = False

    def __init__(self, config: Any):
        if config.sliding_window is not None:
            raise CheckpointError(
                f"config.json sets sliding_window to {config.sliding_window}, and sliding-window "
                "attention isn't built",
                hint="Mixtral 8x7B and 8x22B as released have it set to null.",
            )
        if config.hidden_act != "silu":
            raise CheckpointError(
                f"config.json sets hidden_act to {config.hidden_act!r}; only 'silu' is built"
            )
        self.config = config
        self.num_experts_per_tok: int = config.num_experts_per_tok
        self.head_dim: int = config.head_dim or config.hidden_size // config.num_attention_heads
        self.eps: float = config.rms_norm_eps
        self.rotary = RotaryEmbedding(config)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        c = self.config
        blocks = [embed_block(c)]
        for layer in range(c.num_hidden_layers):
            blocks += [self._attention_block(layer), self._moe_block(layer)]
        return (*blocks, head_block(c))

    def _attention_block(self, layer: int) -> Block:
        c, prefix = self.config, f"model.layers.{layer}"
        q_size, kv_size = (
            n * self.head_dim for n in (c.num_attention_heads, c.num_key_value_heads)
        )

        def linear(name: str, out: int, in_: int, feeds_residual: bool = False) -> Linear:
            module = f"{prefix}.self_attn.{name}"
            return Linear(name, module, out, in_, ((Part(f"{module}.weight"),),), feeds_residual)

        return Block(
            name=f"layers.{layer}.self_attn",
            kind="attention",
            layer=layer,
            plain=(norm_weight("input_layernorm", f"{prefix}.input_layernorm", c.hidden_size),),
            linears=(
                linear("q_proj", q_size, c.hidden_size),
                linear("k_proj", kv_size, c.hidden_size),
                linear("v_proj", kv_size, c.hidden_size),
                linear("o_proj", c.hidden_size, q_size, feeds_residual=True),
            ),
        )

    def _moe_block(self, layer: int) -> Block:
        c, prefix = self.config, f"model.layers.{layer}"
        # The releases say block_sparse_moe; transformers' module is called mlp since 5.0.
        moe = f"{prefix}.block_sparse_moe"
        router = Plain(
            "gate", (c.num_local_experts, c.hidden_size), ((Part(f"{moe}.gate.weight"),),)
        )
        return Block(
            name=f"layers.{layer}.mlp",
            kind="moe",
            layer=layer,
            plain=(
                norm_weight(
                    "post_attention_layernorm", f"{prefix}.post_attention_layernorm", c.hidden_size
                ),
                router,
            ),
            experts=Experts(
                module=f"{prefix}.mlp.experts",
                router="gate",
                router_module=f"{prefix}.mlp.gate",
                num_experts=c.num_local_experts,
                hidden_size=c.hidden_size,
                intermediate_size=c.intermediate_size,
                transposed=False,
                gate_up_sources=lambda e: (
                    (Part(f"{moe}.experts.{e}.w1.weight"), Part(f"{moe}.experts.{e}.w3.weight")),
                ),
                down_sources=lambda e: ((Part(f"{moe}.experts.{e}.w2.weight"),),),
            ),
        )

    def attention(self, block: Block, w: Weights, x_TH: Tensor, core: AttentionCore) -> Tensor:
        assert block.layer is not None
        n_TH = rms_norm(x_TH, w.plain("input_layernorm"), self.eps)
        q_TAD = w.linear("q_proj", n_TH).unflatten(-1, (-1, self.head_dim))
        k_TKD = w.linear("k_proj", n_TH).unflatten(-1, (-1, self.head_dim))
        v_TKD = w.linear("v_proj", n_TH).unflatten(-1, (-1, self.head_dim))
        angles = self.rotary.angles(core.position_ids_T).repeat(1, 2)
        cos = (angles.cos() * self.rotary.scaling).to(x_TH.dtype)
        sin = (angles.sin() * self.rotary.scaling).to(x_TH.dtype)
        q_TAD = rotate_half_split(q_TAD, cos, sin)
        k_TKD = rotate_half_split(k_TKD, cos, sin)
        o_TAD = core(block.layer, q_TAD, k_TKD, v_TKD, scale=self.head_dim**-0.5)
        return x_TH + w.linear("o_proj", o_TAD.flatten(-2))

    def mlp(self, block: Block, w: Weights, x_TH: Tensor) -> Tensor:
        raise AssertionError("every Mixtral layer is a mixture of experts")

    def route(self, block: Block, w: Weights, x_TH: Tensor) -> Routing:
        n_TH = rms_norm(x_TH, w.plain("post_attention_layernorm"), self.eps)
        probs_TE = F.softmax(F.linear(n_TH, w.plain("gate")).float(), dim=-1)
        indices_TK = w.topk(probs_TE, self.num_experts_per_tok)
        weights_TK = probs_TE.gather(-1, indices_TK)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return Routing(n_TH, indices_TK, weights_TK, probs_TE)

    def combine(self, block: Block, w: Weights, x_TH: Tensor, routing: Routing) -> Tensor:
        return x_TH

    def norm(self, w: Weights, x_TH: Tensor) -> Tensor:
        return rms_norm(x_TH, w.plain("norm"), self.eps)
