"""The shapes under measurement: three released models, two small ones to see that results are
right, and what a token costs."""

from __future__ import annotations

from typing import Any

from lamina.models import load_family
from lamina.models.common import Family

MIXTRAL_8X22B: dict[str, Any] = {
    "model_type": "mixtral",
    "vocab_size": 32768,
    "hidden_size": 6144,
    "intermediate_size": 16384,
    "num_hidden_layers": 56,
    "num_attention_heads": 48,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 65536,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
MIXTRAL_8X7B: dict[str, Any] = MIXTRAL_8X22B | {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 32768,
}
MAVERICK: dict[str, Any] = {
    "model_type": "llama4_text",
    "vocab_size": 202048,
    "hidden_size": 5120,
    "intermediate_size": 8192,
    "intermediate_size_mlp": 16384,
    "num_hidden_layers": 48,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_local_experts": 128,
    "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 2,
    "attention_chunk_size": 8192,
    "attn_temperature_tuning": True,
    "use_qk_norm": False,
    "max_position_embeddings": 1048576,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}
SMALL_MIXTRAL: dict[str, Any] = MIXTRAL_8X22B | {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 3,
}
SMALL_LLAMA4: dict[str, Any] = MAVERICK | {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 32,
    "intermediate_size_mlp": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_local_experts": 3,
    "attention_chunk_size": 32,
}


def family(config: dict[str, Any]) -> Family:
    return load_family(config)


def flops_a_token(family: Family, length: int) -> float:
    """Floating-point operations that a token's gradient needs at least: forward, the recompute that
    no gradient can do without, and the gradients of activations. Frozen weights have no gradients;
    LoRA's own share and elementwise work are left out. All tokens are learned.

    Args:
        length: of each sequence, for attention (causal: half of `length x length`).
    """
    config = family.config
    total = 0.0
    for block in family.blocks:
        for linear in block.linears:
            size = 2.0 * linear.out_features * linear.in_features
            total += size * (2 if linear.feeds_residual else 3)
        if block.kind == "attention":
            # Scores and values; the backward does 2.5 times the forward's.
            width = config.num_attention_heads * config.head_dim
            total += 2 * 2 * width * length / 2 * (1 + 1 + 2.5)
        if block.experts is not None:
            rows, columns = block.experts.gate_up_shape
            gate_up = 2.0 * rows * columns
            total += family.num_experts_per_tok * (3 * gate_up + 2 * gate_up / 2)
    return total + 2 * 2.0 * config.vocab_size * config.hidden_size
