"""What a GPU does with Lamina's kernels and its streaming engine: one command, under 9 minutes.

    python bench/gpu.py [--minutes 9] [--wheels FOLDER] [--only PART ...]
    python bench/gpu.py --tiny            # the script itself, on a CPU, in a minute

Needs the repository, and packages: torch for CUDA with its Triton, transformers, peft, safetensors,
xxhash, psutil; bitsandbytes for the comparison. Those that aren't installed may lie as wheels in a
folder.

Parts, each in a process of its own: `kernels` (is every kernel right, is the engine, and how fast
is an expert's product each way), then, with the card's memory capped at 24 GB, whole optimizer
steps at the shapes of `8x22b`, `maverick` and `8x7b`, from NF4 stores of random weights in pinned
memory, and `peer`: 8x7B in transformers + PEFT + bitsandbytes. Prints Markdown.

Rates that shares refer to are measured first: a large bf16 matrix product, and a copy of a gigabyte
from pinned memory. A step is forward and backward; the optimizer's own step is left out on both
sides. Without a GPU nothing is measured.
"""

from __future__ import annotations

import argparse
import glob
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from on_gpu.machine import Machine
    from on_gpu.steps import Job

HERE = Path(__file__).resolve().parent
PARTS = ("kernels", "8x22b", "maverick", "8x7b", "peer")
#: What a part needs at least, to be begun at all; its last rows are left out when time runs short.
SECONDS_NEEDED = {"kernels": 60, "8x22b": 75, "maverick": 75, "8x7b": 40, "peer": 60}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="stop beginning things in time")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels that aren't installed")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, on a CPU too")
    parser.add_argument("--child", nargs="+", metavar="PART", help=argparse.SUPPRESS)
    parser.add_argument("--rates", help=argparse.SUPPRESS)
    args = parser.parse_args()
    return whole(args) if args.child is None else child(args)


# --- the whole: parts one after the other


def whole(args: argparse.Namespace) -> int:
    end = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_VERBOSITY": "error",
            # Pinned memory is touched by many threads, and the cap isn't spent on holes.
            "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True,"
            "pinned_use_cuda_host_register:True,pinned_num_register_threads:8",
        }
        paths = [str(HERE.parent / "src"), environment.get("PYTHONPATH", "")]
        if args.wheels is not None:
            paths.insert(0, unpacked(args.wheels, Path(folder) / "site"))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))

        def run(names: Sequence[str], rates: str | None = None) -> tuple[int, str]:
            command = [sys.executable, "-W", "ignore", str(HERE / "gpu.py"), "--child", *names]
            command += ["--minutes", str((end - time.monotonic()) / 60)]
            command += ["--tiny"] if args.tiny else []
            command += ["--rates", rates] if rates is not None else []
            output = subprocess.PIPE if rates is None else None
            done = subprocess.run(command, env=environment, text=True, stdout=output, check=False)
            return done.returncode, done.stdout or ""

        code, output = run(["rates"])
        if code:
            return code
        rates = output.splitlines()[-1]
        if "none" in json.loads(rates):
            print("No GPU: nothing is measured. --tiny tries the script on a CPU.")
            return 0
        print("\n".join(output.splitlines()[:-1]), flush=True)
        failed = []
        # Each part gives back the memory that it pinned by ending; tiny ones have none.
        for names in [args.only] if args.tiny else [[name] for name in args.only]:
            left = end - time.monotonic()
            if left < SECONDS_NEEDED[names[0]] and not args.tiny:
                print(f"\n### {names[0]}: not begun, {left:.0f} s are left", flush=True)
            elif run(names, rates)[0]:
                failed += names
        spent = args.minutes * 60 - (end - time.monotonic())
        print(f"\n{spent:.0f} s in all; failed: {', '.join(failed) or 'nothing'}", flush=True)
        return 1 if failed else 0


