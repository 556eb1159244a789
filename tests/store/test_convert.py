"""From a checkpoint to a store: exact, and all mistakes at once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lamina.errors import CheckpointError
from lamina.store import jobs
from lamina.store.codec import CODECS, decode, encode
from lamina.store.layout import MANIFEST
from lamina.store.reader import verify


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_store_holds_the_encoded_checkpoint(
    make_sample: Callable[..., Any], tmp_path: Path, codec: str, stacked: bool, shards: int
) -> None:
    sample = make_sample(stacked, shards=shards)
    store = sample.prepare(tmp_path / "store", codec)
    assert store.model_type == "sample"
    assert store.codec == codec
    assert store.config == sample.config
    assert [block.name for block in store.blocks] == [block.name for block in sample.blocks]
    assert verify(store) == []
    for block in store.blocks:
        held = load_file(store.path / block.file)
        for unit in block.units:
            prefix = "" if unit.expert is None else f"experts.{unit.expert}."
            for tensor in unit.tensors:
                want = sample.expected(block.name, unit.expert, tensor.name)
                assert tuple(want.shape) == tensor.shape
                quantized = block.kind not in ("embed", "head") and want.dim() == 2
                quantized &= tensor.name != "router"
                assert tensor.codec == (codec if quantized else "bf16")
                encoded = encode(want, tensor.codec)
                name = f"{prefix}{tensor.name}.weight"
                got = {suffix: held[name + suffix] for suffix in encoded}
                assert all(torch.equal(got[suffix], encoded[suffix]) for suffix in encoded)
                if tensor.codec == "bf16":
                    assert torch.equal(
                        decode(got, want.shape, "bf16", torch.bfloat16).view(torch.int16),
                        want.view(torch.int16),
                    )


def test_units_are_aligned_and_padding_is_declared(
    make_sample: Callable[..., Any], tmp_path: Path
) -> None:
    store = make_sample(True).prepare(tmp_path / "store")
    for block in store.blocks:
        assert block.header_bytes % 4096 == 0
        end = block.header_bytes
        for unit in block.units:
            assert unit.offset == end
            assert unit.nbytes % 4096 == 0
            assert all(piece.start % 64 == 0 for t in unit.tensors for piece in t.pieces)
            end += unit.nbytes
        assert end == block.nbytes == (store.path / block.file).stat().st_size
        with safe_open(store.path / block.file, "pt") as f:
            paddings = [name for name in f.keys() if name.startswith("padding.")]  # noqa: SIM118
            assert paddings
            assert f.metadata()["block"] == block.name
    assert store.total_bytes == sum(b.nbytes - b.header_bytes for b in store.blocks)


def test_unused_tensors_and_small_files_go_along(
    make_sample: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = make_sample(True, write=False)
    vision = {
        "vision_model.patch": torch.randn(7, 5),
        "vision_model.scale": torch.arange(9, dtype=torch.uint8),
        "vision_model.fp8": torch.randn(4, 3).to(torch.float8_e4m3fn),
        "vision_model.empty": torch.empty(0, 4),
        "vision_model.count": torch.tensor(3),
    }
    sample.tensors.update(vision)
    sample.write()
    kept = ("tokenizer.json", "tokenizer.model", "merges.txt", "chat_template.jinja", "LICENSE.txt")
    left = ("modeling.py", "pytorch_model.bin", "other.safetensors", "notes.pt", "store.json")
    for name in (*kept, *left):
        (sample.path / name).write_text(name)
    monkeypatch.setattr(jobs, "_EXTRA_BYTES", 100)
    store = sample.prepare(tmp_path / "store")
    assert len(store.extra) == 3
    found = {}
    for extra in store.extra:
        found.update(load_file(store.path / extra.file))
    assert found.keys() == vision.keys()
    assert all(
        found[name].dtype == vision[name].dtype
        and torch.equal(found[name].view(torch.uint8), vision[name].view(torch.uint8))
        for name in vision
        if vision[name].dim()
    )
    assert found["vision_model.count"] == 3
    assert all((store.path / name).read_text() == name for name in kept)
    assert (store.path / "config.json").exists()
    there = {path.name for path in store.path.iterdir()}
    assert there == {*kept, "config.json", MANIFEST, "blocks", *(e.file for e in store.extra)}
    assert json.loads((store.path / MANIFEST).read_text())["model_type"] == "sample"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("stacked", [False, True])
def test_other_dtypes_are_rounded_and_said_once(
    make_sample: Callable[..., Any], tmp_path: Path, dtype: torch.dtype, stacked: bool
) -> None:
    sample = make_sample(stacked, write=False)
    bf16 = {name: t.to(dtype).bfloat16() for name, t in sample.tensors.items()}
    sample.tensors = {name: t.to(dtype) for name, t in sample.tensors.items()}
    sample.write()
    store = sample.prepare(tmp_path / "store")
    assert len(store.notes) == 1
    assert ("F16" if dtype == torch.float16 else "F32") in store.notes[0]
    sample.tensors = bf16
    sample.write()
    other = sample.prepare(tmp_path / "other")
    assert other.notes == ()
    for mine, theirs in zip(store.units(), other.units(), strict=True):
        assert mine.checksum == theirs.checksum


def test_progress_counts_every_byte(make_sample: Callable[..., Any], tmp_path: Path) -> None:
    seen: list[tuple[int, int, str]] = []
    store = make_sample().prepare(tmp_path / "store", progress=lambda *a: seen.append(a))
    total = sum(nbytes for _, nbytes in store.files())
    assert [done for done, _, _ in seen] == sorted({done for done, _, _ in seen})
    assert seen[-1][:2] == (total, total)
    assert {what for _, _, what in seen} == {file for file, _ in store.files()}


# What can't be converted


def test_all_that_is_missing_or_does_not_fit_is_reported_before_anything_is_written(
    make_sample: Callable[..., Any], tmp_path: Path
) -> None:
    sample = make_sample(write=False)
    moe = "model.layers.1.moe"
    del sample.tensors["model.layers.0.input_layernorm.weight"]
    del sample.tensors[f"{moe}.experts.2.w1.weight"]
    del sample.tensors[f"{moe}.experts.2.w3.weight"]
    sample.tensors[f"{moe}.experts.0.w2.weight"] = torch.zeros(3, 4, dtype=torch.bfloat16)
    sample.tensors["lm_head.weight"] = torch.zeros(11, 21, dtype=torch.int32)
    sample.write()
    with pytest.raises(CheckpointError) as caught:
        sample.prepare(tmp_path / "store")
    text = "\n".join(caught.value.problems)
    assert len(caught.value.problems) == 4
    assert "model.layers.0.input_layernorm.weight" in text
    assert f"{moe}.experts.2.w1.weight, {moe}.experts.2.w3.weight" in text
    assert "[3, 4] should make [21, 9]" in text
    assert "I32" in text
    assert not (tmp_path / "store").exists()


def test_wrong_stacked_shapes_are_reported(make_sample: Callable[..., Any], tmp_path: Path) -> None:
    sample = make_sample(True, write=False)
    key = "language_model.model.layers.0.moe.experts."
    sample.tensors[key + "gate_up_proj"] = torch.zeros(2, 21, 18, dtype=torch.bfloat16)
    sample.tensors[key + "down_proj"] = torch.zeros(3, 21, 9, dtype=torch.bfloat16)
    sample.write()
    with pytest.raises(CheckpointError) as caught:
        sample.prepare(tmp_path / "store")
    text = "\n".join(caught.value.problems)
    assert "no slice 2" in text
    assert "[9, 21] (transposed) should make [21, 9]" in text
    assert len(caught.value.problems) == 4


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    ("stacked", "key", "named"),
    [
        (False, "model.layers.1.moe.experts.1.w3.weight", "experts.1.w3.weight"),
        (True, "language_model.model.layers.1.moe.experts.down_proj", "down_proj[1]"),
        (False, "model.embed.weight", "model.embed.weight"),
    ],
)
def test_weights_that_are_not_finite_are_named(
    make_sample: Callable[..., Any],
    tmp_path: Path,
    codec: str,
    stacked: bool,
    key: str,
    named: str,
) -> None:
    sample = make_sample(stacked, write=False)
    bad = sample.tensors[key]
    (bad[1] if bad.dim() == 3 else bad)[2, 3] = float("nan")
    sample.write()
    with pytest.raises(CheckpointError, match="NaN or infinite") as caught:
        sample.prepare(tmp_path / "store", codec)
    assert named in caught.value.message
    assert "w1" not in caught.value.message
    assert not list((tmp_path / "store").rglob("*.tmp"))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 5)


BREAKS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("gone", shutil.rmtree, "doesn't exist"),
    ("file", lambda p: (shutil.rmtree(p), p.write_text("x")), "is a file"),
    ("empty", lambda p: [f.unlink() for f in p.iterdir()], "has neither"),
    ("shard", lambda p: min(p.glob("*.safetensors")).unlink(), "model-00001-of-00002"),
    ("truncated", lambda p: truncate(min(p.glob("*.safetensors"))), "is truncated"),
    ("garbage", lambda p: min(p.glob("*.safetensors")).write_text("x" * 99), "isn't a safetensors"),
    (
        "header",
        lambda p: min(p.glob("*.safetensors")).write_bytes(b"\2" + bytes(9)),
        "damaged",
    ),
    ("index", lambda p: (p / "model.safetensors.index.json").write_text("{"), "can't be used"),
    (
        "outside",
        lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../b"}}'),
        "outside",
    ),
]


@pytest.mark.parametrize(("what", "damage", "message"), BREAKS, ids=[b[0] for b in BREAKS])
def test_unusable_checkpoints_are_explained(
    make_sample: Callable[..., Any],
    tmp_path: Path,
    what: str,
    damage: Callable[[Path], Any],
    message: str,
) -> None:
    sample = make_sample()
    damage(sample.path)
    with pytest.raises(CheckpointError) as caught:
        sample.prepare(tmp_path / "store")
    assert message in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_pickled_weights_are_not_read(make_sample: Callable[..., Any], tmp_path: Path) -> None:
    sample = make_sample(write=False)
    sample.path.mkdir()
    torch.save(sample.tensors, sample.path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="pickled"):
        sample.prepare(tmp_path / "store")


def test_a_tensor_that_only_the_index_has_is_reported(
    make_sample: Callable[..., Any], tmp_path: Path
) -> None:
    sample = make_sample()
    index = sample.path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["vision.lost"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"vision\.lost"):
        sample.prepare(tmp_path / "store")


def test_many_threads_write_the_same_store_and_leave_torch_as_it_was(
    make_sample: Callable[..., Any], tmp_path: Path
) -> None:
    sample = make_sample(True, hidden=96, inter=64, experts=9)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = sample.prepare(tmp_path / "one").fingerprint
        torch.set_num_threads(6)
        assert sample.prepare(tmp_path / "six").fingerprint == one
        assert torch.get_num_threads() == 6
        sample.tensors["language_model.model.layers.0.moe.experts.down_proj"][8, 0, 0] = torch.nan
        sample.write()
        with pytest.raises(CheckpointError, match=r"down_proj\[8\]"):
            sample.prepare(tmp_path / "bad")
        assert torch.get_num_threads() == 6
    finally:
        torch.set_num_threads(before)
