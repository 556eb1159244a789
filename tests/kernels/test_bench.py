"""`bench/gpu.py --tiny` runs from end to end on a CPU, so that the script is known to work when a
GPU is at hand."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), *arguments]
    environ = os.environ | {"CUDA_VISIBLE_DEVICES": ""} | environment
    return subprocess.run(
        command, capture_output=True, text=True, timeout=600, check=False, env=environ
    )


def test_every_part() -> None:
    # Interpreted, the fused kernels run too.
    interpreted = importlib.util.find_spec("triton") is not None
    done = run("--tiny", TRITON_INTERPRET="1" if interpreted else "0")

    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().endswith("failed: nothing")
    assert "WRONG" not in done.stdout
    ways = {"dequantize", "fused"} if interpreted else {"dequantize"}
    # A row for each way and number of tokens, of each of three models.
    rows = re.findall(r"^\| (\w+) \| (40|60) \|.*\| ([\d.]+) GB \| \d+% \|", done.stdout, re.M)
    assert len(rows) == 3 * 2 * len(ways)
    assert {way for way, *_ in rows} == ways
    assert "its 2 mixture blocks are aliased to 1 blocks' worth" in done.stdout
    assert "transformers + PEFT + bitsandbytes: 128 tokens a step" in done.stdout


def test_without_a_gpu_nothing_is_measured() -> None:
    if torch.cuda.is_available():
        return
    done = run()

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("No GPU")


def test_a_folder_without_wheels(tmp_path: Path) -> None:
    done = run("--wheels", str(tmp_path))

    assert done.returncode == 1
    assert done.stderr == f"error: there is no wheel in {tmp_path}\n"
