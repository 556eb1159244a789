"""One layer of each giant at its true shape, forward and backward, on this machine.

    python bench/blocks.py [--models maverick mixtral-8x22b] [--tokens 2048] [--folder DIR]

An attention and a mixture block with random weights (the vocabulary is cut to 1,024: it isn't part
of them), streamed from an NF4 store on disk, LoRA r=16 on every projection and every expert. Each
model runs in a process of its own. Prints a Markdown table; memory is the peak resident set, Python
and libraries included. The store takes 9 GB on disk, and is removed.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODELS = {
    "maverick": "meta-llama/Llama-4-Maverick-17B-128E-Instruct",
    "mixtral-8x22b": "mistralai/Mixtral-8x22B-Instruct-v0.1",
}


def one_layer(name: str) -> dict[str, Any]:
    """The config of a model with one layer, a mixture, and a vocabulary of 1,024."""
    from lamina.plan.shapes import known_models

    config: dict[str, Any] = json.loads(known_models()[MODELS[name]].read_text())["config"]
    text = config.get("text_config", config)
    text |= {"num_hidden_layers": 1, "vocab_size": 1024}
    if "interleave_moe_layer_step" in text:
        text |= {"interleave_moe_layer_step": 1, "moe_layers": [0], "no_rope_layers": [1]}
    return config


def child(name: str, tokens: int, folder: Path) -> None:
    import torch

    from lamina.data.batches import make_batch
    from lamina.engine.step import Engine
    from lamina.engine.streamed import StreamedSource
    from lamina.lora.adapter import Adapter, LoraSettings
    from lamina.models import load_family
    from lamina.store.stream import Stream
    from synthetic import synthetic_store

    store = synthetic_store(folder, one_layer(name))
    family = load_family(store.config)
    lora = LoraSettings(r=16, lora_alpha=32, target_modules=("all-linear",))
    adapter = Adapter(family, lora, seed=0, device="cpu")
    adapter.zero_grad()
    ids = torch.randint(0, 1024, (tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = make_batch([(ids, [True] * tokens)])
    # Half a gigabyte of ring; a larger unit passes alone.
    with Stream(store, ring_bytes=512 << 20) as stream:
        source = StreamedSource(store, stream, torch.bfloat16, torch.device("cpu"))
        engine = Engine(family, source, adapter, group_tokens=1024, logits_bytes=64 << 20)
        start = time.monotonic()
        result = engine.forward_backward(batch)
        seconds = time.monotonic() - start
        stats = source.take_stats()
    norm = torch.nn.utils.get_total_norm([p.grad for p in adapter.parameters()])
    print(
        json.dumps(
            {
                "store": store.total_bytes,
                "parameters": adapter.num_parameters,
                "seconds": seconds,
                "read": stats.bytes_read,
                "waited": stats.seconds_waited,
                "loss": result.loss,
                "norm": float(norm),
                "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument(
        "--folder", type=Path, help="where the stores go (default: a temporary one)"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.child, args.tokens, args.folder)
        return
    print(f"{args.tokens} tokens, LoRA r=16 on every projection, one layer\n")
    print("| model | store GB | trained M | seconds | read / store | waited | peak GB |")
    print("|---|---|---|---|---|---|---|", flush=True)
    for name in args.models:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            command = [sys.executable, "-W", "ignore", __file__, "--child", name]
            command += ["--tokens", str(args.tokens), "--folder", folder]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr)
        r = json.loads(done.stdout.splitlines()[-1])
        if not r["norm"] > 0:
            raise SystemExit(f"{name}: the norm of the gradients is {r['norm']}")
        print(
            f"| {name} | {r['store'] / 1e9:.1f} | {r['parameters'] / 1e6:.0f} | {r['seconds']:.0f} "
            f"| {r['read'] / r['store']:.2f} | {r['waited'] / r['seconds']:.0%} "
            f"| {r['peak'] / 1e9:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
