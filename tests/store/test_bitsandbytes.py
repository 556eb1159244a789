"""Checkpoints that bitsandbytes quantized: their nf4 codes are kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.store.quantized_sources import held, make, streamed, write
from torch import Tensor, nn

from lamina.errors import CheckpointError
from lamina.models import load_family
from lamina.models.spec import Block, Part
from lamina.store.codec import decode, encode, import_bitsandbytes

bnb: Any = import_bitsandbytes()


MIXTRAL = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "vocab_size": 96,
    "sliding_window": None,
    "tie_word_embeddings": False,
}


def quantized(weight: Tensor, **how: Any) -> dict[str, Tensor]:
    """What bitsandbytes' linear puts into a checkpoint, by suffix."""
    how = {"quant_type": "nf4", "compress_statistics": False, **how}
    linear = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = bnb.nn.Params4bit(weight.clone(), requires_grad=False, **how).to("cpu")
    linear.weight.quant_state.shape = torch.Size(weight.shape)
    return {k.removeprefix("weight"): v for k, v in linear.state_dict().items()}


def dequantized(pieces: dict[str, Tensor], dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """By bitsandbytes itself. As one row, since its CPU kernel (0.50) takes wrong scales where rows
    aren't whole blocks."""
    state = {k.removeprefix("."): v for k, v in pieces.items() if k}
    quant_state = bnb.functional.QuantState.from_dict(state, device=torch.device("cpu"))
    quant_state.dtype = dtype
    shape, quant_state.shape = quant_state.shape, torch.Size([1, quant_state.shape.numel()])
    return bnb.functional.dequantize_4bit(pieces[""], quant_state).view(shape)


Source = tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]


def mixtral(dtype: torch.dtype, **how: Any) -> Source:
    """The names of Mixtral's releases with every linear but the head quantized, as transformers 4
    wrote it (router included); and the pieces of each, by key."""
    tensors: dict[str, Tensor] = {}
    pieces: dict[str, dict[str, Tensor]] = {}

    def add(key: str, shape: tuple[int, ...]) -> None:
        weight = torch.randn(shape).to(dtype)
        if len(shape) != 2 or key in ("lm_head.weight", "model.embed_tokens.weight"):
            tensors[key] = weight
            return
        pieces[key] = quantized(weight, **how)
        tensors.update({key + suffix: piece for suffix, piece in pieces[key].items()})

    for block in load_family(MIXTRAL).blocks:
        for t in (*block.plain, *block.linears):
            add(t.sources[0][0].key, t.shape)
        for e in range(block.experts.num_experts if block.experts else 0):
            at = f"model.layers.{block.layer}.block_sparse_moe.experts.{e}"
            for name, shape in (("w1", (48, 64)), ("w2", (64, 48)), ("w3", (48, 64))):
                add(f"{at}.{name}.weight", shape)
    return tensors, pieces


KINDS: list[tuple[torch.dtype, dict[str, Any]]] = [
    (torch.bfloat16, {}),
    (torch.float16, {}),
    (torch.bfloat16, {"compress_statistics": True}),
    (torch.float32, {"compress_statistics": True, "quant_storage": torch.bfloat16}),
]


@pytest.mark.parametrize(("dtype", "how"), KINDS, ids=["bf16", "fp16", "double", "storage"])
def test_bitsandbytes_codes_are_kept(
    tmp_path: Path, dtype: torch.dtype, how: dict[str, Any]
) -> None:
    tensors, pieces = mixtral(dtype, **how)
    write(tmp_path / "checkpoint", MIXTRAL, tensors)
    store = make(tmp_path / "checkpoint", tmp_path / "store", MIXTRAL)
    assert store.codec == "nf4"
    assert any("codes and fp32 scales were kept" in note for note in store.notes)

    def same(found: dict[str, Tensor], name: str, keys: list[str], got: Tensor) -> None:
        codes = torch.cat([pieces[key][""].view(torch.uint8).view(-1) for key in keys])
        assert torch.equal(found[f"{name}.weight"], codes)
        assert found[f"{name}.weight.absmax"].dtype == torch.float32
        assert torch.equal(got, torch.cat([dequantized(pieces[key]) for key in keys]))

    for layer in range(2):
        block, at = f"layers.{layer}.mlp", f"model.layers.{layer}.block_sparse_moe"
        found = held(store, block)
        for e, tensors_of in streamed(store, block):
            if e is None:
                want = dequantized(pieces[f"{at}.gate.weight"])
                assert torch.equal(tensors_of["gate"], want)
                continue
            keys = [f"{at}.experts.{e}.{w}.weight" for w in ("w1", "w3", "w2")]
            same(found, f"experts.{e}.gate_up_proj", keys[:2], tensors_of["gate_up_proj"])
            same(found, f"experts.{e}.down_proj", keys[2:], tensors_of["down_proj"])
        attention = f"layers.{layer}.self_attn"
        (_, dense), found = next(streamed(store, attention)), held(store, attention)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            same(found, name, [f"model.{attention}.{name}.weight"], dense[name])


