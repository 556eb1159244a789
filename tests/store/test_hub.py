"""Preparing from the hub: the store that the folder gives, whatever breaks on the way."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub_constants
import pytest
import torch
from safetensors.torch import save_file
from tests.store.hub_server import HubServer, serving

from lamina.errors import CheckpointError, StoreError
from lamina.models import load_family
from lamina.store import hub as hub_module
from lamina.store.convert import convert
from lamina.store.hub import Hub, cached_checkpoint, finished_store
from lamina.store.journal import ORIGIN
from lamina.store.layout import Store
from lamina.store.reader import verify

REPO = "owner/model"


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Serves the checkpoint of `make_sample`. The hub's own cache is in `tmp_path / "cache"`."""
    with serving(HubServer(tmp_path / "checkpoint")) as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_constants, "ENDPOINT", server.url)
        monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub_module, "_WAITS", (0.0,))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def prepare(
    sample: Any, out: Path, *, discard: bool = True, codec: str = "nf4", **more: Any
) -> Store:
    hub = Hub(REPO, out, discard=discard)
    store = convert(
        hub.checkpoint(),
        out,
        model_type="sample",
        config=sample.config,
        blocks=sample.blocks,
        codec=codec,
        prefixes=("language_model.", ""),
        supplier=hub,
        origin=hub.origin,
        **more,
    )
    hub.close()
    return store


def contents(root: Path) -> dict[str, bytes]:
    """The files of a store but for `origin.json`."""
    files = {str(p.relative_to(root)): p for p in root.rglob("*") if p.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if name != ORIGIN}


def shards(server: HubServer) -> list[str]:
    return sorted(p.name for p in server.folder.glob("*.safetensors"))


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
    store = prepare(sample, out, discard=discard)
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
    prepare(sample, tmp_path / "store")
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

    store = prepare(sample, out, progress=look)
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
    store = prepare(make_sample(shards=3), tmp_path / "store", progress=lambda *a: seen.append(a))
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
    prepare(sample, tmp_path / "store", discard=discard)
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
        prepare(sample, tmp_path / "store")
    assert "goes on from here" in str(caught.value.hint)
    assert len(server.downloads(name)) == 2  # asked for once more after huggingface_hub gave up
    prepare(sample, tmp_path / "store")
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

    prepare(sample, tmp_path / "counted", progress=progress)
    points = calls
    assert points > 20
    for stop in range(1 + stacked, points + 1, 5):
        out = tmp_path / f"stopped-{stop}"
        calls, stop_at = 0, stop
        with pytest.raises(KeyboardInterrupt):
            prepare(sample, out, progress=progress)
        done = {line["file"] for line in journal(out) if "file" in line}
        stamps = {file: (out / file).stat().st_mtime_ns for file in done}
        stop_at = -1
        prepare(sample, out)
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
        prepare(sample, out)
    server.on_request, server.refuse = lambda path: None, None
    before = [name for name, _, _ in server.served if name.endswith(".safetensors")]
    assert before == shards(server)[:3]
    server.served.clear()
    prepare(sample, out)
    assert contents(out) == contents(whole.path)
    again = [name for name, _, _ in server.served if name.endswith(".safetensors")]
    assert again == shards(server)[3:]


def test_a_store_is_mended_with_the_files_it_needs(
    make_sample: Callable[..., Any], server: HubServer, tmp_path: Path
) -> None:
    sample = make_sample(shards=4)
    whole = contents(sample.prepare(tmp_path / "whole").path)
    out = tmp_path / "store"
    store = prepare(sample, out)
    (out / store.blocks[0].file).unlink()  # the embedding: one tensor, in the first file
    server.served.clear()
    prepare(sample, out)
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
        prepare(sample, out)
    server.on_request = lambda path: None
    server.refuse = None
    began = server.commit
    server.commit = "f" * 40  # main has moved, and the history was rewritten
    with pytest.raises(StoreError, match=rf"version {began[:12]} .* no more"):
        prepare(sample, out)
    asked = []
    server.commit = began
    server.on_request = asked.append
    prepare(sample, out)
    assert any(f"/revision/{began}" in path for path in asked)
    assert not any(path.endswith("/api/models/owner/model") for path in asked)


