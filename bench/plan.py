"""What a plan predicts beside what the engine then takes, on this machine.

    python bench/plan.py [--sequences 4 8 16] [--length 512] [--models mini-mixtral mini-maverick]

Measures the machine first, as `lamina doctor` does. Then, for both small models, three sizes of a
step, LoRA on attention and on attention and all experts: one optimizer step after one that warms
up, each in a process of its own. A peak is the resident set, Python and libraries included.
Prints a Markdown table. The goals: time within 15%, memory within 10%.

--one-thread is for a machine that has other work: rates and steps are those of one thread, by its
processor time, which leaves the others' share out.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
TIME_GOAL, MEMORY_GOAL = 0.15, 0.10


def overrides(job: dict[str, Any]) -> dict[str, Any]:
    """What the jobs' recipes differ in."""
    return {
        "target_modules": ATTENTION + (["experts"] if job["experts"] else []),
        "tokens_per_step": job["count"] * job["length"],
        "max_length": job["length"],
    }


def text(model: str, count: int, length: int) -> list[list[int]]:
    """Real text: the standard library's docstrings, tokenized and cut to one length."""
    import pydoc_data.topics

    from transformers import AutoTokenizer

    from lamina.engine.prepare import prepare

    tokenizer = AutoTokenizer.from_pretrained(prepare(model).path)
    ids: list[int] = []
    for topic in pydoc_data.topics.topics.values():
        ids += tokenizer(topic)["input_ids"]
        if len(ids) >= count * length:
            break
    return [ids[n * length : (n + 1) * length] for n in range(count)]


def clock_of(job: dict[str, Any]) -> Callable[[], float]:
    """What time is taken by."""
    if not job["one_thread"]:
        return time.monotonic
    import torch

    torch.set_num_threads(1)
    return time.thread_time


def step(job: dict[str, Any]) -> dict[str, Any]:
    """One optimizer step, as a run makes it, after one that warms up."""
    from torch.nn.utils import clip_grads_with_norm_, get_total_norm

    from lamina.data.batches import make_batch
    from lamina.engine.loop import lora_settings
    from lamina.engine.model import open_model
    from lamina.engine.step import Engine
    from lamina.lora.adapter import Adapter
    from lamina.optim import make_optimizer
    from lamina.recipe.load import load_recipe

    recipe = load_recipe(job["model"], overrides(job))
    model = open_model(recipe)
    adapter = Adapter(model.family, lora_settings(recipe), seed=0, device="cpu")
    optimizer = make_optimizer(
        adapter.parameters(),
        optim=recipe.optim,
        learning_rate=1e-4,
        betas=(0.9, 0.999),
        epsilon=1e-8,
        weight_decay=0.0,
    )
    batch = make_batch([(ids, [True] * len(ids)) for ids in job["text"]])
    clock, seconds = clock_of(job), 0.0
    with model.streamed() as source:
        engine = Engine(
            model.family,
            source,
            adapter,
            group_tokens=recipe.group_tokens,
            logits_bytes=model.logits_bytes,
        )
        for number in range(2):
            start = clock()
            adapter.zero_grad()
            engine.forward_backward(batch, then="step" if number == 0 else None)
            grads = [p.grad for p in adapter.parameters() if p.grad is not None]
            clip_grads_with_norm_(adapter.parameters(), 1.0, get_total_norm(grads))
            optimizer.step()
            seconds = clock() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak": peak}


def machine(job: dict[str, Any]) -> dict[str, Any]:
    """What `lamina doctor` measures."""
    from lamina.plan.measure import measure_machine

    return asdict(measure_machine(clock=clock_of(job)))


KINDS = {"step": step, "machine": machine}


def measure(kind: str, job: dict[str, Any]) -> dict[str, Any]:
    """Run one kind in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        command = [sys.executable, "-W", "ignore", __file__, "--child", kind, str(path)]
        environment = os.environ | {
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_OFFLINE": "1",
            "GOMP_SPINCOUNT": "10000",  # as the command line sets it
        }
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--models", nargs="+", default=["mini-mixtral", "mini-maverick"])
    parser.add_argument("--experts", choices=("both", "with", "without"), default="both")
    parser.add_argument("--one-thread", action="store_true")
    parser.add_argument("--machine", type=Path, help="JSON of measured rates, to leave that out")
    parser.add_argument("--child", nargs=2, metavar=("KIND", "JOB"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, path = args.child
        print(json.dumps(KINDS[kind](json.loads(Path(path).read_text()))))
        return
    compare(args)


def compare(args: argparse.Namespace) -> None:
    from lamina.plan.hardware import Hardware
    from lamina.plan.plan import Sequences, make_plan
    from lamina.plan.shapes import model_shape
    from lamina.recipe.load import load_recipe

    alike = {"one_thread": args.one_thread}
    rates = json.loads(args.machine.read_text()) if args.machine else measure("machine", alike)
    here = Hardware(**rates)
    print(
        f"{here.name}: bf16 {here.bf16 / 1e9:.0f} GFLOP/s, rank 16 {here.lora / 1e9:.0f} GFLOP/s, "
        f"elementwise {here.elementwise / 1e9:.1f} GB/s, NF4 {here.decode / 1e9:.2f} G weights/s, "
        f"updates {here.host / 1e9:.1f} GB/s, disk {here.disk / 1e9:.2f} GB/s\n"
    )
    print(
        "| model | tokens a step | LoRA on | step, s | predicted | off "
        "| peak, GB | predicted | off |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    off_time, off_memory = [], []
    cases = {"both": (False, True), "with": (True,), "without": (False,)}[args.experts]
    for model in args.models:
        for experts in cases:
            for count in args.sequences:
                job = alike | {"model": model, "experts": experts, "count": count}
                job["length"] = args.length
                recipe = load_recipe(model, overrides(job))
                plan = make_plan(
                    recipe,
                    model_shape(recipe),
                    here,
                    sequences=Sequences(args.length, args.length, equal=True),
                )
                found = measure("step", job | {"text": text(model, count, args.length)})
                t, m = plan.time.seconds / found["seconds"] - 1, plan.ram / found["peak"] - 1
                off_time.append(abs(t))
                off_memory.append(abs(m))
                what = "attention, experts" if experts else "attention"
                print(
                    f"| {model} | {count * args.length:,} | {what} "
                    f"| {found['seconds']:.1f} | {plan.time.seconds:.1f} | {t:+.0%} "
                    f"| {found['peak'] / 1e9:.2f} | {plan.ram / 1e9:.2f} | {m:+.0%} |",
                    flush=True,
                )
    print(
        f"\nAt most off: time {max(off_time):.0%} (goal {TIME_GOAL:.0%}), "
        f"memory {max(off_memory):.0%} (goal {MEMORY_GOAL:.0%})."
    )


if __name__ == "__main__":
    main()
