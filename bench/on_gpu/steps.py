"""Whole optimizer steps of the engine, from a synthetic store in pinned memory."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lamina.data.batches import Batch, make_batch
from lamina.engine.sources import WeightSource
from lamina.engine.step import Engine
from lamina.kernels import products
from lamina.lora.adapter import Adapter, LoraSettings
from lamina.models.common import Family
from on_gpu import models
from on_gpu.machine import GB, Machine, pinned_size, ram_available
from on_gpu.source import PinnedSource
from on_gpu.synthetic import SyntheticStore

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
#: Left to the system, to Python and to what the engine pins beside its boundaries.
SPARE_RAM = 12 * GB


@dataclass(frozen=True)
class Rates:
    """What the machine was measured to do: FLOP/s in bf16, bytes/s from host to device."""

    matrix: float
    copy: float


@dataclass(frozen=True)
class Job:
    """A model and the steps to be measured.

    Args:
        tokens: of each step.
        ring_bytes: device memory for weights in nf4.
        most_stacks: how many mixture blocks have experts of their own, at most.
    """

    name: str
    config: dict[str, object]
    tokens: Sequence[int]
    length: int = 2048
    ring_bytes: int = 6 * GB
    group_tokens: int = 4096
    logits_bytes: int = 256 << 20
    most_stacks: int | None = None


def ways(machine: Machine) -> list[str]:
    """How the experts' weights reach a product."""
    return ["dequantize", *(["fused"] if products.fused_runs_on(machine.device) else [])]


