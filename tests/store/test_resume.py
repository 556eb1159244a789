"""A preparation that is refused, interrupted or damaged: nothing is lost, and it can go on."""

from __future__ import annotations

import contextlib
import fcntl
import filecmp
import inspect
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lamina.errors import CheckpointError, StoreError
from lamina.models.spec import Block, Part, Plain
from lamina.store import files
from lamina.store.checkpoint import Checkpoint
from lamina.store.convert import prepare
from lamina.store.layout import JOURNAL, MANIFEST, Store
from lamina.store.reader import verify


def same_folder(a: Path, b: Path) -> bool:
    """Whether two folders hold the same files, byte for byte."""
    found = [sorted(p.relative_to(x) for p in x.rglob("*") if p.is_file()) for x in (a, b)]
    return found[0] == found[1] and all(
        filecmp.cmp(a / name, b / name, shallow=False) for name in found[0]
    )


# Where it can't be written


def test_other_contents_are_never_touched(make_sample: Callable[..., Any], tmp_path: Path) -> None:
    sample = make_sample()
    out = tmp_path / "store"
    with pytest.raises(StoreError, match="codec"):
        sample.prepare(out, "int4")
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(StoreError, match=r"holds thesis\.txt"):
        sample.prepare(out)
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    (tmp_path / "plain").write_text("x")
    with pytest.raises(StoreError, match="couldn't be written"):
        sample.prepare(tmp_path / "plain")


