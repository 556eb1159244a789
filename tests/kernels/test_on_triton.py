"""Runs `on_triton.py` and `compiled.py` in processes of their own, since Triton reads at its import
whether it is to interpret."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton isn't installed; it has wheels for Linux on x86-64 and Arm",
)


def run_file(name: str, **environment: str) -> None:
    file = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(file)]
    # Triton 3.6's interpreter and NumPy.
    command += ["-W", "ignore:Conversion of an array with ndim:DeprecationWarning"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
        cwd=Path(__file__).parents[2],
        env=os.environ | environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
def test_interpreted() -> None:
    run_file("on_triton.py", TRITON_INTERPRET="1")


@needs_triton
def test_compiled(tmp_path: Path) -> None:
    run_file("compiled.py", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))


@needs_triton
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu() -> None:
    run_file("on_triton.py", TRITON_INTERPRET="0")
