"""Checkpoints in fp8, as Llama 4 Maverick's release: decoded exactly."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.store.quantized_sources import held, make, write
from torch import Tensor

from lamina.errors import CheckpointError
from lamina.models import load_family
from lamina.store.codec import encode
from lamina.store.quantized import decode_fp8

MAVERICK = {
    "model_type": "llama4",
    "text_config": {
        "model_type": "llama4_text",
        "hidden_size": 64,
        "intermediate_size": 48,
        "intermediate_size_mlp": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_local_experts": 5,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        "vocab_size": 96,
        "tie_word_embeddings": False,
    },
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {
                "weights": {"num_bits": 8, "strategy": "channel", "type": "float"},
                "input_activations": {"num_bits": 8, "dynamic": True, "strategy": "token"},
                "targets": ["Linear"],
            }
        },
    },
}
LAYER = "language_model.model.layers"


def fp8(
    shape: tuple[int, int], *, scale_dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """Codes of every float8 number but NaN, and a scale a row."""
    bits = torch.randint(0, 127, shape).to(torch.uint8) | (torch.randint(0, 2, shape) << 7).byte()
    scale = (torch.rand(shape[0], 1) * 0.02 + 1e-4).to(scale_dtype)
    return bits.view(torch.float8_e4m3fn), scale


def maverick(scale_dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """The release's names: routed experts one by one in float8 with scales, all else in bf16."""
    tensors: dict[str, Tensor] = {}
    for block in load_family(MAVERICK).blocks:
        for t in (*block.plain, *block.linears):
            tensors[f"language_model.{t.sources[0][0].key}"] = torch.randn(t.shape).bfloat16()
        if block.experts is not None:
            for e in range(block.experts.num_experts):
                at = f"{LAYER}.{block.layer}.feed_forward.experts.{e}"
                for name, shape in (("gate", (48, 64)), ("up", (48, 64)), ("down", (64, 48))):
                    key = f"{at}.{name}_proj.weight"
                    tensors[key], tensors[f"{key}_scale"] = fp8(shape, scale_dtype=scale_dtype)
    tensors["vision_model.patch_embedding.linear.weight"] = torch.randn(8, 4).bfloat16()
    return tensors


@pytest.mark.parametrize("codec", ["nf4", "int8", "bf16"])
@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
def test_mavericks_fp8_release_is_decoded_and_encoded(
    tmp_path: Path, codec: str, scale_dtype: torch.dtype
) -> None:
    tensors = maverick(scale_dtype)
    write(tmp_path / "checkpoint", MAVERICK, tensors)
    store = make(tmp_path / "checkpoint", tmp_path / "store", MAVERICK, codec)

    def exact(e: int, name: str) -> Tensor:
        key = f"{LAYER}.1.feed_forward.experts.{e}.{name}_proj.weight"
        # Twice as wide as what is computed: one rounding, to bf16.
        return (tensors[key].double() * tensors[f"{key}_scale"].double()).bfloat16()

    found = held(store, "layers.1.feed_forward")
    for e in range(5):
        gate_up = torch.cat([exact(e, "gate"), exact(e, "up")])
        for name, want in (("gate_up_proj", gate_up), ("down_proj", exact(e, "down"))):
            for suffix, piece in encode(want, codec).items():
                assert torch.equal(found[f"experts.{e}.{name}.weight{suffix}"], piece)
    assert store.notes == (
        "15 tensors of the checkpoint are F8_E4M3 with scales; they were decoded to bf16.",
    )
    # The scales are used up; the vision tower goes along.
    (extra,) = store.extra
    assert list(load_file(store.path / extra.file)) == [
        "vision_model.patch_embedding.linear.weight"
    ]


def test_the_stores_config_says_nothing_of_the_sources_quantization(tmp_path: Path) -> None:
    write(tmp_path / "checkpoint", MAVERICK, maverick())
    store = make(tmp_path / "checkpoint", tmp_path / "store", MAVERICK)
    assert "quantization_config" not in store.config
    copied = json.loads((store.path / "config.json").read_text())
    assert copied == store.config == {k: v for k, v in MAVERICK.items() if "quant" not in k}


def test_one_scale_for_all_rows_will_do(tmp_path: Path) -> None:
    tensors = maverick()
    key = f"{LAYER}.1.feed_forward.experts.0.down_proj.weight"
    tensors[f"{key}_scale"] = torch.tensor([0.5])
    write(tmp_path / "checkpoint", MAVERICK, tensors)
    store = make(tmp_path / "checkpoint", tmp_path / "store", MAVERICK, "bf16")
    found = held(store, "layers.1.feed_forward")["experts.0.down_proj.weight"]
    assert torch.equal(found, (tensors[key].double() * 0.5).bfloat16())


def test_every_float8_number_is_decoded_at_any_row() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(200, 1).view(torch.float8_e4m3fn)
    scale = torch.logspace(-30, 30, 203)
    want = (codes.double() * scale[3:, None].double()).float().bfloat16()
    got = decode_fp8(codes, scale, 3)
    assert torch.equal(got.isnan(), want.isnan())
    assert int(got.isnan().sum()) == 2 * 200
    assert torch.equal(got.nan_to_num(), want.nan_to_num())
    one = decode_fp8(codes, torch.tensor([0.75]), 3)
    assert torch.equal(one.nan_to_num(), (codes.double() * 0.75).bfloat16().nan_to_num())


def test_fp8_that_cannot_be_read_is_said_at_once(tmp_path: Path) -> None:
    tensors = maverick()
    at = f"{LAYER}.1.feed_forward.experts"
    del tensors[f"{at}.0.down_proj.weight_scale"]
    tensors[f"{at}.1.down_proj.weight_scale"] = torch.ones(64, 2)
    tensors[f"{at}.2.down_proj.weight"] = torch.zeros(64, 48).to(torch.float8_e5m2)
    del tensors[f"{at}.3.up_proj.weight"]
    write(tmp_path / "checkpoint", MAVERICK, tensors)
    with pytest.raises(CheckpointError) as caught:
        make(tmp_path / "checkpoint", tmp_path / "store", MAVERICK)
    text = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    assert "experts.0.down_proj.weight_scale is missing" in text
    assert "experts.1.down_proj.weight_scale is [64, 2]" in text
    assert "experts.2.down_proj.weight is F8_E5M2" in text
    assert "layers.1.feed_forward.experts.3.gate_up_proj: missing" in text
    assert not (tmp_path / "store").exists()


def test_fp8_that_is_not_finite_is_named(tmp_path: Path) -> None:
    tensors = maverick()
    key = f"{LAYER}.1.feed_forward.experts.3.up_proj.weight"
    tensors[key].view(torch.uint8)[2, 3] = 0x7F
    write(tmp_path / "checkpoint", MAVERICK, tensors)
    with pytest.raises(CheckpointError, match="NaN or infinite") as caught:
        make(tmp_path / "checkpoint", tmp_path / "store", MAVERICK)
    assert "experts.3.up_proj" in caught.value.message
    assert "gate" not in caught.value.message