@pytest.mark.parametrize("finished", [True, False])
def test_a_store_of_something_else_is_refused(
    make_sample: Callable[..., Any], tmp_path: Path, finished: bool
) -> None:
    sample = make_sample()
    store = sample.prepare(tmp_path / "store")
    if not finished:
        unfinish(store.path)
    before = sorted(path.name for path in store.path.iterdir())
    with pytest.raises(StoreError) as caught:
        sample.prepare(store.path, "int8")
    assert "codec is 'nf4'; asked for is 'int8'" in str(caught.value)
    sample.tensors["lm_head.weight"][0, 0] += 1
    middle = list(sample.tensors)[len(sample.tensors) // 2]
    sample.tensors[middle][:] = 1  # another fine-tune of the same shapes
    sample.write(1)
    with pytest.raises(StoreError, match="another checkpoint"):
        sample.prepare(store.path)
    assert sorted(path.name for path in store.path.iterdir()) == before


def unfinish(root: Path, keep: int | None = None) -> None:
    """Turns a store into an unfinished one with the journal of its first files."""
    manifest = json.loads((root / MANIFEST).read_text())
    known = {"format", "model_type", "codec", "config", "source"}
    lines: list[Any] = [{key: manifest[key] for key in known}]
    lines += [{"file": entry["file"], "entry": entry} for entry in manifest["blocks"][:keep]]
    for entry in manifest["blocks"][len(lines) - 1 :]:
        (root / entry["file"]).unlink()
    (root / JOURNAL).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (root / MANIFEST).unlink()


def test_two_preparations_of_one_folder_exclude_each_other(
    make_sample: Callable[..., Any], tmp_path: Path
) -> None:
    sample = make_sample()
    out = tmp_path / "store"
    out.mkdir()
    with (out / files.LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(StoreError, match="Another process"):
            sample.prepare(out)
    sample.prepare(out)  # a lock file whose owner is gone doesn't matter
    assert not (out / files.LOCK).exists()


# Crashes


def mlp_blocks() -> list[Block]:
    return [
        Block(f"layers.{i}", "mlp", i, (Plain("w", (64, 40), ((Part(f"w{i}"),),)),))
        for i in range(4)
    ]


#: Starts a preparation for each number given, and kills it at that call of `progress`.
KILLED = f"""
import os, signal, sys
from lamina.models.spec import Block, Part, Plain
from lamina.store.convert import prepare

{inspect.getsource(mlp_blocks)}
calls = 0
def progress(done, total, what):
    global calls
    calls += 1
    if calls == when:
        os.kill(os.getpid(), signal.SIGKILL)

for when in map(int, sys.argv[3:]):
    if (child := os.fork()) == 0:
        prepare(sys.argv[1], sys.argv[2], model_type="m", config={{}}, blocks=mlp_blocks(),
                codec="nf4", progress=progress)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    tensors = {f"w{i}": torch.randn(64, 40).bfloat16() for i in range(4)}
    save_file({**tensors, "unused": torch.randn(1000)}, checkpoint / "model.safetensors")
    (checkpoint / "config.json").write_text("{}")
    made: list[str] = []

    def run(out: Path) -> Store:
        return prepare(
            checkpoint,
            out,
            model_type="m",
            config={},
            blocks=mlp_blocks(),
            codec="nf4",
            progress=lambda _d, _t, what: made.append(what),
        )

    whole = run(tmp_path / "whole")
    out = tmp_path / "killed"
    # In the middle of the first file; then, going on, in the third.
    command = [sys.executable, "-c", KILLED, str(checkpoint), str(out), "2", "8"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == [str(-signal.SIGKILL)] * 2, done.stderr
    assert not (out / MANIFEST).exists()
    assert len(list(out.rglob("*.tmp"))) == 1
    with pytest.raises(StoreError, match="isn't finished"):
        Store.open(out)
    finished = sorted((out / "blocks").glob("*.safetensors"))
    stamps = [path.stat().st_mtime_ns for path in finished]
    assert 0 < len(finished) < 4
    made.clear()
    run(out)
    assert [path.stat().st_mtime_ns for path in finished] == stamps
    assert set(made) == {file for file, _ in whole.files()} - {f"blocks/{p.name}" for p in finished}
    assert same_folder(out, whole.path)


@pytest.mark.parametrize("torn", [0, 1, 20])
def test_a_journal_cut_off_anywhere_is_gone_on_with(
    make_sample: Callable[..., Any], tmp_path: Path, torn: int
) -> None:
    sample = make_sample(True)
    whole = sample.prepare(tmp_path / "whole")
    store = sample.prepare(tmp_path / "store")
    unfinish(store.path, keep=3)
    journal = store.path / JOURNAL
    os.truncate(journal, journal.stat().st_size - torn)
    (store.path / "blocks" / "007.safetensors.tmp").write_text("left over")
    made: list[str] = []
    sample.prepare(store.path, progress=lambda _d, _t, what: made.append(what))
    assert (whole.blocks[0].file in made) is False
    assert (whole.blocks[2].file in made) is (torn > 1)  # one byte is the newline alone
    assert same_folder(store.path, whole.path)


def test_a_finished_store_is_returned_without_writing(
    make_sample: Callable[..., Any], tmp_path: Path
) -> None:
    sample = make_sample()
    first = sample.prepare(tmp_path / "store")
    calls: list[object] = []
    again = sample.prepare(tmp_path / "store", progress=lambda *a: calls.append(a))
    assert calls == []
    assert again.fingerprint == first.fingerprint


def test_prepare_mends_what_is_gone_or_truncated(
    make_sample: Callable[..., Any], tmp_path: Path
) -> None:
    sample = make_sample(write=False)
    sample.tensors["vision"] = torch.randn(300)
    sample.write()
    whole = sample.prepare(tmp_path / "whole")
    store = sample.prepare(tmp_path / "store")
    (store.path / store.blocks[2].file).unlink()
    os.truncate(store.path / store.blocks[3].file, 5000)
    (store.path / store.extra[0].file).unlink()
    (store.path / "config.json").unlink()
    with pytest.raises(StoreError) as caught:
        Store.open(store.path)
    assert len(caught.value.problems) == 3
    made: set[str] = set()
    sample.prepare(store.path, progress=lambda _d, _t, what: made.add(what))
    assert made == {store.blocks[2].file, store.blocks[3].file, store.extra[0].file}
    assert same_folder(store.path, whole.path)


def test_mending_from_other_weights_is_refused(
    make_sample: Callable[..., Any], tmp_path: Path
) -> None:
    sample = make_sample(hidden=60, inter=30, shards=1)
    store = sample.prepare(tmp_path / "store", "bf16")
    source = sample.path / "model.safetensors"
    middle = source.stat().st_size // 2
    tensors = Checkpoint.open(sample.path).tensors
    moe = [t for name, t in tensors.items() if name.startswith("model.layers.0.moe.experts")]
    # The identity of a checkpoint samples the middle of its files: change something else.
    changed = next(t for t in moe if not middle - 2 <= t.offset < middle + 4096)
    with source.open("r+b") as f:
        f.seek(changed.offset)
        byte = f.read(1)
        f.seek(changed.offset)
        f.write(bytes([byte[0] ^ 1]))
    file = store.path / store.block("layers.0.moe").file
    file.unlink()
    with pytest.raises(StoreError, match="came out differently"):
        sample.prepare(store.path, "bf16")
    assert not file.exists()


# Full disks


def test_too_little_space_is_said_before_anything_is_written(
    make_sample: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = make_sample()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage._replace(free=9000))
    with pytest.raises(StoreError, match="GB more") as caught:
        sample.prepare(tmp_path / "store")
    assert "Free" in str(caught.value.hint)
    assert not (tmp_path / "store" / "blocks").exists()
    monkeypatch.undo()
    assert verify(sample.prepare(tmp_path / "store")) == []


def test_a_disk_that_fills_up_can_be_gone_on_with(
    make_sample: Callable[..., Any], tmp_path: Path, small_disk: Path
) -> None:
    sample = make_sample(hidden=60, inter=30, layers=3)
    whole = sample.prepare(tmp_path / "whole")
    filler = small_disk / "filler"

    def fill(done: int, total: int, what: str) -> None:
        if done > total / 2 and not filler.exists():
            with filler.open("wb", buffering=0) as f, contextlib.suppress(OSError):
                while True:
                    f.write(bytes(4096))

    with pytest.raises(StoreError, match="No space left") as caught:
        sample.prepare(small_disk / "store", progress=fill)
    assert "again" in str(caught.value.hint)
    assert not list(small_disk.rglob("*.tmp"))
    assert re.search(r"\.safetensors", "".join(map(str, small_disk.rglob("*"))))
    filler.unlink()
    sample.prepare(small_disk / "store")
    assert same_folder(small_disk / "store", whole.path)


@pytest.mark.parametrize("gone", [True, False])
def test_a_checkpoint_that_changes_under_way_is_an_error_and_can_be_gone_on_with(
    make_sample: Callable[..., Any], tmp_path: Path, gone: bool
) -> None:
    sample = make_sample(shards=1)
    whole = sample.prepare(tmp_path / "whole")
    file = sample.path / "model.safetensors"
    kept = file.read_bytes()

    def damage(done: int, total: int, what: str) -> None:
        if done > total / 2 and gone:
            file.unlink(missing_ok=True)
        elif done > total / 2:
            os.truncate(file, 100)

    with pytest.raises(CheckpointError, match="can't be read") as caught:
        sample.prepare(tmp_path / "store", progress=damage)
    assert str(file) in caught.value.message
    file.write_bytes(kept)
    sample.prepare(tmp_path / "store")
    assert same_folder(tmp_path / "store", whole.path)
