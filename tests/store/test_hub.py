"""Preparing from the hub: the store that the folder gives, whatever breaks on the way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub_constants
import pytest
import torch
from tests.store.hub_server import REPO, HubServer, contents, prepare_from_hub, shards

from lamina.errors import CheckpointError, StoreError
from lamina.store.hub import finished_store
from lamina.store.journal import ORIGIN
from lamina.store.reader import verify


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("discard", [False, True])
def test_the_hub_gives_the_store_that_the_folder_gives(
    make_sample: Callable[..., Any],
    server: HubServer,
    tmp_path: Path,
    stacked: bool,
    count: int,
    discard: bool,
) -> None:
    # Tensors are dealt out to the files in turn, so that hardly any expert is in one of them.
    sample = make_sample(stacked, write=False, hidden=64, inter=48)
    sample.tensors["vision.patch"] = torch.randn(30, 7)
    sample.write(count)
    whole = sample.prepare(tmp_path / "whole")
    out = tmp_path / "store"
    store = prepare_from_hub(sample, out, discard=discard)
    assert contents(out) == contents(whole.path)
    assert verify(store) == []
    assert json.loads((out / ORIGIN).read_text()) == {"repo": REPO, "revision": server.commit}
    for name in shards(server):  # each file came once
        assert len(server.downloads(name)) == 1
    here = sorted(p.name for p in (tmp_path / "cache").rglob("*.safetensors"))
    assert here == ([] if discard else shards(server))
    assert not (tmp_path / "store.source").exists()


def test_the_storage_behind_the_hub_gets_no_token(
    make_sample: Callable[..., Any],
    server: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sample = make_sample(hidden=96, inter=64)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(hub_constants, "DOWNLOAD_CHUNK_SIZE", 4096)
    server.redirect = True
    name = shards(server)[1]
    server.drops = {name: [50_000]}
    prepare_from_hub(sample, tmp_path / "store")
    whole = sample.prepare(tmp_path / "whole")
    assert contents(tmp_path / "store") == contents(whole.path)
    assert server.downloads(name)[1][0] > 0
    assert server.tokens == {(False, "Bearer hf_secret"), (True, None)}


def test_discarding_holds_one_file_at_a_time(
    make_sample: Callable[..., Any], server: HubServer, tmp_path: Path
) -> None:
    sample = make_sample(hidden=64, inter=48, layers=6, shards=9)
    out = tmp_path / "store"
    seen = set()
    most = 0

    def look(done: int, total: int, what: str) -> None:
        nonlocal most
        there = [p for p in (tmp_path / "store.source").glob("*.safetensors") if p.is_file()]
        assert len(there) <= 1
        seen.update(path.name for path in there)
        folders = (out, tmp_path / "store.source")
        files = [p for folder in folders for p in folder.rglob("*") if p.is_file()]
        # What part files don't hold yet takes no space.
        most = max(most, sum(p.stat().st_blocks * 512 for p in files))

    store = prepare_from_hub(sample, out, progress=look)
    assert seen == set(shards(server))
    in_all = sum(p.stat().st_size for p in server.folder.glob("*.safetensors"))
    one = max(p.stat().st_size for p in server.folder.glob("*.safetensors"))
    held = sum(nbytes for _, nbytes in store.files())
    # Dealt out so, a quarter of the weights waits for its other half. With whole experts in a file
    # nothing would; the rest is small files and the ends of blocks of the file system.
    assert most < held + one + in_all / 4 + (200 << 10)


def test_progress_counts_every_byte_of_files_and_store(
    make_sample: Callable[..., Any], server: HubServer, tmp_path: Path
) -> None:
    seen: list[tuple[int, int, str]] = []
    store = prepare_from_hub(
        make_sample(shards=3), tmp_path / "store", progress=lambda *a: seen.append(a)
    )
    total = sum(nbytes for _, nbytes in store.files())
    total += sum((server.folder / name).stat().st_size for name in shards(server))
    done = [d for d, _, _ in seen]
    assert done == sorted(done)
    assert seen[-1][:2] == (total, total)
    assert {what for _, _, what in seen} >= {*shards(server), store.blocks[0].file}


# Broken connections and interruptions


@pytest.mark.parametrize("hard", [False, True])
@pytest.mark.parametrize("discard", [False, True])
def test_a_dropped_connection_is_gone_on_with(
    make_sample: Callable[..., Any],
    server: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    hard: bool,
    discard: bool,
) -> None:
    sample = make_sample(hidden=96, inter=64)
    whole = sample.prepare(tmp_path / "whole")
    monkeypatch.setattr(hub_constants, "DOWNLOAD_CHUNK_SIZE", 4096)  # what is kept at a break
    name = shards(server)[0]
    size = (server.folder / name).stat().st_size
    server.drops = {name: [size // 2]}
    server.hard = hard
    prepare_from_hub(sample, tmp_path / "store", discard=discard)
    assert contents(tmp_path / "store") == contents(whole.path)
    first, second = server.downloads(name)
    assert first == (0, size // 2)
    if hard:  # a reset makes huggingface_hub give up, and we ask for all of the file again
        assert second == (0, size)
    else:  # after an orderly end it asks for the rest
        assert second[0] >= size // 2 - 4096
        assert sum(second) == size


def test_a_connection_that_never_holds_is_an_error_that_can_be_gone_on_with(
    make_sample: Callable[..., Any], server: HubServer, tmp_path: Path
) -> None:
    sample = make_sample()
    whole = sample.prepare(tmp_path / "whole")
    name = shards(server)[1]
    server.drops, server.hard = {name: [100] * 2}, True
    with pytest.raises(CheckpointError, match=rf"connection to {server.url} failed") as caught:
        prepare_from_hub(sample, tmp_path / "store")
    assert "goes on from here" in str(caught.value.hint)
    assert len(server.downloads(name)) == 2  # asked for once more after huggingface_hub gave up
    prepare_from_hub(sample, tmp_path / "store")
    assert contents(tmp_path / "store") == contents(whole.path)


@pytest.mark.parametrize("stacked", [False, True])
def test_interrupted_anywhere_and_resumed_equals_uninterrupted(
    make_sample: Callable[..., Any], server: HubServer, tmp_path: Path, stacked: bool
) -> None:
    sample = make_sample(stacked, layers=1, shards=3)
    whole = contents(sample.prepare(tmp_path / "whole").path)
    calls = 0
    stop_at = -1

    def progress(*_: object) -> None:
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt

    prepare_from_hub(sample, tmp_path / "counted", progress=progress)
    points = calls
    assert points > 20
    for stop in range(1 + stacked, points + 1, 5):
        out = tmp_path / f"stopped-{stop}"
        calls, stop_at = 0, stop
        with pytest.raises(KeyboardInterrupt):
            prepare_from_hub(sample, out, progress=progress)
        done = {line["file"] for line in journal(out) if "file" in line}
        stamps = {file: (out / file).stat().st_mtime_ns for file in done}
        stop_at = -1
        prepare_from_hub(sample, out)
        assert contents(out) == whole, stop
        assert {file: (out / file).stat().st_mtime_ns for file in done} == stamps
        shutil.rmtree(out)


def journal(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "prepare.jsonl").read_text().splitlines()]


def test_only_what_is_missing_is_downloaded_again(
    make_sample: Callable[..., Any], server: HubServer, tmp_path: Path
) -> None:
    sample = make_sample(layers=4, shards=5)
    whole = sample.prepare(tmp_path / "whole")
    out = tmp_path / "store"

    def revoke(path: str) -> None:
        if path.endswith(shards(server)[3]) and len(server.served) > 3:
            server.refuse = (403, "GatedRepo")

    server.on_request = revoke
    with pytest.raises(CheckpointError, match="is gated"):
        prepare_from_hub(sample, out)
    server.on_request, server.refuse = lambda path: None, None
    before = [name for name, _, _ in server.served if name.endswith(".safetensors")]
    assert before == shards(server)[:3]
    server.served.clear()
    prepare_from_hub(sample, out)
    assert contents(out) == contents(whole.path)
    again = [name for name, _, _ in server.served if name.endswith(".safetensors")]
    assert again == shards(server)[3:]


def test_a_store_is_mended_with_the_files_it_needs(
    make_sample: Callable[..., Any], server: HubServer, tmp_path: Path
) -> None:
    sample = make_sample(shards=4)
    whole = contents(sample.prepare(tmp_path / "whole").path)
    out = tmp_path / "store"
    store = prepare_from_hub(sample, out)
    (out / store.blocks[0].file).unlink()  # the embedding: one tensor, in the first file
    server.served.clear()
    prepare_from_hub(sample, out)
    assert contents(out) == whole
    assert [n for n, _, _ in server.served if n.endswith(".safetensors")] == shards(server)[:1]


def test_a_preparation_goes_on_with_the_version_it_began_with(
    make_sample: Callable[..., Any], server: HubServer, tmp_path: Path
) -> None:
    sample = make_sample(shards=2)
    out = tmp_path / "store"

    def revoke(path: str) -> None:
        if server.downloads(shards(server)[0]):
            server.refuse = (403, "GatedRepo")

    server.on_request = revoke
    with pytest.raises(CheckpointError, match="is gated"):
        prepare_from_hub(sample, out)
    server.on_request = lambda path: None
    server.refuse = None
    began = server.commit
    server.commit = "f" * 40  # main has moved, and the history was rewritten
    with pytest.raises(StoreError, match=rf"version {began[:12]} .* no more"):
        prepare_from_hub(sample, out)
    asked = []
    server.commit = began
    server.on_request = asked.append
    prepare_from_hub(sample, out)
    assert any(f"/revision/{began}" in path for path in asked)
    assert not any(path.endswith("/api/models/owner/model") for path in asked)


def test_a_finished_store_asks_nobody(
    make_sample: Callable[..., Any], server: HubServer, tmp_path: Path
) -> None:
    sample = make_sample()
    out = tmp_path / "store"
    assert finished_store(REPO, out, "nf4") is None
    store = prepare_from_hub(sample, out)
    asked: list[str] = []
    server.on_request = asked.append
    again = finished_store(REPO, out, "nf4")
    assert again is not None
    assert again.fingerprint == store.fingerprint
    assert asked == []
    assert finished_store(REPO, out, "int8") is None
    assert finished_store("owner/other", out, "nf4") is None


# What the hub says
