"""The work that a plan counts is the work that the engine does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import reference
from torch.utils.flop_counter import FlopCounterMode

from lamina.data.batches import make_batch
from lamina.engine.step import Engine
from lamina.lora.adapter import Adapter, LoraSettings
from lamina.plan.memory import adapters
from lamina.plan.shapes import ModelShape, model_shape
from lamina.plan.work import (
    Setting,
    Work,
    block_work,
    expert_rows,
    head_work,
    kernel_shapes,
    kernels_kept,
    trains,
)
from lamina.recipe.load import load_recipe

LENGTH, SEQUENCES = 32, 2
TARGETS = [
    ("q_proj", "v_proj"),
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("experts",),
    ("experts.down_proj",),
    ("gate_up_proj",),
    ("all-linear",),
]
BUILDS = {"mixtral": reference.tiny_mixtral, "llama4": reference.tiny_llama4}


def setting(targets: tuple[str, ...], **changes: Any) -> Setting:
    values: dict[str, Any] = {
        "targets": targets,
        "r": 4,
        "train_router": False,
        "quantized": True,
        "item": 4,
        "length": LENGTH,
        "group_tokens": 4096,
        "blocked": True,
    }
    return Setting(**(values | changes))


def counted(shape: ModelShape, of: Setting, tokens: int) -> float:
    """All products of a step, as a plan counts them."""
    body = shape.body
    first = next(i for i, block in enumerate(body) if trains(block, of))
    total = Work()
    for place, block in enumerate(body):
        for backward in (False, True):
            if backward and place < first:
                continue
            work = block_work(shape, block, of, backward=backward, input_grad=place > first)
            total += work.token * tokens + work.row * (tokens * shape.top_k)
    learned, any_ = head_work(shape, of.item)
    total += learned * (tokens - SEQUENCES) + any_ * tokens
    return total.matrix + total.attention + total.lora


def products(folder: Path, targets: tuple[str, ...]) -> float:
    """The same, as torch counts them while the engine makes a step."""
    family = reference.family_of(folder)
    source = reference.resident_source(family, folder)
    adapter = Adapter(family, LoraSettings(4, 8, targets), seed=0, device="cpu")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 80, (SEQUENCES, LENGTH), generator=generator).tolist()
    batch = make_batch([(one, [True] * LENGTH) for one in ids])

    def in_place(_: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
        return int(2 * a[0] * a[1] * b[1])

    mapping = {torch.ops.aten.addmm_: in_place}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        Engine(family, source, adapter).forward_backward(batch)
    return float(counter.get_total_flops())


@pytest.mark.parametrize("targets", TARGETS)
@pytest.mark.parametrize("name", BUILDS)
def test_products_are_the_engines(name: str, targets: tuple[str, ...], tmp_path: Path) -> None:
    # Chunks as long as a sequence: shorter ones are filled up, which a plan leaves out.
    changes = {"attention_chunk_size": LENGTH} if name == "llama4" else {}
    BUILDS[name](**changes).save_pretrained(tmp_path)
    shape = model_shape(load_recipe("mini-mixtral", {"model": str(tmp_path)}))

    expected = products(tmp_path, targets)

    # Rows of an expert are filled up to multiples of 64 where it has more than 64.
    assert counted(shape, setting(targets), LENGTH * SEQUENCES) == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize("targets", [*TARGETS, ("self_attn.q_proj",), ("mlp.experts", "k_proj")])
@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("router", [False, True])
def test_trained_weights_are_the_adapters(
    name: str, targets: tuple[str, ...], router: bool, tmp_path: Path
) -> None:
    if name == "llama4" and "mlp.experts" in targets:
        targets = ("feed_forward.experts", "k_proj")
    BUILDS[name]().save_pretrained(tmp_path)
    shape = model_shape(load_recipe("mini-mixtral", {"model": str(tmp_path)}))
    settings = LoraSettings(4, 8, targets, train_router=router)

    adapter = Adapter(reference.family_of(tmp_path), settings, seed=0, device="cpu")

    found = adapters(shape, setting(targets, train_router=router))
    assert found.all == adapter.num_parameters
    trained = {block.name for block in shape.body if trains(block, setting(targets))}
    with_adapter = {name for name, one in adapter.blocks.items() if list(one.factors())}
    assert trained == with_adapter


def test_mini_mixtrals_arithmetic() -> None:
    """By hand, in the convention of the design: forward, recompute of what feeds a gradient,
    gradients of activations."""
    shape = model_shape(load_recipe("mini-mixtral"))
    of = setting(("q_proj",), r=16, length=512, blocked=False, item=2)
    h, kv, i = 576, 192, 1536
    attention = 2 * h * (h + 2 * kv) * 3 + 2 * h * h * 2 + 4 * h * 256 * (1 + 3.5)
    experts = 2 * (2 * h * 2 * i * 3 + 2 * h * i * 2) + 2 * 8 * h * 4
    expected = 30 * (attention + experts)

    total = Work()
    for block in shape.body:
        for backward in (False, True):
            work = block_work(shape, block, of, backward=backward)
            total += work.token + work.row * 2

    assert total.matrix + total.attention == pytest.approx(expected)


def test_float32_moves_twice_the_bytes_between_products() -> None:
    shape = model_shape(load_recipe("mini-maverick"))
    for block in shape.body[:4]:
        narrow, wide = (
            block_work(shape, block, setting(("q_proj",), item=item), backward=True)
            for item in (2, 4)
        )
        assert narrow.token.elementwise < wide.token.elementwise < 2 * narrow.token.elementwise
        assert wide.row.elementwise == 2 * narrow.row.elementwise


@pytest.mark.parametrize(("targets", "counted"), [((), 175), (("experts",), 549)])
def test_kernels_of_a_step(targets: tuple[str, ...], counted: int) -> None:
    """As oneDNN counted them (ONEDNN_VERBOSE=profile_create) in a step of mini-mixtral with 4
    sequences of 512 tokens. Routing decides the number, so it is a guess."""
    attention = ("q_proj", "k_proj", "v_proj", "o_proj")
    of = setting((*attention, *targets), r=16, length=512, group_tokens=1024, item=2)

    found = sum(kernel_shapes(model_shape(load_recipe("mini-mixtral")), of, 2048))

    assert found == pytest.approx(counted, rel=0.25)


def test_how_many_kernels_are_kept_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

    assert kernels_kept() == 64


def test_rows_are_filled_up() -> None:
    assert expert_rows(100_000, 2, 8)[0] == pytest.approx(25_000 + 32, abs=1)
    rows, chosen = expert_rows(64, 1, 128)
    assert rows == pytest.approx(0.5, abs=0.01)  # few are taken as they are
    assert 0.35 < chosen < 0.45
