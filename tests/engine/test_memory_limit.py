"""A run inside a memory limit that is smaller than its store."""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lamina.engine.prepare import prepare

pytestmark = pytest.mark.slow

LIMIT = 1_250_000_000
RECIPE = [
    "mini-mixtral",
    "codec=bf16",
    "target_modules=[q_proj, k_proj, v_proj, o_proj, experts]",
    "tokens_per_step=2048",
    "max_length=512",
    "max_steps=3",
    "cache=0",
    "ring=24MiB",
    "group_tokens=512",
    "logits=24MiB",
]


@pytest.fixture
def limited() -> Iterator[Path]:
    """A control group with that limit and without swap; a process that writes its id into its
    `cgroup.procs` lives in it."""
    root = Path("/sys/fs/cgroup")
    v2 = (root / "cgroup.controllers").is_file()
    parent = root if v2 else root / "memory"
    group = parent / f"lamina-test-{os.getpid()}"
    limits = {"memory.max": LIMIT, "memory.swap.max": 0} if v2 else {"memory.limit_in_bytes": LIMIT}
    try:
        group.mkdir()
        for name, value in limits.items():
            if name != "memory.swap.max" or (group / name).exists():
                (group / name).write_text(str(value))
    except OSError as error:
        if group.is_dir():
            group.rmdir()
        pytest.skip(f"no memory limit can be set here: {error}")
    yield group
    group.rmdir()


def test_a_run_fits_a_limit_smaller_than_its_store(limited: Path, tmp_path: Path) -> None:
    store = prepare("mini-mixtral", codec="bf16")
    assert store.total_bytes > LIMIT
    data = tmp_path / "topics.jsonl"
    with data.open("w") as file:
        for name, text in list(pydoc_data.topics.topics.items())[:40]:
            messages = [
                {"role": "user", "content": f"Explain {name} in Python."},
                {"role": "assistant", "content": text[:1500]},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    command = [sys.executable, "-m", "lamina", "tune", *RECIPE, "--data", str(data)]
    done = subprocess.run(
        [
            "sh",
            "-c",
            'echo $$ > "$0"/cgroup.procs && exec "$@"',
            str(limited),
            *command,
            "--out",
            str(tmp_path / "run"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    print(*(f"{key} {summary[key] / 1e6:.0f} MB" for key in summary if "memory" in key))
    assert summary["steps"] == 3
    assert summary["peak_memory_bytes"] < LIMIT
    assert summary["planned_memory_bytes"] == pytest.approx(summary["peak_memory_bytes"], rel=0.1)