def test_a_finished_store_asks_nobody(
    make_sample: Callable[..., Any], server: HubServer, tmp_path: Path
) -> None:
    sample = make_sample()
    out = tmp_path / "store"
    assert finished_store(REPO, out, "nf4") is None
    store = prepare(sample, out)
    asked: list[str] = []
    server.on_request = asked.append
    again = finished_store(REPO, out, "nf4")
    assert again is not None
    assert again.fingerprint == store.fingerprint
    assert asked == []
    assert finished_store(REPO, out, "int8") is None
    assert finished_store("owner/other", out, "nf4") is None


# What the hub says


@pytest.mark.parametrize(
    ("status", "code", "message", "hint"),
    [
        (403, "GatedRepo", "owner/model is gated", "hf auth login"),
        (401, "GatedRepo", "owner/model is gated", "Accept them on http"),
        (401, "RepoNotFound", "no model owner/model", "hf auth login"),
        (404, "RepoNotFound", "no model owner/model", "Check the name"),
        (403, "", r"refuses owner/model \(403\)", "token"),
        (418, "", "answered 418", "again"),
    ],
)
def test_what_the_hub_refuses_is_explained(
    make_sample: Callable[..., Any],
    server: HubServer,
    tmp_path: Path,
    status: int,
    code: str,
    message: str,
    hint: str,
) -> None:
    sample = make_sample()
    server.refuse = (status, code)
    with pytest.raises(CheckpointError, match=message) as caught:
        prepare(sample, tmp_path / "store")
    assert hint in str(caught.value.hint)
    assert not (tmp_path / "store").exists()


