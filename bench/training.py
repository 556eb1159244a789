"""Training speed and memory, side by side with transformers + PEFT on the same machine.

    python bench/training.py [--pairs 3] [--peft-limit 900] [--only speed]

mini-mixtral, LoRA r=16, bf16, one optimizer step of 16 sequences of 512 tokens, all of which carry
loss. Lamina streams from an NF4 store on disk with a weight cache of a quarter of the store; the
reference is transformers with `experts_implementation="grouped_mm"`, gradient checkpointing and 4
micro-batches. Each measurement is a process of its own, and pairs alternate, so that a machine
whose speed drifts slows both. Prints a Markdown table.

The memory of a process is its peak resident set, Python and libraries included.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MODEL = "mini-mixtral"


def sequences(count: int, length: int) -> list[list[int]]:
    """Real text: the standard library's docstrings, tokenized and cut to one length."""
    import pydoc_data.topics

    from lamina.engine.prepare import prepare

    store = prepare(MODEL)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(store.path, model_max_length=10**9)
    ids: list[int] = []
    for text in pydoc_data.topics.topics.values():
        ids += tokenizer(text)["input_ids"]
        if len(ids) >= count * length:
            break
    return [ids[n * length : (n + 1) * length] for n in range(count)]


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def lamina(job: dict[str, Any]) -> dict[str, Any]:
    """One optimizer step after one that warms up, through the engine."""
    from lamina.data.batches import make_batch
    from lamina.engine.loop import lora_settings
    from lamina.engine.model import open_model
    from lamina.engine.step import Engine
    from lamina.lora.adapter import Adapter
    from lamina.optim import make_optimizer
    from lamina.recipe.load import load_recipe

    targets = ["q_proj", "k_proj", "v_proj", "o_proj"] + (["experts"] if job["experts"] else [])
    recipe = load_recipe(MODEL, {"target_modules": targets, "cache": "25%", "ring": "24MiB"})
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
    batch = make_batch([(ids, [True] * len(ids)) for ids in job["sequences"]])
    with model.streamed() as source:
        engine = Engine(
            model.family,
            source,
            adapter,
            group_tokens=job["group_tokens"],
            logits_bytes=job["logits_bytes"],
        )
        seconds = []
        for step in range(1 + job["steps"]):
            start = time.monotonic()
            adapter.zero_grad()
            result = engine.forward_backward(batch, then="step" if step < job["steps"] else None)
            optimizer.step()
            seconds.append(time.monotonic() - start)
            stats = source.take_stats()
    return {
        "tokens_per_second": batch.num_tokens / statistics.median(seconds[1:]),
        "peak": peak_bytes(),
        "loss": result.loss,
        "read_over_store": stats.bytes_read / model.store.total_bytes,
        "waited": stats.seconds_waited / seconds[-1],
    }


def peft(job: dict[str, Any]) -> dict[str, Any]:
    """The same step in transformers + PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from lamina.models.mini import ensure_mini

    model = AutoModelForCausalLM.from_pretrained(
        ensure_mini(MODEL), dtype=torch.bfloat16, experts_implementation="grouped_mm"
    )
    config: dict[str, Any] = {"r": 16, "lora_alpha": 32, "target_modules": ATTENTION}
    if job["experts"]:
        config["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(model, LoraConfig(**config))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.tensor(job["sequences"])
    seconds, loss = [], 0.0
    for _ in range(1 + job["steps"]):
        start = time.monotonic()
        optimizer.zero_grad()
        loss = 0.0
        for micro in ids.chunk(4):
            out = model(input_ids=micro, labels=micro, use_cache=False)
            (out.loss / 4).backward()
            loss += float(out.loss.detach()) / 4
        optimizer.step()
        seconds.append(time.monotonic() - start)
    return {
        "tokens_per_second": ids.numel() / statistics.median(seconds[1:]),
        "peak": peak_bytes(),
        "loss": loss,
    }


def matrix_rate(job: dict[str, Any]) -> dict[str, Any]:
    """The best bf16 matrix rate at the model's own shapes, in FLOP/s: experts' and attention's."""
    import torch

    best = 0.0
    for tokens in (1024, 2048, 4096):
        for out, in_ in ((3072, 576), (576, 1536), (576, 576)):
            x, w = torch.randn(tokens, in_).bfloat16(), torch.randn(out, in_).bfloat16()
            offsets = torch.tensor([tokens], dtype=torch.int32)
            stacked = w.T.unsqueeze(0)
            for kernel in (
                lambda x=x, w=w: torch.nn.functional.linear(x, w),
                lambda x=x, s=stacked, o=offsets: torch.nn.functional.grouped_mm(x, s, offs=o),
            ):
                kernel()
                times = []
                for _ in range(7):
                    start = time.monotonic()
                    kernel()
                    times.append(time.monotonic() - start)
                best = max(best, 2 * tokens * out * in_ / statistics.median(times))
    return {"flops": best}


