"""Llama 4's language model (Scout, Maverick), as transformers' `Llama4ForCausalLM`.

What differs from the textbook: RoPE pairs are interleaved; some layers have no RoPE (NoPE), attend
over everything and may have their queries scaled by position (temperature tuning,
arXiv 2501.19399), while RoPE layers attend inside chunks; q and k may be normalized after RoPE;
layers are dense or mixtures; a chosen expert's *input* is multiplied by the sigmoid of its score; a
shared expert is added. Only the chosen experts are computed, where transformers runs every one over
zeroed inputs.

Shapes: T = tokens, H = hidden size, A = query heads, K = key/value heads (or chosen experts, in
`_TK`), D = head dimension, E = experts, I = an expert's intermediate size.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.errors import CheckpointError
from lamina.models.common import (
    AttentionCore,
    RotaryEmbedding,
    Routing,
    Weights,
    l2_norm,
    rms_norm,
    rotate_interleaved,
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


class Llama4:
    model_types: ClassVar = ("llama4", "llama4_text")
    checkpoint_prefixes: ClassVar = ("language_model.", "")
    weights_scale_input: ClassVar = True

    def __init__(self, config: Any):
        whole = config.model_type == "llama4"
        #: where the language model sits in transformers' class for the whole model.
        self.module_prefix = "language_model." if whole else ""
        self.config = config.text_config if whole else config
        problems = []
        if self.config.attention_bias:
            problems.append("attention_bias is true; only attention without biases is built")
        if self.config.hidden_act != "silu":
            problems.append(f"hidden_act is {self.config.hidden_act!r}; only 'silu' is built")
        if problems:
            raise CheckpointError("config.json asks for what isn't built", problems=problems)
        self.num_experts_per_tok: int = self.config.num_experts_per_tok
        self.eps: float = self.config.rms_norm_eps
        self.rotary = RotaryEmbedding(self.config)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        c = self.config
        blocks = [embed_block(c)]
        for layer in range(c.num_hidden_layers):
            feed_forward = self._moe_block if layer in c.moe_layers else self._mlp_block
            blocks += [self._attention_block(layer), feed_forward(layer)]
        return (*blocks, head_block(c))

    def _linear(
        self, layer: int, parent: str, name: str, out: int, in_: int, feeds_residual: bool = False
    ) -> Linear:
        key = f"model.layers.{layer}.{parent}.{name}"
        sources = ((Part(f"{key}.weight"),),)
        return Linear(name, self.module_prefix + key, out, in_, sources, feeds_residual)

    def _attention_block(self, layer: int) -> Block:
        c = self.config
        q_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        norm = f"model.layers.{layer}.input_layernorm"
        return Block(
            name=f"layers.{layer}.self_attn",
            kind="attention",
            layer=layer,
            plain=(norm_weight("input_layernorm", norm, c.hidden_size),),
            linears=(
                self._linear(layer, "self_attn", "q_proj", q_size, c.hidden_size),
                self._linear(layer, "self_attn", "k_proj", kv_size, c.hidden_size),
                self._linear(layer, "self_attn", "v_proj", kv_size, c.hidden_size),
                self._linear(layer, "self_attn", "o_proj", c.hidden_size, q_size, True),
            ),
        )

    def _mlp_linears(self, layer: int, width: int, inside: str = "") -> tuple[Linear, ...]:
        h = self.config.hidden_size
        return (
            self._linear(layer, "feed_forward", f"{inside}gate_proj", width, h),
            self._linear(layer, "feed_forward", f"{inside}up_proj", width, h),
            self._linear(layer, "feed_forward", f"{inside}down_proj", h, width, True),
        )

    def _feed_forward_norm(self, layer: int) -> Plain:
        name = "post_attention_layernorm"
        return norm_weight(name, f"model.layers.{layer}.{name}", self.config.hidden_size)

    def _mlp_block(self, layer: int) -> Block:
        return Block(
            name=f"layers.{layer}.feed_forward",
            kind="mlp",
            layer=layer,
            plain=(self._feed_forward_norm(layer),),
            linears=self._mlp_linears(layer, self.config.intermediate_size_mlp),
        )

    def _moe_block(self, layer: int) -> Block:
        c, moe = self.config, f"model.layers.{layer}.feed_forward"
        router_shape = (c.num_local_experts, c.hidden_size)
        stacked = f"{moe}.experts"
        return Block(
            name=f"layers.{layer}.feed_forward",
            kind="moe",
            layer=layer,
            plain=(
                self._feed_forward_norm(layer),
                Plain("router", router_shape, ((Part(f"{moe}.router.weight"),),)),
            ),
            linears=self._mlp_linears(layer, c.intermediate_size, "shared_expert."),
            experts=Experts(
                module=f"{self.module_prefix}{stacked}",
                router="router",
                router_module=f"{self.module_prefix}{moe}.router",
                num_experts=c.num_local_experts,
                hidden_size=c.hidden_size,
                intermediate_size=c.intermediate_size,
                transposed=True,
                gate_up_sources=lambda e: (
                    (Part(f"{stacked}.gate_up_proj", index=e, transpose=True),),
                ),
                down_sources=lambda e: ((Part(f"{stacked}.down_proj", index=e, transpose=True),),),
            ),
        )

    def attention(self, block: Block, w: Weights, x_TH: Tensor, core: AttentionCore) -> Tensor:
        assert block.layer is not None
        c = self.config
        n_TH = rms_norm(x_TH, w.plain("input_layernorm"), self.eps)
        q_TAD = w.linear("q_proj", n_TH).unflatten(-1, (-1, c.head_dim))
        k_TKD = w.linear("k_proj", n_TH).unflatten(-1, (-1, c.head_dim))
        v_TKD = w.linear("v_proj", n_TH).unflatten(-1, (-1, c.head_dim))
        if c.no_rope_layers[block.layer]:
            angles = self.rotary.angles(core.position_ids_T)
            freqs_cis = torch.polar(torch.full_like(angles, self.rotary.scaling), angles)
            q_TAD = rotate_interleaved(q_TAD, freqs_cis)
            k_TKD = rotate_interleaved(k_TKD, freqs_cis)
            if c.use_qk_norm:
                q_TAD = l2_norm(q_TAD, self.eps)
                k_TKD = l2_norm(k_TKD, self.eps)
        elif c.attn_temperature_tuning:
            steps_T = torch.floor((core.position_ids_T.float() + 1.0) / c.floor_scale)
            scale_T = torch.log1p(steps_T) * c.attn_scale + 1.0
            q_TAD = (q_TAD * scale_T[:, None, None]).to(q_TAD.dtype)
        chunked = c.layer_types[block.layer] == "chunked_attention"
        o_TAD = core(
            block.layer,
            q_TAD,
            k_TKD,
            v_TKD,
            scale=c.head_dim**-0.5,
            chunk_size=c.attention_chunk_size if chunked else None,
        )
        return x_TH + w.linear("o_proj", o_TAD.flatten(-2))

    def _gated(self, w: Weights, n_TH: Tensor, inside: str = "") -> Tensor:
        gate_TI = w.linear(f"{inside}gate_proj", n_TH)
        up_TI = w.linear(f"{inside}up_proj", n_TH)
        return w.linear(f"{inside}down_proj", F.silu(gate_TI) * up_TI)

    def mlp(self, block: Block, w: Weights, x_TH: Tensor) -> Tensor:
        n_TH = rms_norm(x_TH, w.plain("post_attention_layernorm"), self.eps)
        return x_TH + self._gated(w, n_TH)

    def route(self, block: Block, w: Weights, x_TH: Tensor) -> Routing:
        n_TH = rms_norm(x_TH, w.plain("post_attention_layernorm"), self.eps)
        logits_TE = F.linear(n_TH, w.plain("router"))
        indices_TK = w.topk(logits_TE, self.num_experts_per_tok)
        weights_TK = torch.sigmoid(logits_TE.gather(-1, indices_TK).float())
        return Routing(n_TH, indices_TK, weights_TK)

    def combine(self, block: Block, w: Weights, x_TH: Tensor, routing: Routing) -> Tensor:
        return x_TH + self._gated(w, routing.x_TH, "shared_expert.")

    def norm(self, w: Weights, x_TH: Tensor) -> Tensor:
        return rms_norm(x_TH, w.plain("norm"), self.eps)
