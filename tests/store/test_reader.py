"""Reading units: the right bytes, past the page cache, and no damage goes unseen."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lamina.errors import StoreError
from lamina.store import reader as reader_module
from lamina.store.layout import Store, Unit
from lamina.store.reader import Reader, aligned_buffer, verify


@pytest.fixture
def store(make_sample: Callable[..., Any], tmp_path: Path) -> Store:
    made: Store = make_sample(hidden=70, inter=40).prepare(tmp_path / "store")
    return made


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "PIECE_BYTES", 4096)


def bytes_of(store: Store, unit: Unit) -> bytes:
    data = (store.path / unit.file).read_bytes()
    return data[unit.offset : unit.offset + unit.nbytes]


def flip(store: Store, unit: Unit, at: int) -> None:
    with (store.path / unit.file).open("r+b") as f:
        f.seek(unit.offset + at)
        byte = f.read(1)
        f.seek(unit.offset + at)
        f.write(bytes([byte[0] ^ 8]))


@pytest.mark.parametrize("direct", [True, False])
def test_reads_the_bytes_of_every_unit(store: Store, direct: bool) -> None:
    reader = Reader(store, threads=3, direct=direct)
    buffer = aligned_buffer(max(unit.nbytes for unit in store.units()))
    for unit in store.units():
        reader.read(unit, buffer)
        assert buffer[: unit.nbytes].numpy().tobytes() == bytes_of(store, unit)
    assert reader.bytes_read == store.total_bytes
    reader.close()


def refusing(error: int) -> Callable[..., Any]:
    """`os.open` and `os.preadv` of a file system that refuses direct reads, as tmpfs did or as
    some network file systems do: at opening, or only at reading."""
    true_open, true_preadv = os.open, os.preadv
    direct: set[int] = set()

    def fake_open(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT and error < 0:
            raise OSError(errno.EINVAL, "refused", str(path))
        fd = true_open(path, flags & ~os.O_DIRECT, *args, **kwargs)
        if flags & os.O_DIRECT:
            direct.add(fd)
        return fd

    def fake_preadv(fd: int, buffers: Any, offset: int, *args: Any) -> int:
        if fd in direct:
            raise OSError(errno.EINVAL, "refused")
        return true_preadv(fd, buffers, offset, *args)

    return lambda name: {"open": fake_open, "preadv": fake_preadv}[name]


@pytest.mark.parametrize("when", [-1, 1], ids=["at opening", "at reading"])
def test_falls_back_where_direct_reads_are_refused(
    store: Store, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    fake = refusing(when)
    monkeypatch.setattr(reader_module.os, "open", fake("open"))
    monkeypatch.setattr(reader_module.os, "preadv", fake("preadv"))
    reader = Reader(store, threads=2)
    buffer = aligned_buffer(max(unit.nbytes for unit in store.units()))
    for unit in store.units():
        reader.read(unit, buffer)
        assert buffer[: unit.nbytes].numpy().tobytes() == bytes_of(store, unit)
    reader.close()


def test_direct_reads_leave_the_page_cache_alone(store: Store) -> None:
    flags: list[int] = []
    true_open = os.open
    reader = Reader(store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            reader_module.os, "open", lambda p, f, *a: (flags.append(f), true_open(p, f, *a))[1]
        )
        unit = store.blocks[0].dense
        reader.read(unit, aligned_buffer(unit.nbytes))
    reader.close()
    assert len(flags) == 1
    assert flags[0] & os.O_DIRECT


@pytest.mark.parametrize("where", ["first", "last"])
def test_a_flipped_bit_is_found_at_the_first_read(store: Store, where: str) -> None:
    unit = store.block("layers.1.moe").experts[2]
    flip(store, unit, 0 if where == "first" else unit.nbytes - 1)
    reader = Reader(store)
    with pytest.raises(StoreError) as caught:
        reader.read(unit, aligned_buffer(unit.nbytes))
    text = str(caught.value)
    assert str(store.path / unit.file) in text
    assert "layers.1.moe, expert 2" in text
    assert "gate_up_proj" in text
    assert "lamina prepare" in str(caught.value.hint)
    other = store.block("layers.1.moe").experts[1]
    reader.read(other, aligned_buffer(other.nbytes))  # its neighbour is whole
    reader.close()


def test_checksums_are_computed_once_a_unit(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    true = reader_module.xxhash.xxh3_128_hexdigest
    monkeypatch.setattr(
        reader_module.xxhash, "xxh3_128_hexdigest", lambda v: (calls.append(1), true(v))[1]
    )
    unit = store.blocks[1].dense
    buffer = aligned_buffer(unit.nbytes)
    reader = Reader(store)
    for _ in range(3):
        reader.read(unit, buffer)
    reader.close()
    assert len(calls) == 1
    flip(store, unit, 0)
    careless = Reader(store, verify=False)
    careless.read(unit, buffer)
    careless.close()


def test_a_file_that_shrinks_or_goes_after_opening_is_an_error(store: Store) -> None:
    truncated, gone = store.blocks[1], store.blocks[2]
    os.truncate(store.path / truncated.file, truncated.nbytes - 4096)
    (store.path / gone.file).unlink()
    reader = Reader(store)
    with pytest.raises(StoreError, match="is truncated: it ends at byte") as caught:
        reader.read(truncated.dense, aligned_buffer(truncated.dense.nbytes))
    assert truncated.file in caught.value.message
    with pytest.raises(StoreError, match="No such file"):
        reader.read(gone.dense, aligned_buffer(gone.dense.nbytes))
    reader.close()


def test_a_throttled_reader_keeps_to_its_rate(store: Store) -> None:
    unit = max(store.units(), key=lambda unit: unit.nbytes)
    buffer = aligned_buffer(unit.nbytes)
    rate = unit.nbytes / 0.1
    reader = Reader(store, throttle=rate)
    started = time.monotonic()
    for _ in range(3):
        reader.read(unit, buffer)
    took = time.monotonic() - started
    reader.close()
    assert 0.29 < took < 0.6


def test_closing_is_prompt_and_wakes_who_waits(store: Store) -> None:
    reader = Reader(store, throttle=1.0)
    unit = store.blocks[1].dense
    tickets = [reader.submit(unit, aligned_buffer(unit.nbytes)) for _ in range(20)]
    started = time.monotonic()
    reader.close()
    assert time.monotonic() - started < 2
    with pytest.raises(RuntimeError, match="closed"):
        tickets[-1].wait()


# verify


def test_verify_finds_every_kind_of_damage(make_sample: Callable[..., Any], tmp_path: Path) -> None:
    sample = make_sample(True, write=False)
    sample.tensors["vision.patch"] = torch.randn(5000)
    sample.write()
    store: Store = sample.prepare(tmp_path / "store")
    seen: list[tuple[int, int, str]] = []
    assert verify(store, progress=lambda *a: seen.append(a)) == []
    total = sum(nbytes for _, nbytes in store.files())
    assert seen[-1][:2] == (total, total)
    assert {what for _, _, what in seen} == {file for file, _ in store.files()}

    flip(store, store.block("layers.0.moe").experts[1], 99)
    flip(store, store.block("layers.1.self_attn").dense, 4)
    with (store.path / store.blocks[0].file).open("r+b") as f:
        f.seek(20)
        f.write(b"?")
    with (store.path / store.extra[0].file).open("r+b") as f:
        f.seek(9000)
        f.write(b"\0\0\0")
    os.truncate(store.path / store.blocks[-1].file, 6000)
    problems = verify(store)
    text = "\n".join(problems)
    assert "layers.0.moe, expert 1" in text
    assert "layers.1.self_attn, its dense part" in text
    assert "checksum of its header" in text
    assert store.extra[0].file in text
    assert "is truncated" in text
    assert len([p for p in problems if "is damaged" in p]) == 4


@pytest.fixture(params=[True, False], ids=["direct", "buffered"])
def direct(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def test_verify_works_both_ways(store: Store, direct: bool) -> None:
    assert verify(store, direct=direct, threads=2) == []
    unit = store.block("layers.1.moe").experts[0]
    flip(store, unit, 5000)
    assert len(verify(store, direct=direct, threads=2)) == 1


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_buffers_are_aligned_and_cost_nothing_until_used() -> None:
    before = resident_bytes()
    buffer: Tensor = aligned_buffer(1 << 31)
    assert buffer.data_ptr() % 4096 == 0
    buffer[12345] = 7
    assert buffer[12345] == 7
    assert resident_bytes() - before < 100 << 20
    assert aligned_buffer(0).numel() == 0
