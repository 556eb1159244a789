"""Runs `on_triton.py` in a process of its own, since Triton reads at its import whether it is to
interpret."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FILE = Path(__file__).with_name("on_triton.py")

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton isn't installed: there is no wheel of it for this platform",
)


def run_file(**environment: str) -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(FILE)]
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
    run_file(TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu() -> None:
    run_file(TRITON_INTERPRET="0")
