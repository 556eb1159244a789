"""Preparing from the hub: what can't be done is said, with what to do, and nothing is lost."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub_constants
import pytest
from tests.store.hub_server import REPO, HubServer, contents, prepare_from_hub, shards

from lamina.errors import CheckpointError, StoreError
from lamina.store import hub as hub_module
from lamina.store.convert import convert
from lamina.store.hub import Hub, cached_checkpoint


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
        prepare_from_hub(sample, tmp_path / "store")
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
    prepare_from_hub(sample, tmp_path / "store", discard=False)
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
        prepare_from_hub(sample, tmp_path / "store")
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
    prepare_from_hub(sample, tmp_path / "store")
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
        prepare_from_hub(sample, small_disk / "store", progress=fill)
    assert "again" in str(caught.value.hint)
    filler.unlink()
    prepare_from_hub(sample, small_disk / "store")
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
        prepare_from_hub(sample, tmp_path / "store", discard=discard)
    assert ("the largest file" if discard else "the download") in caught.value.message
    assert ("--discard-source" in str(caught.value.hint)) is not discard
    assert not [name for name, _, _ in server.served if name.endswith(".safetensors")]
    monkeypatch.undo()
