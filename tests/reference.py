"""What the tests compare Lamina with: transformers and PEFT on tiny random models, and the plainest
way to bring a checkpoint's weights into the engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
)

from lamina.data.batches import Batch, make_batch
from lamina.engine.sources import ResidentSource
from lamina.lora.adapter import Adapter
from lamina.lora.experts import ExpertWeights
from lamina.models import load_family
from lamina.models.common import Family
from lamina.models.spec import Sources


def tiny_mixtral(**changes: Any) -> MixtralForCausalLM:
    """Odd sizes on purpose: 5 experts, head_dim unlike hidden / heads."""
    settings: dict[str, Any] = {
        "vocab_size": 83,
        "hidden_size": 48,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 5,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return _random(MixtralForCausalLM(MixtralConfig(**(settings | changes))))


def tiny_llama4(**changes: Any) -> Llama4ForCausalLM:
    """Dense and mixture layers, a NoPE layer, temperature tuning, chunks of 8 tokens, q/k norm."""
    settings: dict[str, Any] = {
        "vocab_size": 83,
        "hidden_size": 48,
        "intermediate_size": 40,
        "intermediate_size_mlp": 56,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 6,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 1, 0, 1],
        "attention_chunk_size": 8,
        "attn_temperature_tuning": True,
        "floor_scale": 4,
        "attn_scale": 0.1,
        "use_qk_norm": True,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return _random(Llama4ForCausalLM(Llama4TextConfig(**(settings | changes))))


def _random(model: Any) -> Any:
    """Weights of unit gain, exact in bf16, so that a bf16 store holds them without loss."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_((1 + 0.1 * noise).bfloat16().float())
            else:
                fan_in = parameter.shape[-1]
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_((noise / fan_in**0.5).bfloat16().float())
    return model.float().eval()


def save(model: Any, folder: Path) -> Path:
    """An ordinary checkpoint, as transformers writes it."""
    model.save_pretrained(folder)
    return folder


def family_of(folder: Path) -> Family:
    return load_family(json.loads((folder / "config.json").read_text()))


def resident_source(family: Family, folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A checkpoint's tensors, found by the family's map of names, read in the plainest way."""
    stored: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= load_file(path)

    def read(sources: Sources) -> Tensor:
        parts = next(parts for parts in sources if all(part.key in stored for part in parts))
        rows = []
        for part in parts:
            tensor = stored[part.key] if part.index is None else stored[part.key][part.index]
            rows.append(tensor.T if part.transpose else tensor)
        return torch.cat(rows).to(dtype).contiguous()

    dense, experts = {}, {}
    for block in family.blocks:
        dense[block.name] = {t.name: read(t.sources) for t in (*block.plain, *block.linears)}
        if block.experts is not None:
            experts[block.name] = [
                ExpertWeights(
                    read(block.experts.gate_up_sources(e)), read(block.experts.down_sources(e))
                )
                for e in range(block.experts.num_experts)
            ]
    return ResidentSource(dense, experts)


def randomize(adapter: Adapter, source: Any, seed: int = 7) -> None:
    """Draw every B non-zero: at B = 0 the gradient of every A is zero and shows nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in adapter.blocks.values():
            for pair in block.factors():
                pair.b.copy_(torch.randn(pair.b.shape, generator=generator) * 0.1)


def random_sequences(
    lengths: Sequence[int], vocab_size: int = 83, seed: int = 3
) -> list[tuple[list[int], list[bool]]]:
    generator = torch.Generator().manual_seed(seed)
    sequences = []
    for length in lengths:
        ids = torch.randint(3, vocab_size, (length,), generator=generator).tolist()
        mask = (torch.rand(length, generator=generator) < 0.6).tolist()
        sequences.append((ids, mask))
    return sequences


def batch_of(sequences: Sequence[tuple[list[int], list[bool]]]) -> Batch:
    return make_batch(sequences)


def padded(sequences: Sequence[tuple[list[int], list[bool]]]) -> dict[str, Tensor]:
    """The same sequences as one padded batch for transformers; labels shift inside its loss."""
    longest = max(len(ids) for ids, _ in sequences)
    shape = (len(sequences), longest)
    input_ids = torch.zeros(shape, dtype=torch.int64)
    attention_mask = torch.zeros(shape, dtype=torch.int64)
    labels = torch.full(shape, -100)
    for row, (ids, mask) in enumerate(sequences):
        input_ids[row, : len(ids)] = torch.tensor(ids)
        attention_mask[row, : len(ids)] = 1
        learned = torch.tensor(mask)
        learned[0] = False
        labels[row, : len(ids)] = torch.where(learned, torch.tensor(ids), -100)
    return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


def distance(a: Tensor, b: Tensor) -> float:
    """`||a - b|| / ||b||`."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))
