"""How well reads hide behind arithmetic: step times with a throttled reader.

    python bench/streaming.py [--tokens 1024] [--pairs 1]

mini-mixtral from an NF4 store without a cache, LoRA r=16 on attention, at several read rates around
break-even (where reading the store twice takes as long as the step's arithmetic) and with rings of
3% and 20% of the store. `limit` is the larger of the arithmetic alone (everything cached) and the
reads alone; `sum` is what a step takes without read-ahead. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch

from lamina.data.batches import Batch, make_batch
from lamina.engine.loop import lora_settings
from lamina.engine.model import Model, open_model
from lamina.engine.step import Engine
from lamina.engine.streamed import StreamedSource
from lamina.lora.adapter import Adapter
from lamina.recipe.load import load_recipe
from lamina.store.stream import Stream
from training import ATTENTION, MODEL, sequences


def step_seconds(
    model: Model,
    batch: Batch,
    *,
    ring: float,
    rate: float | None,
    cached: bool = False,
    read_ahead: bool = True,
) -> tuple[float, float]:
    """Seconds of a step in the midst of others, and those of them that it waited for weights.

    Args:
        ring: as a share of the store.
        rate: bytes a second, or None for what the disk gives.
        cached: keep the whole store in memory.
    """
    total = model.store.total_bytes
    adapter = Adapter(model.family, lora_settings(model.recipe), seed=0, device="cpu")
    with Stream(
        model.store,
        ring_bytes=int(ring * total),
        cache_bytes=total if cached else 0,
        throttle=rate,
        read_ahead=read_ahead,
    ) as stream:
        source = StreamedSource(model.store, stream, model.dtype, model.device)
        engine = Engine(model.family, source, adapter, group_tokens=1024, logits_bytes=48 << 20)
        for number in range(2):
            start = time.monotonic()
            adapter.zero_grad()
            engine.forward_backward(batch, then="step" if number < 1 else None)
            seconds = time.monotonic() - start
            waited = source.take_stats().seconds_waited
    return seconds, waited


def read_bytes(model: Model) -> int:
    """What a step reads: everything between the embedding and the head, twice."""
    body = [b for b in model.store.blocks if b.kind not in ("embed", "head")]
    return 2 * sum(unit.nbytes for block in body for unit in block.units)


def table(model: Model, batch: Batch, longer: Batch, factors: Sequence[float]) -> None:
    step_seconds(model, batch, ring=0.2, rate=None, cached=True)  # compiles kernels
    compute, _ = step_seconds(model, batch, ring=0.2, rate=None, cached=True)
    nbytes = read_bytes(model)
    break_even = nbytes / compute
    print(
        f"{batch.num_tokens} tokens a step: arithmetic alone {compute:.2f} s, "
        f"{nbytes / 1e6:.0f} MB to read, break-even at {break_even / 1e6:.0f} MB/s\n"
    )
    print("| tokens | rate / break-even | ring | seconds | limit | ratio | waited | sum |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for factor in factors:
        rate = factor * break_even
        reads = nbytes / rate
        plain, _ = step_seconds(model, batch, ring=0.2, rate=rate, read_ahead=False)
        for ring in (0.03, 0.2):
            seconds, waited = step_seconds(model, batch, ring=ring, rate=rate)
            limit = max(compute, reads)
            print(
                f"| {batch.num_tokens} | {factor:.2f} | {ring:.0%} | {seconds:.2f} | {limit:.2f} "
                f"| {seconds / limit:.2f} | {waited / seconds:.0%} | {plain:.2f} |",
                flush=True,
            )
    compute, _ = step_seconds(model, longer, ring=0.2, rate=None, cached=True)
    seconds, waited = step_seconds(model, longer, ring=0.03, rate=break_even)
    limit = max(compute, nbytes / break_even)
    print(
        f"| {longer.num_tokens} | 1.00 | 3% | {seconds:.2f} | {limit:.2f} "
        f"| {seconds / limit:.2f} | {waited / seconds:.0%} | - |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--factors", type=float, nargs="+", default=[0.5, 0.75, 1.0, 1.5, 2.0])
    args = parser.parse_args()
    torch.manual_seed(0)
    model = open_model(load_recipe(MODEL, {"target_modules": ATTENTION}))

    def batch_of(tokens: int) -> Batch:
        ids = sequences(1, tokens)[0]
        parts = [ids[at : at + 256] for at in range(0, tokens, 256)]
        return make_batch([(part, [True] * len(part)) for part in parts])

    table(model, batch_of(args.tokens), batch_of(int(1.6 * args.tokens)), args.factors)


if __name__ == "__main__":
    main()