def batch_of(tokens: int, length: int, vocab_size: int) -> Batch:
    """Sequences of `length` tokens (the last may be shorter), all of them learned."""
    generator = torch.Generator().manual_seed(tokens)
    lengths = [length] * (tokens // length) + ([tokens % length] if tokens % length else [])
    return make_batch(
        [
            (torch.randint(3, vocab_size, (n,), generator=generator).numpy(), [True] * n)
            for n in lengths
        ]
    )


def adapter_of(
    family: Family, device: torch.device, targets: Sequence[str], *, drawn: bool = False
) -> Adapter:
    """LoRA of rank 16. `drawn`: no factor is zero, so that no gradient is."""
    adapter = Adapter(family, LoraSettings(16, 32, tuple(targets)), seed=0, device=device)
    if drawn:
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for block in adapter.blocks.values():
                for pair in block.factors():
                    pair.b.copy_(torch.randn(pair.b.shape, generator=generator) * 0.05)
    adapter.zero_grad()
    return adapter


def distinct_stacks(family: Family, tokens: int) -> tuple[int, int]:
    """How many mixture blocks' experts the RAM holds beside everything else, and how many the model
    has."""
    mixtures = sum(block.kind == "moe" for block in family.blocks)
    stack = SyntheticStore.stack_bytes(family)
    blocks = len(family.blocks) - 2
    boundaries = pinned_size(blocks * tokens * family.config.hidden_size * 2)
    # The dense parts are a small part of every model here: 4.25 bits a weight.
    dense = sum(
        math.prod(linear.shape) * 17 // 32 for block in family.blocks for linear in block.linears
    )
    room = ram_available() - SPARE_RAM - boundaries - dense
    return max(1, min(mixtures, room // stack)), mixtures


def measure(job: Job, machine: Machine, rates: Rates) -> None:
    """Prints a table: a row for each way and number of tokens."""
    family = models.family(job.config)
    distinct, mixtures = distinct_stacks(family, max(job.tokens))
    distinct = min(distinct, job.most_stacks or mixtures)
    start = time.monotonic()
    store = SyntheticStore(family, machine, distinct)
    aliased = (
        f"**the experts of its {mixtures} mixture blocks are aliased to {distinct} blocks' worth**"
        if distinct < mixtures
        else "nothing aliased"
    )
    print(
        f"\n### {job.name}: {store.total_bytes / GB:.1f} GB in nf4, {store.held_bytes / GB:.1f} GB "
        f"in RAM, {aliased}; made in {time.monotonic() - start:.0f} s\n"
    )
    print(
        f"LoRA r=16 on attention, sequences of {job.length}, ring of "
        f"{job.ring_bytes / GB:.2g} GB, {models.flops_a_token(family, job.length) / 1e9:.1f} "
        "GFLOP a token\n"
    )
    print(
        "| experts | tokens a step | s a step | tok/s | of the matrix rate | copied | of the copy "
        "rate | stalled | peak VRAM |\n|---|---|---|---|---|---|---|---|---|",
        flush=True,
    )
    try:
        _rows(job, family, store, machine, rates)
    finally:
        store.close()


def _rows(job: Job, family: Family, store: SyntheticStore, machine: Machine, rates: Rates) -> None:
    adapter = adapter_of(family, machine.device, ATTENTION)
    last = 0.0
    for way in ways(machine):
        source = PinnedSource(store, machine, ring_bytes=job.ring_bytes, fused=way == "fused")
        engine = Engine(
            family,
            source,
            adapter,
            device=machine.device,
            group_tokens=job.group_tokens,
            logits_bytes=job.logits_bytes,
        )
        # The largest step first: its boundaries, which aren't given back, serve the smaller ones.
        for number, tokens in enumerate(sorted(job.tokens, reverse=True)):
            # The first step compiles and measures kernels; after it, one is like another.
            steps = 2 if number == 0 and machine.repeats > 1 else 1
            if machine.seconds_left() < last * steps * 1.2:
                print(f"| {way} | {tokens:,} | not begun: the time is up | | | | | | |")
                continue
            last = _row(way, tokens, steps, job, engine, source, machine, rates)
        del source, engine
        machine.forget_peak()


def _row(
    way: str,
    tokens: int,
    steps: int,
    job: Job,
    engine: Engine,
    source: PinnedSource,
    machine: Machine,
    rates: Rates,
) -> float:
    family = engine.family
    batch = batch_of(tokens, job.length, family.config.vocab_size)
    assert engine.adapter is not None
    machine.forget_peak()
    for _ in range(steps):
        engine.adapter.zero_grad()
        source.take_stats()
        start = time.monotonic()
        result = engine.forward_backward(batch)
        machine.synchronize()
        seconds = time.monotonic() - start
    stats = source.take_stats()
    if not math.isfinite(result.loss):
        raise RuntimeError(f"the loss is {result.loss}")
    flops = tokens * models.flops_a_token(family, job.length)
    print(
        f"| {way} | {tokens:,} | {seconds:.2f} | {tokens / seconds:.0f} "
        f"| {flops / seconds / rates.matrix:.0%} | {stats.bytes_read / GB:.1f} GB "
        f"| {stats.bytes_read / seconds / rates.copy:.0%} | {stats.seconds_waited / seconds:.0%} "
        f"| {machine.peak() / GB:.1f} GB |",
        flush=True,
    )
    return seconds


# --- are the gradients right?


def check(machine: Machine) -> bool:
    """Small models: losses and gradients of each way in bf16 against fp32 and weights decoded by
    the reference. Prints a table."""
    print("\n### The engine on small models, bf16 against fp32\n")
    print(
        "| model | experts | loss | fp32 loss | gradients' distance | |\n|---|---|---|---|---|---|"
    )
    right = True
    for name, config in (("Mixtral", models.SMALL_MIXTRAL), ("Llama 4", models.SMALL_LLAMA4)):
        family = models.family(config)
        store = SyntheticStore(family, machine, sum(b.kind == "moe" for b in family.blocks))
        batch = batch_of(150, 40, family.config.vocab_size)

        resident = store.resident(machine.device, torch.float32)
        exact_loss, exact = _gradients(family, resident, batch, machine, steps=1)
        for way in ways(machine):
            ring = 3 * max(unit.nbytes for unit in store.units)
            source = PinnedSource(store, machine, ring_bytes=ring, fused=way == "fused")
            # Twice: what is read ahead for a second step must be what it needs.
            loss, gradients = _gradients(family, source, batch, machine, steps=2)
            distance = float((gradients - exact).norm() / exact.norm())
            # bf16 has 8 bits, and a token near a tie may go to another expert.
            good = abs(loss - exact_loss) < 0.02 * exact_loss and distance < 0.25
            right &= good
            print(
                f"| {name} | {way} | {loss:.4f} | {exact_loss:.4f} | {distance:.4f} "
                f"| {'ok' if good else 'WRONG'} |",
                flush=True,
            )
        store.close()
    return right


def _gradients(
    family: Family, source: WeightSource, batch: Batch, machine: Machine, *, steps: int
) -> tuple[float, Tensor]:
    """The loss and all gradients of the last of some equal steps."""
    adapter = adapter_of(family, machine.device, ("all-linear",), drawn=True)
    engine = Engine(family, source, adapter, device=machine.device, group_tokens=64)
    losses = []
    for step in range(steps):
        adapter.zero_grad()
        result = engine.forward_backward(batch, then="step" if step + 1 < steps else None)
        losses.append(result.loss)
    if max(losses) - min(losses) > 1e-3 * losses[0]:
        raise RuntimeError(f"the same step gave losses of {losses}")
    grads = [p.grad.flatten() for p in adapter.parameters() if p.grad is not None]
    return losses[-1], torch.cat(grads).double()
