"""The memory of a preparation doesn't grow with the tensors of the checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

EXPERTS, HIDDEN, INTER = 24, 1024, 4096

#: Prepares a checkpoint with one stacked tensor of 403 MB; prints peak memory, in KB.
MEASURED = f"""
import resource, sys
import torch
from lamina.models.spec import Block, Experts, Part, Plain
from lamina.store.codec import encode
from lamina.store.convert import prepare

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

torch.set_num_threads(1)
encode(torch.randn(64, 64), "nf4")
moe = Block(
    "layers.0.moe", "moe", 0, (Plain("norm", ({HIDDEN},), ((Part("norm"),),)),), (),
    Experts(
        module="m", router="router", router_module="r", num_experts={EXPERTS},
        hidden_size={HIDDEN}, intermediate_size={INTER}, transposed=True,
        gate_up_sources=lambda e: ((Part("gate_up_proj", e, True),),),
        down_sources=lambda e: ((Part("down_proj", e, True),),),
    ),
)
embed = Block("embed", "embed", None, (Plain("embed", (65536, {HIDDEN}), ((Part("embed"),),)),))
before = peak()
prepare(sys.argv[1], sys.argv[2], model_type="m", config={{}}, blocks=[embed, moe], codec="nf4")
print(before, peak())
"""


def write_sparse(path: Path) -> None:
    """A checkpoint of holes: zeros that take no space."""
    shapes = {
        "norm": [HIDDEN],
        "embed": [65536, HIDDEN],
        "gate_up_proj": [EXPERTS, HIDDEN, 2 * INTER],
        "down_proj": [EXPERTS, INTER, HIDDEN],
        "unused": [100_000, HIDDEN],
    }
    header, at = {}, 0
    for name, shape in shapes.items():
        nbytes = 2
        for n in shape:
            nbytes *= n
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    with (path / "model.safetensors").open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + at)


@pytest.mark.slow
def test_peak_memory_is_that_of_a_few_slices(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    write_sparse(checkpoint)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(checkpoint), str(tmp_path / "store")],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    before, after = (int(n) * 1024 for n in done.stdout.split())
    one_slice = HIDDEN * 2 * INTER * 2  # 17 MB; the stacked tensor is 24 times that
    print(f"prepare needed {(after - before) / 1e6:.0f} MB beyond the libraries")
    # A slice, the matrix, its codes; chunks of the embedding and of the copied tensor; temporaries.
    assert after - before < 10 * one_slice
