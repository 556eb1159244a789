"""Prepares layers of the real releases at their true shapes, and prints what that takes.

    python bench/prepare.py [RELEASE ...] [--folder /tmp] [--codec nf4]

Of each release a checkpoint is made with its key names, its embedding and head, and one dense and
one mixture layer (Mixtral and Scout have mixtures only). Its files are sparse, so all weights are
zeros and take no space, and reading them costs the disk nothing: memory is what is measured here,
and the time is that of converting and writing. `lamina prepare` runs as a process of its own, whose
peak resident memory must stay under 3 GB. What is made is deleted again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lamina.models import load_family
from lamina.models.spec import Block, Linear, Part, Plain
from lamina.store.pieces import plan_blocks
from lamina.store.quantized import unstacked

LIMIT = 3e9
_SHARD_BYTES = 5 << 30
_BYTES = {"BF16": 2, "F8_E4M3": 1}


def _llama4(experts: int, every: int) -> dict[str, Any]:
    return {
        "model_type": "llama4",
        "text_config": {
            "model_type": "llama4_text",
            "hidden_size": 5120,
            "intermediate_size": 8192,
            "intermediate_size_mlp": 16384,
            "num_hidden_layers": every,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "num_local_experts": experts,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": every,
            "vocab_size": 202048,
            "tie_word_embeddings": False,
        },
    }


def _mixtral(hidden: int, intermediate: int, heads: int, vocab: int) -> dict[str, Any]:
    return {
        "model_type": "mixtral",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "vocab_size": vocab,
        "sliding_window": None,
        "tie_word_embeddings": False,
    }


#: Config, what stands before a key, and whether the routed experts are FP8 with scales.
RELEASES: dict[str, tuple[dict[str, Any], str, bool]] = {
    "mixtral-8x7b": (_mixtral(4096, 14336, 32, 32000), "", False),
    "mixtral-8x22b": (_mixtral(6144, 16384, 48, 32768), "", False),
    "scout": (_llama4(16, every=1), "language_model.", False),
    "maverick": (_llama4(128, every=2), "language_model.", False),
    "maverick-fp8": (_llama4(128, every=2), "language_model.", True),
}

Entry = tuple[str, str, tuple[int, ...]]


def tensors(config: dict[str, Any], prefix: str, fp8: bool) -> Iterator[Entry]:
    """Name, dtype and shape of each tensor of the release."""
    for block in load_family(config).blocks:
        held: list[Plain | Linear] = [*block.plain, *block.linears]
        for t in held:
            yield prefix + t.sources[0][0].key, "BF16", t.shape
        for name, dtype, shape in _experts(block, fp8):
            yield prefix + name, dtype, shape


def _experts(block: Block, fp8: bool) -> Iterator[Entry]:
    e = block.experts
    if e is None:
        return
    stacks = set()
    for i in range(e.num_experts):
        matrices = (
            (e.gate_up_sources(i)[0], e.gate_up_shape),
            (e.down_sources(i)[0], e.down_shape),
        )
        for parts, (rows, columns) in matrices:
            held: tuple[Part, ...] = unstacked(parts) if fp8 else parts
            for part in held:
                if part.index is not None:
                    if part.key not in stacks:
                        stacks.add(part.key)
                        yield part.key, "BF16", (e.num_experts, columns, rows)
                    continue
                shape = (rows // len(held), columns)
                yield part.key, "F8_E4M3" if fp8 else "BF16", shape
                if fp8:
                    yield f"{part.key}_scale", "BF16", (shape[0], 1)


def write_sparse(path: Path, entries: list[Entry]) -> int:
    """The checkpoint's weights as holes, in files of about 5 GB. Returns their bytes."""
    shards: list[list[Entry]] = [[]]
    room = _SHARD_BYTES
    for entry in entries:
        if shards[-1] and _nbytes(entry) > room:
            shards.append([])
            room = _SHARD_BYTES
        shards[-1].append(entry)
        room -= _nbytes(entry)
    weight_map = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        header, at = {}, 0
        for entry in shard:
            key, dtype, shape = entry
            offsets = [at, at + _nbytes(entry)]
            header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": offsets}
            at = offsets[1]
            weight_map[key] = name
        text = json.dumps(header).encode()
        with (path / name).open("wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            f.truncate(8 + len(text) + at)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sum(map(_nbytes, entries))


def _nbytes(entry: Entry) -> int:
    _, dtype, shape = entry
    return math.prod(shape) * _BYTES[dtype]


@dataclass(frozen=True)
class Result:
    """What preparing a release took; bytes and seconds."""

    release: str
    source: int
    largest: int
    store: int
    peak: int
    seconds: float


def measure(release: str, folder: Path, codec: str) -> Result:
    """Makes the checkpoint of a release, prepares it and deletes both.

    Raises:
        SystemExit: the disk hasn't room, or the preparation failed.
    """
    config, prefix, fp8 = RELEASES[release]
    with tempfile.TemporaryDirectory(prefix="lamina-prepare-", dir=folder) as name:
        root = Path(name)
        checkpoint, store = root / "checkpoint", root / "store"
        checkpoint.mkdir()
        entries = list(tensors(config, prefix, fp8))
        (checkpoint / "config.json").write_text(json.dumps(config))
        source = write_sparse(checkpoint, entries)
        needed = sum(b.nbytes for b in plan_blocks(load_family(config).blocks, codec))
        free = shutil.disk_usage(root).free
        if free < needed:
            sys.exit(
                f"{release}: the store takes {needed / 1e9:.1f} GB, and {folder} has "
                f"{free / 1e9:.1f} GB free"
            )
        started = time.perf_counter()
        command = [sys.executable, "-m", "lamina", "prepare", str(checkpoint)]
        process = subprocess.Popen(
            [*command, "--codec", codec, "--store", str(store)], stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"{release}: lamina prepare ended with {process.returncode}")
        held = sum(p.stat().st_size for p in store.rglob("*") if p.is_file())
        return Result(
            release, source, max(map(_nbytes, entries)), held, usage.ru_maxrss * 1024, seconds
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("releases", nargs="*", metavar="RELEASE", help=", ".join(RELEASES))
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--codec", default="nf4")
    args = parser.parse_args()
    if unknown := [name for name in args.releases if name not in RELEASES]:
        parser.error(f"no release {unknown[0]!r}; there are {', '.join(RELEASES)}")
    print(
        f"{'release':<14} {'source':>9} {'largest tensor':>15} {'store':>9} {'peak RSS':>9} "
        f"{'time':>7} {'source/s':>10}"
    )
    over = False
    for name in args.releases or RELEASES:
        r = measure(name, args.folder, args.codec)
        over |= r.peak > LIMIT
        print(
            f"{r.release:<14} {r.source / 1e9:>6.2f} GB {r.largest / 1e9:>12.2f} GB "
            f"{r.store / 1e9:>6.2f} GB {r.peak / 1e9:>6.2f} GB {r.seconds:>5.0f} s "
            f"{r.source / r.seconds / 1e9:>5.2f} GB/s{'   over 3 GB' if r.peak > LIMIT else ''}",
            flush=True,
        )
    return 1 if over else 0


if __name__ == "__main__":
    sys.exit(main())