def test_other_models_and_no_network_are_explained(
    make_sample: Callable[..., Any],
    server: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_sample()
    with pytest.raises(CheckpointError, match="no model owner/nothing"):
        Hub("owner/nothing", tmp_path / "store", discard=True)
    with pytest.raises(CheckpointError, match="can't be the name"):
        Hub("owner/no--name..", tmp_path / "store", discard=True)
    nobody = "http://127.0.0.1:1"
    template = nobody + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(hub_constants, "ENDPOINT", nobody)
    monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    started = time.monotonic()
    with pytest.raises(
        CheckpointError, match=r"connection to http://127\.0\.0\.1:1 failed"
    ) as caught:
        Hub(REPO, tmp_path / "store", discard=True)
    assert "again" in str(caught.value.hint)
    assert time.monotonic() - started < 10  # huggingface_hub itself would try for 20 seconds


def test_without_a_connection_the_cache_will_do(
    make_sample: Callable[..., Any],
    server: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sample = make_sample()
    assert cached_checkpoint(REPO, tmp_path / "store") is None
    Hub(REPO, tmp_path / "store", discard=False)
    assert cached_checkpoint(REPO, tmp_path / "store") is None  # config and index alone
    prepare(sample, tmp_path / "store", discard=False)
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE is set"):
        Hub("owner/other", tmp_path / "other", discard=True)
    folder = cached_checkpoint(REPO, tmp_path / "store")
    assert folder is not None
    assert {p.name for p in folder.glob("*.safetensors")} == set(shards(server))


def test_what_does_not_fit_is_known_before_anything_is_downloaded(
    make_sample: Callable[..., Any], server: HubServer, tmp_path: Path
) -> None:
    sample = make_sample(write=False)
    del sample.tensors["model.layers.1.moe.experts.2.w1.weight"]
    sample.write()
    with pytest.raises(CheckpointError) as caught:
        prepare(sample, tmp_path / "store")
    assert "experts.2.w1.weight" in caught.value.problems[0]
    assert not [name for name, _, _ in server.served if name.endswith(".safetensors")]
    (sample.path / shards(server)[0]).unlink()
    with pytest.raises(CheckpointError, match="has no model-00001-of-00002"):
        Hub(REPO, tmp_path / "store", discard=True)
    for file in sample.path.glob("model*"):
        file.unlink()
    server.commit = "1" * 40
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors and no model"):
        Hub(REPO, tmp_path / "other", discard=True)
    (sample.path / "config.json").unlink()
    server.commit = "2" * 40
    with pytest.raises(CheckpointError, match=r"hasn't config\.json"):
        Hub(REPO, tmp_path / "other", discard=True)


def test_headers_that_are_no_headers_are_named(
    make_sample: Callable[..., Any], server: HubServer, tmp_path: Path
) -> None:
    sample = make_sample()
    (sample.path / shards(server)[0]).write_bytes(b"x" * 5000)
    (sample.path / shards(server)[1]).write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        Hub(REPO, tmp_path / "store", discard=True).checkpoint()
    assert len(caught.value.problems) == 2
    assert all("isn't a safetensors file" in problem for problem in caught.value.problems)


def test_large_headers_are_read_too(
    make_sample: Callable[..., Any],
    server: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sample = make_sample()
    monkeypatch.setattr(hub_module, "_HEADER_BYTES", 16)
    whole = sample.prepare(tmp_path / "whole")
    prepare(sample, tmp_path / "store")
    assert contents(tmp_path / "store") == contents(whole.path)
    server.ranges = False
    with pytest.raises(CheckpointError, match="can't be read in part"):
        Hub(REPO, tmp_path / "other", discard=True).checkpoint()


def test_a_file_that_is_not_what_its_header_said_is_refused(
    make_sample: Callable[..., Any], server: HubServer, tmp_path: Path
) -> None:
    sample = make_sample()
    out = tmp_path / "store"
    hub = Hub(REPO, out, discard=True)
    checkpoint = hub.checkpoint()
    file = sample.path / shards(server)[0]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="came out differently"):
        convert(
            checkpoint,
            out,
            model_type="sample",
            config=sample.config,
            blocks=sample.blocks,
            codec="nf4",
            prefixes=("",),
            supplier=hub,
        )
    assert not list((tmp_path / "store.source").glob("*.safetensors"))


# Room


@pytest.mark.filterwarnings("ignore:Not enough free disk space")  # huggingface_hub's own word on it
def test_a_disk_that_fills_up_can_be_gone_on_with(
    make_sample: Callable[..., Any],
    server: HubServer,
    tmp_path: Path,
    small_disk: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sample = make_sample(hidden=60, inter=30, layers=3, shards=4)
    whole = sample.prepare(tmp_path / "whole")
    filler = small_disk / "filler"

    def fill(done: int, total: int, what: str) -> None:
        # While a file is coming: it is the download that finds no room.
        if what == shards(server)[1] and not filler.exists():
            with filler.open("wb", buffering=0) as f, suppress(OSError):
                while True:
                    f.write(bytes(4096))

    monkeypatch.setattr(hub_constants, "DOWNLOAD_CHUNK_SIZE", 1024)
    with pytest.raises(StoreError, match="No space left") as caught:
        prepare(sample, small_disk / "store", progress=fill)
    assert "again" in str(caught.value.hint)
    filler.unlink()
    prepare(sample, small_disk / "store")
    assert contents(small_disk / "store") == contents(whole.path)


@pytest.mark.parametrize("discard", [False, True])
def test_too_little_room_is_said_with_numbers_before_anything_is_downloaded(
    make_sample: Callable[..., Any],
    server: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    discard: bool,
) -> None:
    sample = make_sample(shards=3)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda _: usage._replace(free=9000))
    with pytest.raises(StoreError, match="GB free; needed are") as caught:
        prepare(sample, tmp_path / "store", discard=discard)
    assert ("the largest file" if discard else "the download") in caught.value.message
    assert ("--discard-source" in str(caught.value.hint)) is not discard
    assert not [name for name, _, _ in server.served if name.endswith(".safetensors")]
    monkeypatch.undo()


# The name of a model, and the command


CONFIG = {
    "model_type": "mixtral",
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "vocab_size": 128,
    "sliding_window": None,
    "tie_word_embeddings": False,
}

#: Runs the command in a child that is killed at that call of its progress, for each number given;
#: at last without.
KILLED = """
import os, signal, sys
import lamina.engine.prepare, lamina.store.hub  # once, not in each child
from lamina.cli.main import main

def killed_at(when):
    from lamina.store.files import Meter
    plain, calls = Meter.add, 0
    def add(self, nbytes):
        nonlocal calls
        calls += 1
        if calls == when:
            os.kill(os.getpid(), signal.SIGKILL)
        plain(self, nbytes)
    Meter.add = add

for when in (*map(int, sys.argv[2:]), None):
    if (child := os.fork()) == 0:
        if when is not None:
            killed_at(when)
        code = main(["prepare", "owner/model", "--discard-source", "--store", sys.argv[1]])
        sys.stdout.flush()
        os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(f"exit {code}", flush=True)
"""


def write_mixtral(path: Path) -> None:
    """A checkpoint with the names of Mixtral's releases, in three files."""
    from lamina.store.convert import prepare as prepare_folder

    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    tensors = {}
    for block in load_family(CONFIG).blocks:
        for t in (*block.plain, *block.linears):
            tensors[t.sources[0][0].key] = torch.randn(t.shape).bfloat16()
        for e in range(block.experts.num_experts if block.experts else 0):
            assert block.experts is not None
            (gate, up), (down,) = (
                block.experts.gate_up_sources(e)[0],
                block.experts.down_sources(e)[0],
            )
            for part, shape in ((gate, (32, 64)), (up, (32, 64)), (down, (64, 32))):
                tensors[part.key] = torch.randn(shape).bfloat16()
    weight_map = {}
    for i, names in enumerate((list(tensors)[:9], list(tensors)[9:20], list(tensors)[20:])):
        file = f"model-{i}.safetensors"
        save_file({name: tensors[name] for name in names}, path / file)
        weight_map.update(dict.fromkeys(names, file))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    family = load_family(CONFIG)
    prepare_folder(
        path, path.parent / "whole", model_type="mixtral", config=CONFIG, blocks=family.blocks
    )


def test_a_model_by_its_name(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lamina.engine.prepare import prepare as prepare_model

    write_mixtral(tmp_path / "checkpoint")
    store = prepare_model(REPO, store=tmp_path / "store")
    assert contents(store.path) == contents(tmp_path / "whole")
    again = prepare_model(str(server.folder), store=store.path)  # the same weights, in a folder
    assert again.fingerprint == store.fingerprint
    # Without a connection a finished store is opened, and a new one made from the hub's cache.
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    assert prepare_model(REPO, store=store.path).fingerprint == store.fingerprint
    other = prepare_model(REPO, store=tmp_path / "other")
    assert contents(other.path) == contents(store.path)
    with pytest.raises(CheckpointError, match="isn't downloaded from the hub"):
        prepare_model(str(server.folder), store=tmp_path / "third", discard_source=True)
    assert len(list(server.folder.glob("*.safetensors"))) == 3


def test_the_command_killed_and_repeated(tmp_path: Path) -> None:
    write_mixtral(tmp_path / "checkpoint")
    out = tmp_path / "store"
    with serving(HubServer(tmp_path / "checkpoint")) as server:
        env = {
            **os.environ,
            "HF_ENDPOINT": server.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "LAMINA_HOME": str(tmp_path / "lamina"),
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(out), "2", "10", "15", "25"],
            capture_output=True,
            text=True,
            timeout=300,
            check=True,
            env=env,
        )
    killed = f"exit {-signal.SIGKILL}"
    assert done.stdout.splitlines() == [killed] * 4 + [str(out), "exit 0"], done.stderr
    assert done.stderr == ""
    assert contents(out) == contents(tmp_path / "whole")
    assert not (tmp_path / "store.source").exists()