@pytest.mark.parametrize("codec", ["int8", "bf16"])
def test_other_codecs_take_what_bitsandbytes_decodes(tmp_path: Path, codec: str) -> None:
    tensors, pieces = mixtral(torch.bfloat16, compress_statistics=True)
    write(tmp_path / "checkpoint", MIXTRAL, tensors)
    store = make(tmp_path / "checkpoint", tmp_path / "store", MIXTRAL, codec)
    found = held(store, "layers.1.mlp")
    for e in range(3):
        at = f"model.layers.1.block_sparse_moe.experts.{e}"
        want = torch.cat([dequantized(pieces[f"{at}.{w}.weight"]) for w in ("w1", "w3")])
        for suffix, piece in encode(want, codec).items():
            assert torch.equal(found[f"experts.{e}.gate_up_proj.weight{suffix}"], piece)
    assert any("they were decoded to bf16" in note for note in store.notes)


def test_what_transformers_saves_today_is_taken(tmp_path: Path) -> None:
    """transformers 5 quantizes attention alone: the experts beside it get wide scales of ours."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, MixtralConfig

    torch.manual_seed(0)
    config = MixtralConfig(**{k: v for k, v in MIXTRAL.items() if k != "model_type"})
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path / "plain")
    how = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    )
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=how, dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path / "checkpoint")
    written = json.loads((tmp_path / "checkpoint" / "config.json").read_text())
    store = make(tmp_path / "checkpoint", tmp_path / "store", written)
    source = load_file(tmp_path / "checkpoint" / "model.safetensors")
    key = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(held(store, "layers.0.self_attn")["q_proj.weight"], source[key].view(-1))
    want = dequantized({k.removeprefix(key): v for k, v in source.items() if k.startswith(key)})
    assert torch.equal(next(streamed(store, "layers.0.self_attn"))[1]["q_proj"], want)
    down = source["model.layers.0.block_sparse_moe.experts.1.w2.weight"]
    assert down.dtype == torch.bfloat16
    got = {e: tensors for e, tensors in streamed(store, "layers.0.mlp")}[1]["down_proj"]
    assert torch.equal(got, decode(encode(down, "nf4"), down.shape, "nf4", torch.bfloat16))


def stacked_blocks(sample: Any, transpose: bool) -> list[Block]:
    """The blocks of a stacked sample, whose stacks are [E, out, in] or [E, in, out]."""
    blocks = []
    for block in sample.blocks:
        e = block.experts
        if e is not None:
            at = f"model.{block.name}.experts"
            e = replace(
                e,
                gate_up_sources=lambda i, at=at: ((Part(f"{at}.gate_up_proj", i, transpose),),),
                down_sources=lambda i, at=at: ((Part(f"{at}.down_proj", i, transpose),),),
            )
        blocks.append(replace(block, experts=e))
    return blocks


def stack(sample: Any, transpose: bool, inter: int, hidden: int) -> dict[str, dict[str, Tensor]]:
    """Quantizes the stacks of a sample with bitsandbytes. Returns the pieces of each."""
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    pieces = {}
    for key in [key for key in sample.tensors if key.endswith(("gate_up_proj", "down_proj"))]:
        out, in_ = (2 * inter, hidden) if key.endswith("gate_up_proj") else (hidden, inter)
        shape = (sample.experts, in_, out) if transpose else (sample.experts, out, in_)
        module = nn.Module()
        module.weights = nn.Parameter(torch.randn(shape).bfloat16(), requires_grad=False)
        replace_parameter_4bit(module, "weights", compress_statistics=True, quant_type="nf4")
        state = module.state_dict()
        pieces[key] = {name.removeprefix("weights"): t for name, t in state.items()}
        del sample.tensors[key]
        sample.tensors.update({key + suffix: piece for suffix, piece in pieces[key].items()})
    return pieces


def test_codes_of_stacked_experts_are_cut_by_expert(
    make_sample: Callable[..., Any], tmp_path: Path
) -> None:
    sample = make_sample(True, hidden=24, inter=16, experts=5, write=False)
    pieces = stack(sample, False, 16, 24)
    sample.blocks = stacked_blocks(sample, transpose=False)
    sample.write(3)
    store = sample.prepare(tmp_path / "store")
    key = "language_model.model.layers.1.moe.experts.{}"
    for e, tensors in streamed(store, "layers.1.moe"):
        if e is not None:
            for name in ("gate_up_proj", "down_proj"):
                assert torch.equal(tensors[name], dequantized(pieces[key.format(name)])[e])
    codes = pieces[key.format("down_proj")][""].view(5, -1)
    assert torch.equal(held(store, "layers.1.moe")["experts.3.down_proj.weight"], codes[3])


@pytest.mark.parametrize("codec", ["nf4", "bf16"])
def test_codes_along_the_other_dimension_cannot_be_kept(
    make_sample: Callable[..., Any], tmp_path: Path, codec: str
) -> None:
    sample = make_sample(True, hidden=24, inter=16, experts=5, write=False)
    pieces = stack(sample, True, 16, 24)
    sample.blocks = stacked_blocks(sample, transpose=True)
    sample.write()
    if codec == "nf4":
        with pytest.raises(CheckpointError) as caught:
            sample.prepare(tmp_path / "store", codec)
        assert len(caught.value.problems) == 2 * 2 * 5
        assert "the other dimension" in caught.value.problems[0]
        assert "--codec int8 or bf16" in caught.value.problems[0]
        return
    store = sample.prepare(tmp_path / "store", codec)
    want = dequantized(pieces["language_model.model.layers.0.moe.experts.down_proj"])
    found = held(store, "layers.0.moe")
    assert all(torch.equal(found[f"experts.{e}.down_proj.weight"], want[e].T) for e in range(5))


def test_slices_that_share_a_block_are_refused(
    make_sample: Callable[..., Any], tmp_path: Path
) -> None:
    sample = make_sample(True, hidden=10, inter=7, experts=4, write=False)
    stack(sample, False, 7, 10)
    sample.blocks = stacked_blocks(sample, transpose=False)
    sample.write()
    with pytest.raises(CheckpointError) as caught:
        sample.prepare(tmp_path / "store")
    assert "reach across its slices" in caught.value.problems[0]


def fp4(t: dict[str, Tensor], key: str, weight: Tensor) -> None:
    t.update({key + s: p for s, p in quantized(weight, quant_type="fp4").items()})
    del t[f"{key}.quant_state.bitsandbytes__nf4"]


def wide_blocks(t: dict[str, Tensor], key: str, weight: Tensor) -> None:
    t.update({key + s: p for s, p in quantized(weight, blocksize=128).items()})


def int8(t: dict[str, Tensor], key: str, weight: Tensor) -> None:
    for name in [name for name in t if name.startswith(key)]:
        del t[name]
    t[key] = torch.zeros(weight.shape, dtype=torch.int8)


REFUSED: list[tuple[str, Callable[[dict[str, Tensor], str, Tensor], Any], str]] = [
    ("fp4", fp4, "to fp4; only NF4"),
    ("blocks", wide_blocks, "blocks of 128 weights; only blocks of 64"),
    ("lost", lambda t, k, _: t.pop(f"{k}.absmax"), "absmax is missing"),
    ("state", lambda t, k, _: t.pop(f"{k}.quant_state.bitsandbytes__nf4"), "something else"),
    ("half", lambda t, k, _: t.update({k: t[k][:100]}), "200 weights, which don't make"),
    ("scales", lambda t, k, _: t.update({f"{k}.absmax": t[f"{k}.absmax"].half()}), "is F16, which"),
    ("int8", int8, "is I8"),
]


@pytest.mark.parametrize(("what", "damage", "message"), REFUSED, ids=[r[0] for r in REFUSED])
def test_what_cannot_be_kept_is_said_at_once(
    tmp_path: Path,
    what: str,
    damage: Callable[[dict[str, Tensor], str, Tensor], Any],
    message: str,
) -> None:
    tensors, _ = mixtral(torch.bfloat16)
    key = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    damage(tensors, key, torch.randn(64, 48).bfloat16())
    write(tmp_path / "checkpoint", MIXTRAL, tensors)
    with pytest.raises(CheckpointError) as caught:
        make(tmp_path / "checkpoint", tmp_path / "store", MIXTRAL)
    assert len(caught.value.problems) == 1
    assert message in caught.value.problems[0]
    assert not (tmp_path / "store").exists()


def changed(state: Tensor, **values: Any) -> Tensor:
    content = json.loads(bytes(state.tolist())) | values
    return torch.tensor(list(json.dumps(content).encode()), dtype=torch.uint8)


def bend(t: dict[str, Tensor], key: str) -> None:
    t[f"{key}.quant_map"] = t[f"{key}.quant_map"] * 1.01


WRONG: list[tuple[str, Callable[[dict[str, Tensor], str, str], Any], str]] = [
    ("levels", lambda t, k, _: bend(t, k), "other levels than NF4's"),
    ("shape", lambda t, k, s: t.update({s: changed(t[s], shape=[48, 64])}), r"was \[48, 64\]"),
    ("type", lambda t, k, s: t.update({s: changed(t[s], quant_type="fp4")}), "is fp4 in blocks"),
    ("json", lambda t, k, s: t.update({s: t[s][:-4]}), "damaged quant_state"),
    ("scale", lambda t, k, _: t[f"{k}.absmax"].fill_(torch.inf), "NaN or infinite"),
]


@pytest.mark.parametrize(("what", "damage", "message"), WRONG, ids=[w[0] for w in WRONG])
def test_what_only_the_contents_say_is_named(
    tmp_path: Path, what: str, damage: Callable[[dict[str, Tensor], str, str], Any], message: str
) -> None:
    tensors, _ = mixtral(torch.bfloat16)
    key = "model.layers.1.block_sparse_moe.experts.2.w2.weight"
    damage(tensors, key, f"{key}.quant_state.bitsandbytes__nf4")
    write(tmp_path / "checkpoint", MIXTRAL, tensors)
    with pytest.raises(CheckpointError, match=message) as caught:
        make(tmp_path / "checkpoint", tmp_path / "store", MIXTRAL)
    assert "experts.2.w2.weight" in caught.value.message


def test_parts_that_end_inside_a_block_are_refused(tmp_path: Path) -> None:
    config = MIXTRAL | {"intermediate_size": 9, "hidden_size": 36, "num_attention_heads": 4}
    tensors = {}
    for block in load_family(config).blocks:
        for t in (*block.plain, *block.linears):
            tensors[t.sources[0][0].key] = torch.randn(t.shape).bfloat16()
        for e in range(3 if block.experts else 0):
            at = f"model.layers.{block.layer}.block_sparse_moe.experts.{e}"
            for name, shape in (("w1", (9, 36)), ("w2", (36, 9)), ("w3", (9, 36))):
                for suffix, piece in quantized(torch.randn(shape).bfloat16()).items():
                    tensors[f"{at}.{name}.weight{suffix}"] = piece
    write(tmp_path / "checkpoint", config, tensors)
    with pytest.raises(CheckpointError) as caught:
        make(tmp_path / "checkpoint", tmp_path / "store", config)
    assert len(caught.value.problems) == 6
    assert "ends inside a block of 64" in caught.value.problems[0]
