"""The step by itself: streamed or resident, seeded, with dropout, and what it leaves out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import reference

from lamina.engine.sources import WeightSource
from lamina.engine.step import Engine, sft
from lamina.engine.streamed import StreamedSource, resident
from lamina.lora.adapter import Adapter, LoraSettings
from lamina.models import load_family
from lamina.store.convert import prepare
from lamina.store.layout import Store
from lamina.store.stream import Stream

LENGTHS = (23, 5, 17, 11)
MODELS = {"mixtral": reference.tiny_mixtral, "llama4": reference.tiny_llama4}


def make_store(name: str, codec: str, tmp_path: Path) -> Store:
    folder = reference.save(MODELS[name](), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    family = load_family(config)
    return prepare(
        folder,
        tmp_path / f"store-{codec}",
        model_type=config["model_type"],
        config=config,
        blocks=family.blocks,
        codec=codec,
        prefixes=family.checkpoint_prefixes,
        progress=None,
    )


@contextmanager
def streamed(store: Store, dtype: torch.dtype, cache: float = 0.0) -> Iterator[StreamedSource]:
    cache_bytes = int(cache * store.total_bytes)
    with Stream(store, ring_bytes=1 << 20, cache_bytes=cache_bytes) as stream:
        yield StreamedSource(store, stream, dtype, torch.device("cpu"))


def gradients(
    store: Store, source: WeightSource, *, steps: int = 1, dropout: float = 0.0, **settings: Any
) -> tuple[list[torch.Tensor], list[float]]:
    """All gradients and losses after `steps` steps without an update."""
    family = load_family(store.config)
    lora = LoraSettings(r=4, lora_alpha=8, target_modules=("all-linear",), lora_dropout=dropout)
    adapter = Adapter(family, lora, seed=0, device="cpu")
    reference.randomize(adapter, source)
    engine = Engine(family, source, adapter, **settings)
    losses = []
    for step in range(steps):
        batch = reference.batch_of(reference.random_sequences(LENGTHS, seed=step))
        then = "step" if step + 1 < steps else None
        losses.append(engine.forward_backward(batch, seed=11 + step, then=then).loss)
    return [p.grad for p in adapter.parameters() if p.grad is not None], losses


@pytest.mark.parametrize("codec", ["nf4", "int8", "bf16"])
@pytest.mark.parametrize("name", MODELS)
def test_streamed_equals_resident_bit_for_bit(name: str, codec: str, tmp_path: Path) -> None:
    store = make_store(name, codec, tmp_path)
    kept = resident(store, torch.bfloat16, torch.device("cpu"))
    expected, losses = gradients(store, kept, steps=3)
    for cache in (0.0, 0.3, 1.0):
        with streamed(store, torch.bfloat16, cache) as source:
            grads, streamed_losses = gradients(store, source, steps=3)
        assert streamed_losses == losses
        assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_bf16_store_is_lossless(tmp_path: Path) -> None:
    store = make_store("llama4", "bf16", tmp_path)
    plain = reference.resident_source(load_family(store.config), tmp_path / "model")
    expected, _ = gradients(store, plain)
    grads, _ = gradients(store, resident(store, torch.float32, torch.device("cpu")))
    assert all(torch.equal(a, b) for a, b in zip(grads, expected, strict=True))


def test_each_weight_is_read_once_forward_and_once_back(tmp_path: Path) -> None:
    store = make_store("mixtral", "bf16", tmp_path)
    body = sum(
        unit.nbytes
        for block in store.blocks
        if block.kind not in ("embed", "head")
        for unit in block.units
    )
    read = {}
    for repeats in (1, 4):
        with streamed(store, torch.float32) as source:
            family = load_family(store.config)
            lora = LoraSettings(r=2, lora_alpha=4, target_modules=("q_proj",))
            engine = Engine(family, source, Adapter(family, lora, seed=0, device="cpu"))
            sequences = reference.random_sequences(LENGTHS * repeats)
            engine.forward_backward(reference.batch_of(sequences))
            read[repeats] = source.take_stats().bytes_read
    assert read[1] == read[4]
    # What the embedding and the head take is read once, at the start. The first attention block has
    # q_proj to train, so the backward goes all the way.
    assert read[1] <= 2 * body


def test_idle_experts_are_skipped_in_this_walk_and_no_other(tmp_path: Path) -> None:
    store = make_store("mixtral", "bf16", tmp_path)
    mixture = next(block for block in load_family(store.config).blocks if block.kind == "moe")
    for then in (None, "forward"):
        with streamed(store, torch.float32) as source:
            source.begin("step", then=then)
            source.routed(mixture, [0])
            # Neither the way forward nor the way back has the idle expert; the next walk does.
            if then is not None:
                with source.expert(mixture, 1):
                    pass
            with pytest.raises(ValueError, match="isn't scheduled"), source.expert(mixture, 1):
                pass


@pytest.mark.parametrize("name", MODELS)
def test_float8_boundaries_keep_the_direction_of_the_gradients(name: str, tmp_path: Path) -> None:
    store = make_store(name, "bf16", tmp_path)
    source = resident(store, torch.float32, torch.device("cpu"))
    exact, losses = gradients(store, source)
    rounded, rounded_losses = gradients(store, source, float8_boundaries=True)
    assert rounded_losses == losses, "the forward doesn't use them"
    a, b = (torch.cat([g.flatten() for g in grads]) for grads in (exact, rounded))
    assert 0.98 < torch.cosine_similarity(a, b, dim=0) < 0.99999


@pytest.mark.parametrize("name", MODELS)
def test_dropout_is_replayed(name: str, tmp_path: Path) -> None:
    """With dropout, the gradient is that of the loss which the same masks give: a step along it
    changes the loss as the gradient says. Masks that differ between the forward and the recompute
    would not."""
    store = make_store(name, "bf16", tmp_path)
    source = resident(store, torch.float32, torch.device("cpu"))
    family = load_family(store.config)
    targets = ("all-linear",)
    lora = LoraSettings(r=4, lora_alpha=8, target_modules=targets, lora_dropout=0.3)
    adapter = Adapter(family, lora, seed=0, device="cpu")
    reference.randomize(adapter, source)
    engine = Engine(family, source, adapter, group_tokens=30)
    batch = reference.batch_of(reference.random_sequences(LENGTHS))

    def loss(seed: int | None) -> float:
        for parameter in adapter.parameters():
            parameter.grad = None
        result = engine.forward_backward(batch, seed=seed)
        return float(-result.logp_L.double().mean())

    assert loss(5) == loss(5)
    assert loss(5) != loss(6)
    assert loss(5) != loss(None)
    loss(5)
    grads = [p.grad.clone() for p in adapter.parameters() if p.grad is not None]
    norm = torch.stack([g.norm() for g in grads]).norm()
    epsilon = 3e-4  # small enough that no token changes its expert
    shifted = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, grad in zip(adapter.parameters(), grads, strict=True):
                parameter.add_(grad / norm, alpha=sign * epsilon)
        shifted.append(loss(5))
        with torch.no_grad():
            for parameter, grad in zip(adapter.parameters(), grads, strict=True):
                parameter.add_(grad / norm, alpha=-sign * epsilon)
    assert (shifted[0] - shifted[1]) / (2 * epsilon) == pytest.approx(float(norm), rel=2e-3)


@pytest.mark.parametrize("name", MODELS)
def test_packed_neighbours_do_not_change_a_gradient(name: str, tmp_path: Path) -> None:
    """The gradients of a step are the sums over its sequences, each alone."""
    store = make_store(name, "bf16", tmp_path)
    source = resident(store, torch.float32, torch.device("cpu"))
    family = load_family(store.config)
    lora = LoraSettings(r=4, lora_alpha=8, target_modules=("all-linear",))
    sequences = reference.random_sequences(LENGTHS)

    def summed(batches: list[Any]) -> list[torch.Tensor]:
        adapter = Adapter(family, lora, seed=0, device="cpu")
        reference.randomize(adapter, source)
        engine = Engine(family, source, adapter)
        for batch in batches:
            engine.forward_backward(
                batch, lambda logp_L: (-logp_L.sum(), torch.full_like(logp_L, -1.0))
            )
        return [p.grad for p in adapter.parameters() if p.grad is not None]

    together = summed([reference.batch_of(sequences)])
    alone = summed([reference.batch_of([sequence]) for sequence in sequences])
    for a, b in zip(together, alone, strict=True):
        assert reference.distance(a, b) < 1e-5


def test_objective_weights_scale_the_gradients(tmp_path: Path) -> None:
    """Weights that an objective computes from the log probabilities reach the gradients."""
    store = make_store("mixtral", "bf16", tmp_path)
    source = resident(store, torch.float32, torch.device("cpu"))
    family = load_family(store.config)
    batch = reference.batch_of(reference.random_sequences(LENGTHS))
    lora = LoraSettings(r=4, lora_alpha=8, target_modules=("all-linear",))

    def run(objective: Any) -> list[torch.Tensor]:
        adapter = Adapter(family, lora, seed=0, device="cpu")
        reference.randomize(adapter, source)
        Engine(family, source, adapter).forward_backward(batch, objective)
        return [p.grad for p in adapter.parameters() if p.grad is not None]

    def half(logp_L: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, weight_L = sft(logp_L)
        return loss / 2, weight_L / 2

    for whole, halved in zip(run(sft), run(half), strict=True):
        assert reference.distance(halved * 2, whole) < 1e-6


def test_an_interrupt_between_blocks_leaves_the_step(tmp_path: Path) -> None:
    store = make_store("mixtral", "bf16", tmp_path)
    source = resident(store, torch.float32, torch.device("cpu"))
    family = load_family(store.config)
    lora = LoraSettings(r=2, lora_alpha=4, target_modules=("q_proj",))
    calls = 0

    def stop() -> None:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt

    adapter = Adapter(family, lora, seed=0, device="cpu")
    engine = Engine(family, source, adapter, on_block=stop)
    with pytest.raises(KeyboardInterrupt):
        engine.forward_backward(reference.batch_of(reference.random_sequences(LENGTHS)))
    assert calls == 4