def flops_a_token(experts_lora: bool, length: int, learned: float = 1.0) -> float:
    """Floating-point operations that a token's gradient needs at least, for mini-mixtral: forward,
    the recompute that no gradient can do without, and the gradients of activations; frozen weights
    have none. LoRA's own share and elementwise work are left out."""
    from lamina.engine.prepare import prepare
    from lamina.models import load_family

    family = load_family(prepare(MODEL).config)
    total = 0.0
    for block in family.blocks:
        for linear in block.linears:
            size = 2.0 * linear.out_features * linear.in_features
            total += size * (2 if linear.feeds_residual else 3)
        if block.kind == "attention":
            # Scores and values, causal: half of length x length; the backward does 2.5 times that.
            heads, dim = family.config.num_attention_heads, family.config.head_dim
            total += 2 * 2 * heads * dim * length / 2 * (1 + 1 + 2.5)
        if block.experts is not None:
            gate_up = 2.0 * block.experts.gate_up_shape[0] * block.experts.gate_up_shape[1]
            down = 2.0 * block.experts.down_shape[0] * block.experts.down_shape[1]
            total += family.num_experts_per_tok * (3 * gate_up + 2 * down)
    head = 2.0 * family.config.vocab_size * family.config.hidden_size
    return total + learned * 2 * head


KINDS = {"lamina": lamina, "peft": peft, "matrix_rate": matrix_rate}


def measure(kind: str, job: dict[str, Any], limit: float | None = None) -> dict[str, Any] | None:
    """Run one kind in a process of its own; None if it outlasts the limit."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        command = [sys.executable, "-W", "ignore", __file__, "--child", kind, str(path)]
        environment = os.environ | {
            "TRANSFORMERS_VERBOSITY": "error",
            "HF_HUB_OFFLINE": "1",
            "GOMP_SPINCOUNT": "10000",  # as the command line sets it; for both sides
        }
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=limit, env=environment, check=False
            )
        except subprocess.TimeoutExpired:
            return None
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def median(results: list[dict[str, Any]], key: str) -> float:
    return statistics.median(result[key] for result in results)


def compare(args: argparse.Namespace, data: list[list[int]], experts: bool) -> None:
    job = {
        "experts": experts,
        "sequences": data,
        "steps": 1,
        "group_tokens": 1024,
        "logits_bytes": 48 << 20,
    }
    ours, theirs, ratios = [], [], []
    for _ in range(args.pairs):
        a = measure("lamina", job)
        assert a is not None
        b = measure("peft", job, args.peft_limit)
        ours.append(a)
        if b is not None:
            theirs.append(b)
            ratios.append(a["tokens_per_second"] / b["tokens_per_second"])
    tokens = len(data) * len(data[0])
    rate = measure("matrix_rate", {})
    assert rate is not None
    share = median(ours, "tokens_per_second") * flops_a_token(experts, args.length) / rate["flops"]
    name = "attention + all experts" if experts else "attention"
    peak = median(ours, "peak")
    line = f"| {name} | {median(ours, 'tokens_per_second'):.0f} | "
    if theirs:
        line += f"{median(theirs, 'tokens_per_second'):.0f} | {statistics.median(ratios):.2f} | "
        line += f"{peak / 1e9:.2f} | {median(theirs, 'peak') / 1e9:.2f} | "
        line += f"{peak / median(theirs, 'peak'):.2f} | "
    else:
        bound = 2 * tokens / args.peft_limit
        line += f"< {bound:.1f} (no two steps in {args.peft_limit:.0f} s) | "
        line += f"> {median(ours, 'tokens_per_second') / bound:.1f} | {peak / 1e9:.2f} | - | - | "
    line += f"{share:.0%} of {rate['flops'] / 1e9:.0f} GFLOP/s | {median(ours, 'waited'):.1%} |"
    print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--peft-limit", type=float, default=900.0)
    parser.add_argument("--only", choices=("speed", "reads"), help="one of the two tables")
    parser.add_argument("--child", nargs=2, metavar=("KIND", "JOB"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, path = args.child
        print(json.dumps(KINDS[kind](json.loads(Path(path).read_text()))))
        return
    if args.only != "reads":
        speed(args)
    if args.only != "speed":
        reads(args)


def speed(args: argparse.Namespace) -> None:
    data = sequences(args.sequences, args.length)
    print(f"{MODEL}, {args.sequences} x {args.length} tokens a step, LoRA r=16, bf16\n")
    print(
        "| LoRA on | Lamina tok/s | PEFT tok/s | ratio | Lamina GB | PEFT GB | ratio "
        "| share of the bf16 matrix rate | waited for weights |"
    )
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for experts in (False, True):
        compare(args, data, experts)


def reads(args: argparse.Namespace) -> None:
    print("\n| tokens a step | store bytes read / store bytes |\n|---|---|", flush=True)
    for count in (args.sequences // 2, args.sequences, args.sequences * 2):
        more = sequences(count, args.length)
        job = {"experts": False, "sequences": more, "steps": 1, "group_tokens": 1024}
        job["logits_bytes"] = 48 << 20
        result = measure("lamina", job)
        assert result is not None
        print(f"| {count * args.length:,} | {result['read_over_store']:.2f} |", flush=True)


if __name__ == "__main__":
    main()
