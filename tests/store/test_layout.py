"""Opening a store: quick, and every fault named."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from lamina.errors import StoreError
from lamina.models.spec import Block, Experts, Part, Plain
from lamina.store.layout import (
    FORMAT,
    MANIFEST,
    BlockChecksums,
    Store,
    manifest_block,
    plan_block,
    plan_blocks,
    seal,
)
from lamina.store.pieces import unit_layout


def rewrite(root: Path, change: Callable[[dict[str, Any]], Any], *, sealed: bool = True) -> None:
    manifest = json.loads((root / MANIFEST).read_text())
    change(manifest)
    if sealed:
        manifest["fingerprint"] = seal(manifest)
    (root / MANIFEST).write_text(json.dumps(manifest))


def test_the_size_of_a_store_is_known_beforehand(
    make_sample: Callable[..., Any], tmp_path: Path
) -> None:
    sample = make_sample(True)
    for codec in ("nf4", "int8", "bf16"):
        planned = plan_blocks(sample.blocks, codec)
        store = sample.prepare(tmp_path / codec, codec)
        assert [(b.file, b.nbytes) for b in planned] == list(store.files())
        for layout, block in zip(planned, store.blocks, strict=True):
            assert layout.dense.nbytes == block.dense.nbytes
            assert layout.num_experts == len(block.experts)


def test_all_damage_is_named_at_open(make_sample: Callable[..., Any], tmp_path: Path) -> None:
    store = make_sample().prepare(tmp_path / "store")
    first, second, third = (store.path / block.file for block in store.blocks[:3])
    os.truncate(first, 5000)
    second.unlink()
    with third.open("ab") as f:
        f.write(b"x")
    with pytest.raises(StoreError) as caught:
        Store.open(store.path)
    truncated, gone, longer = caught.value.problems
    assert str(first) in truncated
    assert "is truncated: it has 5,000 of" in truncated
    assert str(second) in gone
    assert str(third) in longer
    assert "lamina prepare" in str(caught.value.hint)


def test_what_is_no_store_is_refused(make_sample: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="doesn't exist"):
        Store.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        Store.open(tmp_path / "file")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StoreError, match="isn't a store"):
        Store.open(tmp_path / "folder")


MANIFEST_FAULTS: list[tuple[str, Callable[[Path], Any], str]] = [
    ("format", lambda p: rewrite(p, lambda m: m.update(format=FORMAT + 1)), "of format 2"),
    ("no format", lambda p: (p / MANIFEST).write_text("[1]"), "isn't the description"),
    ("not json", lambda p: (p / MANIFEST).write_text("{"), "isn't JSON"),
    ("binary", lambda p: (p / MANIFEST).write_bytes(b"\xff\xfe\xff"), "isn't JSON"),
    ("changed", lambda p: rewrite(p, lambda m: m.update(codec="bf16"), sealed=False), "checksum"),
    ("lacking", lambda p: rewrite(p, lambda m: m.pop("blocks")), "lacks"),
    ("lacking more", lambda p: rewrite(p, lambda m: m["blocks"][0].pop("dense")), "lacks"),
    ("other type", lambda p: rewrite(p, lambda m: m.update(blocks=3)), "lacks"),
]


@pytest.mark.parametrize(
    ("what", "damage", "message"), MANIFEST_FAULTS, ids=[f[0] for f in MANIFEST_FAULTS]
)
def test_a_damaged_manifest_is_an_error(
    make_sample: Callable[..., Any],
    tmp_path: Path,
    what: str,
    damage: Callable[[Path], Any],
    message: str,
) -> None:
    store = make_sample(layers=1).prepare(tmp_path / "store")
    damage(store.path)
    with pytest.raises(StoreError, match=message) as caught:
        Store.open(store.path)
    assert caught.value.hint


def test_a_store_of_another_model_is_told_apart(
    make_sample: Callable[..., Any], tmp_path: Path
) -> None:
    sample = make_sample()
    store = sample.prepare(tmp_path / "store")
    store.check_model(sample.blocks)
    with pytest.raises(StoreError, match="another model") as caught:
        store.check_model(sample.blocks[:-1])
    assert len(caught.value.problems) == 1
    assert "head" in caught.value.problems[0]
    moe = sample.blocks[2]
    assert moe.experts is not None
    wider = replace(moe, experts=replace(moe.experts, intermediate_size=10))
    with pytest.raises(StoreError, match="another model") as caught:
        store.check_model([*sample.blocks[:2], wider, *sample.blocks[3:]])
    assert len(caught.value.problems) == 1
    assert "other tensors or shapes" in caught.value.problems[0]


def test_blocks_and_units_are_found(make_sample: Callable[..., Any], tmp_path: Path) -> None:
    store = make_sample().prepare(tmp_path / "store")
    moe = store.block("layers.1.moe")
    assert moe.kind == "moe"
    assert moe.layer == 1
    assert [unit.expert for unit in moe.units] == [None, 0, 1, 2]
    assert moe.experts[2].block == "layers.1.moe"
    assert [t.name for t in moe.experts[2].tensors] == ["gate_up_proj", "down_proj"]
    assert str(moe.experts[2]) == "block layers.1.moe, expert 2"
    with pytest.raises(KeyError):
        store.block("layers.9.moe")


def test_the_fingerprint_follows_the_contents(
    make_sample: Callable[..., Any], tmp_path: Path
) -> None:
    sample = make_sample()
    one = sample.prepare(tmp_path / "one").fingerprint
    assert sample.prepare(tmp_path / "two").fingerprint == one
    assert sample.prepare(tmp_path / "int8", "int8").fingerprint != one
    sample.tensors["lm_head.weight"][0] += 1
    sample.write()
    assert sample.prepare(tmp_path / "other").fingerprint != one


def test_maverick_opens_in_well_under_a_second(tmp_path: Path) -> None:
    """24 blocks of 128 experts at their true shape; the files are holes."""

    def moe(layer: int) -> Block:
        sources = ((Part("x"),),)
        experts = Experts(
            module="m",
            router="router",
            router_module="r",
            num_experts=128,
            hidden_size=5120,
            intermediate_size=8192,
            transposed=True,
            gate_up_sources=lambda _: sources,
            down_sources=lambda _: sources,
        )
        router = Plain("router", (128, 5120), sources)
        return Block(f"layers.{layer}.moe", "moe", layer, (router,), (), experts)

    (tmp_path / "blocks").mkdir()
    entries, none = [], "0" * 32
    for i in range(24):
        layout = plan_block(i, moe(i), "nf4")
        with (tmp_path / layout.file).open("wb") as f:
            f.write(layout.header)
            f.truncate(layout.nbytes)
        entries.append(manifest_block(layout, BlockChecksums(none, none, (none,) * 128)))
    manifest = {
        "format": FORMAT,
        "model_type": "llama4",
        "codec": "nf4",
        "config": {},
        "source": "",
        "notes": [],
        "blocks": entries,
        "extra": [],
    }
    manifest["fingerprint"] = seal(manifest)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    started = time.perf_counter()
    store = Store.open(tmp_path)
    took = time.perf_counter() - started
    assert len(list(store.units())) == 24 * 129
    assert 4.25 * 24 * 16.1e9 / 8 < store.total_bytes < 4.26 * 24 * 16.2e9 / 8
    assert took < 0.5
    with safe_open(tmp_path / store.blocks[0].file, "pt") as f:
        assert f.get_slice("experts.127.down_proj.weight").get_shape() == [5120 * 8192 // 2]


def test_a_unit_is_aligned() -> None:
    # 3 x 5 weights: 8 bytes of codes, at 64 one scale.
    assert unit_layout([("a", (3, 5), "nf4")]).nbytes == 4096
    both = unit_layout([("a", (4096 * 64, 2), "nf4"), ("b", (7,), "bf16")])
    assert both.nbytes == 4096 * 64 + 16384 + 4096