def unpacked(wheels: Path, site: Path) -> str:
    """The wheels of a folder, installed beside everything else. No index is asked."""
    found = sorted(glob.glob(str(wheels / "*.whl")))
    if not found:
        raise SystemExit(f"error: there is no wheel in {wheels}")
    command = [sys.executable, "-m", "pip", "install", "-qq", "--no-index", "--no-deps"]
    subprocess.run([*command, "--no-compile", "--target", str(site), *found], check=True)
    return str(site)


# --- parts, in a process of their own


def child(args: argparse.Namespace) -> int:
    import torch

    from on_gpu import machine as machines

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    if args.child == ["rates"]:
        if not (cuda or args.tiny):
            print(json.dumps({"none": True}))
            return 0
        return rates(machines.Machine(device), args.tiny)
    machine = machines.Machine(device, time.monotonic() + 60 * args.minutes)
    machine.repeats = 1 if args.tiny else machine.repeats
    codes = []
    for name in args.child:
        try:
            codes.append(part(name, machine, args))
        except Exception:  # a GPU's minutes are rare: what else can be measured, is
            traceback.print_exc()
            codes.append(1)
    return max(codes)


def part(name: str, machine: Machine, args: argparse.Namespace) -> int:
    """0, or 1 if a result is wrong."""
    from on_gpu import machine as machines
    from on_gpu import matrices, models, peer, steps

    measured = steps.Rates(**json.loads(args.rates))
    if name == "kernels":
        right = matrices.check(machine, tiny=args.tiny)
        right &= steps.check(machine)
        matrices.measure(machine, measured.matrix, tiny=args.tiny)
        return 0 if right else 1
    if name == "peer":
        if args.tiny:
            peer.measure(models.SMALL_MIXTRAL, machine, tokens=128, length=32, micro=2)
        else:
            peer.measure(models.MIXTRAL_8X7B, machine, tokens=8192, length=2048, micro=4)
        return 0
    machine.cap_memory(machines.VRAM_CAP)
    steps.measure(job(name, args.tiny), machine, measured)
    return 0


def rates(machine: Machine, tiny: bool) -> int:
    """What the machine can do: a table for people, and a line of JSON."""
    import torch

    from on_gpu import machine as machines

    matrix = machines.matrix_rate(machine, 256 if tiny else 8192)
    copy = machines.copy_rate(machine, 1 << 20 if tiny else 1 << 30)
    memory = machines.memory_rate(machine, 1 << 20 if tiny else 1 << 32)
    try:
        import triton

        compiler = f"triton {triton.__version__}"
    except ImportError:
        compiler = "no triton"
    print(f"## {machine.name}{', tiny shapes: no measurement' if tiny else ''}\n")
    print(f"torch {torch.__version__}, {compiler}, {machines.cores()} cores, ", end="")
    print(f"{machines.ram_available() / 1e9:.0f} GB of RAM free\n")
    print("| | |\n|---|---|")
    print(f"| bf16 matrix product | {matrix / 1e12:.1f} TFLOP/s |")
    print(f"| pinned memory to device | {copy / 1e9:.1f} GB/s |")
    print(f"| within device memory, read and written | {memory / 1e9:.0f} GB/s |")
    print(json.dumps({"matrix": matrix, "copy": copy}))
    return 0


def job(name: str, tiny: bool) -> Job:
    from on_gpu import models, steps

    if tiny:
        config = models.SMALL_LLAMA4 if name == "maverick" else models.SMALL_MIXTRAL
        small = {"length": 32, "ring_bytes": 4 << 20, "group_tokens": 64, "logits_bytes": 1 << 20}
        small["most_stacks"] = 1 if name == "maverick" else 2
        return steps.Job(f"{name}, tiny", config, (40, 60), **small)
    if name == "8x22b":
        return steps.Job("Mixtral 8x22B", models.MIXTRAL_8X22B, (2048, 4096, 8192, 16384))
    if name == "maverick":
        return steps.Job("Llama 4 Maverick", models.MAVERICK, (8192, 16384, 32768, 49152))
    return steps.Job("Mixtral 8x7B", models.MIXTRAL_8X7B, (8192,))


if __name__ == "__main__":
    sys.exit(main())
