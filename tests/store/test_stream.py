"""Read-ahead: the right tensors in the right order, inside the ring, whatever else happens."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from lamina.errors import StoreError
from lamina.store import reader as reader_module
from lamina.store import stream as stream_module
from lamina.store.codec import CODECS, decode, encode
from lamina.store.layout import Store, Unit
from lamina.store.stream import Stream, choose_cached


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "PIECE_BYTES", 4096)


@pytest.fixture
def store(make_sample: Callable[..., Any], tmp_path: Path) -> Store:
    made: Store = make_sample(hidden=70, inter=40, experts=5, layers=3).prepare(tmp_path / "store")
    return made


def palindrome(store: Store) -> list[Unit]:
    forward = list(store.units())
    return [*forward, *reversed(forward)]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hands_out_what_was_encoded(
    make_sample: Callable[..., Any], tmp_path: Path, codec: str, dtype: torch.dtype
) -> None:
    sample = make_sample(True)
    store = sample.prepare(tmp_path / "store", codec)
    with Stream(store, ring_bytes=1 << 16) as stream:
        stream.schedule(store.units())
        for unit in store.units():
            with stream.take(unit) as loaded:
                tensors = loaded.tensors(dtype)
                assert loaded.nbytes == unit.nbytes
                assert list(tensors) == [t.name for t in unit.tensors]
                for stored in unit.tensors:
                    want = sample.expected(unit.block, unit.expert, stored.name)
                    pieces = encode(want, stored.codec)
                    again = decode(pieces, want.shape, stored.codec, dtype)
                    assert tensors[stored.name].dtype == dtype
                    assert torch.equal(tensors[stored.name], again)


def test_decodes_into_memory_that_is_given(store: Store) -> None:
    unit = store.block("layers.0.moe").experts[0]
    with Stream(store, ring_bytes=1 << 20) as stream:
        stream.schedule([unit, unit])
        with stream.take(unit) as loaded:
            want = {name: t.clone() for name, t in loaded.tensors(torch.bfloat16).items()}
        out = {"gate_up_proj": torch.empty(80, 70, dtype=torch.bfloat16), "other": torch.empty(1)}
        with stream.take(unit) as loaded:
            got = loaded.tensors(torch.bfloat16, out=out)
        assert got["gate_up_proj"] is out["gate_up_proj"]
        assert all(torch.equal(got[name], want[name]) for name in want)


def test_tensors_that_need_no_decoding_are_views_until_release(store: Store) -> None:
    unit = store.blocks[0].dense
    with Stream(store, ring_bytes=1 << 20) as stream:
        stream.schedule([unit])
        loaded = stream.take(unit)
        one = loaded.tensors(torch.bfloat16)["embed_tokens"]
        two = loaded.tensors(torch.bfloat16)["embed_tokens"]
        assert one.data_ptr() == two.data_ptr()
        loaded.release()
        loaded.release()  # twice does no harm
        with pytest.raises(RuntimeError, match="released"):
            loaded.tensors(torch.bfloat16)


@pytest.mark.parametrize("cache_share", [0, 0.3, 1])
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("read_ahead", [True, False])
def test_the_ring_bounds_what_is_held(
    store: Store, cache_share: float, threads: int, read_ahead: bool
) -> None:
    largest = max(unit.nbytes for unit in store.units())
    ring = 2 * largest + 4096
    cache = int(cache_share * store.total_bytes)
    with Stream(
        store, ring_bytes=ring, cache_bytes=cache, threads=threads, read_ahead=read_ahead
    ) as stream:
        for _ in range(3):
            stream.schedule(palindrome(store))
            for unit in palindrome(store):
                with stream.take(unit) as loaded:
                    assert loaded.unit is unit
            stats = stream.take_stats()
            assert stats.peak_ring_bytes <= ring
            assert stats.units_taken == 2 * len(list(store.units()))
        assert stats.bytes_read + stats.bytes_from_cache == 2 * store.total_bytes
        assert stats.bytes_from_cache == 2 * stream.cached_bytes
        assert stream.cached_bytes <= cache
        assert stats.units_read == stats.units_taken - 2 * len(choose_cached(store, cache))
        assert stats.seconds_waited >= 0


def test_a_unit_larger_than_the_ring_passes_alone(store: Store) -> None:
    units = list(store.units())
    with Stream(store, ring_bytes=0) as stream:
        stream.schedule(units)
        for unit in units:
            with stream.take(unit) as loaded:
                assert loaded.tensors(torch.float32)
        assert stream.take_stats().peak_ring_bytes == max(unit.nbytes for unit in units)


def test_the_consumer_may_hold_one_unit_while_others_pass(store: Store) -> None:
    """As the engine does: the dense part of a block stays while its experts come and go."""
    block = store.block("layers.1.moe")
    ring = block.dense.nbytes + block.experts[0].nbytes
    with Stream(store, ring_bytes=ring) as stream:
        stream.schedule([*block.units, *reversed(block.units)])
        with stream.take(block.dense) as dense:
            before = dense.encoded()["router"][""].clone()
            for expert in block.experts:
                stream.take(expert).release()
            assert torch.equal(dense.encoded()["router"][""], before)
        held = [stream.take(expert) for expert in reversed(block.experts)]  # more than the ring
        assert all(loaded.tensors(torch.float32) for loaded in held)
        for loaded in held:
            loaded.release()
        stream.take(block.dense).release()
        assert stream.take_stats().bytes_read == 2 * sum(unit.nbytes for unit in block.units)
        assert stream.take_stats().peak_ring_bytes == 0


def test_reads_ahead_as_far_as_the_ring_goes_and_no_further(store: Store) -> None:
    experts = store.block("layers.0.moe").experts
    size = experts[0].nbytes
    with Stream(store, ring_bytes=3 * size) as stream:
        stream.schedule(experts)
        wait_until(lambda: stream.stats.units_read == 3)
        time.sleep(0.05)
        assert stream.stats.bytes_read == 3 * size
        first = stream.take(experts[0])
        time.sleep(0.05)
        assert stream.stats.bytes_read == 3 * size
        first.release()
        wait_until(lambda: stream.stats.bytes_read == 4 * size)
        assert stream.stats.seconds_waited < 0.05


def test_experts_without_tokens_are_skipped_and_not_read(store: Store) -> None:
    block = store.block("layers.0.moe")
    later = store.block("layers.2.moe")
    size = block.experts[0].nbytes
    with Stream(store, ring_bytes=size, threads=1) as stream:
        stream.schedule([*block.experts, *later.experts])
        wait_until(lambda: stream.stats.units_read == 1)  # expert 0; there is no room for more
        stream.take(later.experts[4]).release()
        stats = stream.take_stats()
        assert stats.bytes_read == 2 * size
        assert stats.units_taken == 1
        with pytest.raises(ValueError, match="isn't scheduled"):
            stream.take(block.experts[1])


def test_skipped_occurrences_are_not_read(store: Store) -> None:
    block = store.block("layers.0.moe")
    size, idle = block.experts[0].nbytes, block.experts[1:3]
    with Stream(store, ring_bytes=size, threads=1) as stream:
        stream.schedule([*block.experts, *reversed(block.experts), *block.experts])
        stream.skip(idle, times=2)
        for unit in (block.experts[0], *block.experts[3:]):
            stream.take(unit).release()
        for unit in (*reversed(block.experts[3:]), block.experts[0]):
            stream.take(unit).release()
        assert stream.stats.bytes_read <= (2 * (len(block.experts) - 2) + 1) * size
        for unit in block.experts:  # the third occurrences stay
            stream.take(unit).release()
        with pytest.raises(ValueError, match="isn't scheduled"):
            stream.take(block.experts[1])


def test_skipping_while_reads_are_under_way(store: Store) -> None:
    units = palindrome(store) * 3
    rng = random.Random(5)
    for seed in range(6):
        chosen = sorted(rng.sample(range(len(units)), 12))
        cache = store.total_bytes // 4 if seed % 2 else 0
        rate = 30e6 if seed % 3 else None
        with Stream(store, ring_bytes=60_000, cache_bytes=cache, throttle=rate) as stream:
            stream.schedule(units[:50])
            stream.schedule(units[50:])
            for at in chosen:
                # Take the occurrence at `at`: those of the same unit before it are skipped first.
                while sum(stream._counts.values()) > len(units) - at:
                    nearest = next(iter([*stream._ahead, *stream._pending])).unit
                    stream.take(nearest).release()
                with stream.take(units[at]) as loaded:
                    path = store.path / units[at].file
                    start = units[at].offset
                    want = path.read_bytes()[start : start + units[at].nbytes]
                    assert loaded._held().numpy().tobytes() == want
            stream.clear()
            wait_until(lambda s=stream: s._dropping == 0)  # type: ignore[misc]
            assert stream._ring.used == 0
            assert stream._ring._holes == [(0, stream._ring.nbytes)]


def test_clear_forgets_the_schedule(store: Store) -> None:
    units = list(store.units())
    with Stream(store, ring_bytes=1 << 20) as stream:
        stream.schedule(units)
        stream.take(units[2]).release()
        stream.clear()
        with pytest.raises(ValueError, match="isn't scheduled"):
            stream.take(units[3])
        stream.schedule(units[:1])
        stream.take(units[0]).release()


def test_cached_units_are_read_once_and_spread_evenly(
    make_sample: Callable[..., Any], tmp_path: Path
) -> None:
    sample = make_sample(hidden=70, inter=40, experts=10, layers=4, vocab=4000)
    store = sample.prepare(tmp_path / "store")
    moe = [block for block in store.blocks if block.kind == "moe"]
    for share in (0.25, 0.5, 0.8):
        chosen = set(choose_cached(store, int(share * store.total_bytes)))
        assert sum(unit.nbytes for unit in chosen) <= share * store.total_bytes
        counts = [sum(expert in chosen for expert in block.experts) for block in moe]
        assert max(counts) - min(counts) <= 1
        assert sum(counts) > 0
    assert set(choose_cached(store, store.total_bytes)) == set(store.units())
    assert choose_cached(store, 0) == []
    dense = [block.dense for block in store.blocks]
    budget = sum(unit.nbytes for unit in dense)
    assert set(choose_cached(store, budget, dense)) == set(dense)

    experts = moe[0].experts
    with Stream(
        store, ring_bytes=1 << 20, cache_bytes=2 * experts[0].nbytes, cache_first=experts[3:5]
    ) as stream:
        for i in range(3):
            stream.schedule(experts)
            for expert in experts:
                stream.take(expert).release()
            read = stream.take_stats().bytes_read
            assert read == (10 if i == 0 else 8) * experts[0].nbytes


def test_a_cached_unit_that_was_skipped_half_read_is_read_again(store: Store) -> None:
    unit = max(store.units(), key=lambda unit: unit.nbytes)
    other = store.blocks[0].dense
    for delay in (0.0, 0.01, 0.03):
        with Stream(
            store,
            ring_bytes=1 << 20,
            cache_bytes=unit.nbytes,
            cache_first=[unit],
            threads=1,
            throttle=500e3,
        ) as stream:
            stream.schedule([unit, other, unit, unit])
            time.sleep(delay)
            stream.take(other).release()
            for _ in range(2):
                with stream.take(unit) as loaded:
                    start = unit.offset
                    want = (store.path / unit.file).read_bytes()[start : start + unit.nbytes]
                    assert loaded._held().numpy().tobytes() == want
            assert stream.stats.bytes_from_cache >= unit.nbytes


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("read_ahead", [True, False])
def test_damage_found_by_a_reading_thread_surfaces_in_take(
    store: Store, cached: bool, read_ahead: bool
) -> None:
    units = list(store.units())
    bad = store.block("layers.1.moe").experts[3]
    with (store.path / bad.file).open("r+b") as f:
        f.seek(bad.offset + 100)
        byte = f.read(1)
        f.seek(bad.offset + 100)
        f.write(bytes([byte[0] ^ 1]))
    cache = store.total_bytes if cached else 0
    with Stream(store, ring_bytes=1 << 20, cache_bytes=cache, read_ahead=read_ahead) as stream:
        for _ in range(2):  # and again when it is asked for again
            stream.schedule(units)
            for unit in units:
                if unit is not bad:
                    stream.take(unit).release()
                    continue
                with pytest.raises(StoreError, match=r"layers\.1\.moe, expert 3"):
                    stream.take(unit)
    assert stream._ring.used == 0


def test_damage_in_a_unit_that_is_skipped_does_not_matter(store: Store) -> None:
    experts = store.block("layers.1.moe").experts
    with (store.path / experts[1].file).open("r+b") as f:
        f.seek(experts[1].offset)
        f.write(b"\1\2\3\4")
    with Stream(store, ring_bytes=1 << 20) as stream:
        stream.schedule(experts)
        stream.take(experts[0]).release()
        stream.take(experts[2]).release()


def test_reading_ahead_hides_reads_behind_work_and_without_it_they_add_up(store: Store) -> None:
    experts = [e for block in store.blocks for e in block.experts]
    rate = experts[0].nbytes / 0.01  # a read takes 10 ms

    def run(read_ahead: bool) -> tuple[float, float]:
        with Stream(
            store, ring_bytes=4 * experts[0].nbytes, read_ahead=read_ahead, throttle=rate
        ) as stream:
            started = time.monotonic()
            stream.schedule(experts)
            for expert in experts:
                with stream.take(expert):
                    time.sleep(0.01)
            return time.monotonic() - started, stream.take_stats().seconds_waited

    ahead, waited_ahead = run(True)
    synchronous, waited = run(False)
    assert synchronous > 2 * len(experts) * 0.0095
    assert ahead < 0.8 * synchronous
    assert waited > len(experts) * 0.009
    assert waited_ahead < 0.6 * waited


def test_memory_is_used_again(store: Store) -> None:
    experts = store.block("layers.1.moe").experts
    places = set()
    with Stream(store, ring_bytes=2 * experts[0].nbytes) as stream:
        for _ in range(10):
            stream.schedule(experts)
            for expert in experts:
                with stream.take(expert) as loaded:
                    places.add(loaded._held().data_ptr())
    assert len(places) == 2


def test_without_read_ahead_nothing_is_read_before_it_is_taken(store: Store) -> None:
    units = list(store.units())
    with Stream(store, ring_bytes=1 << 20, read_ahead=False) as stream:
        stream.schedule(units)
        time.sleep(0.05)
        assert stream.stats.bytes_read == 0
        stream.take(units[3]).release()
        assert stream.stats.bytes_read == units[3].nbytes


def test_the_ring_gives_out_no_byte_twice() -> None:
    ring = stream_module._Ring(64 * 4096 + 100)
    rng = random.Random(3)
    held: dict[int, int] = {}
    refused = 0
    for _ in range(3000):
        nbytes = rng.choice([1, 1, 1, 2, 5, 9]) * 4096
        if rng.random() < 0.55:
            got = ring.take(nbytes, outside=False)
            if got is None:
                refused += 1
                continue
            memory, start = got
            assert memory.numel() == nbytes
            assert memory.data_ptr() % 4096 == 0
            assert all(start + nbytes <= s or s + n <= start for s, n in held.items())
            assert start + nbytes <= ring.nbytes
            held[start] = nbytes
        elif held:
            start = rng.choice(list(held))
            ring.give_back(start, held.pop(start))
        assert ring.used == sum(held.values()) <= ring.nbytes
    assert refused > 10
    for start, nbytes in held.items():
        ring.give_back(start, nbytes)
    assert ring._holes == [(0, 64 * 4096)]
    assert ring.take(4096 * 65, outside=False) is None
    outside = ring.take(4096 * 65, outside=True)
    assert outside is not None
    assert outside[1] == -1


# Ends


def test_closing_is_prompt_and_final(store: Store) -> None:
    before = threading.active_count()
    stream = Stream(store, ring_bytes=1 << 20, throttle=1000.0)
    stream.schedule(store.units())
    time.sleep(0.02)
    started = time.monotonic()
    stream.close()
    stream.close()
    assert time.monotonic() - started < 1
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        stream.take(store.blocks[0].dense)
    with pytest.raises(RuntimeError, match="closed"):
        stream.schedule([])


def test_closing_wakes_a_consumer_that_waits(store: Store) -> None:
    stream = Stream(store, ring_bytes=1 << 20, throttle=1000.0)
    unit = store.blocks[0].dense
    stream.schedule([unit])
    timer = threading.Timer(0.05, stream.close)
    timer.start()
    with pytest.raises(RuntimeError, match="closed"):
        stream.take(unit)
    timer.join()


INTERRUPTED = """
import sys
from lamina.store.layout import Store
from lamina.store.stream import Stream
store = Store.open(sys.argv[1])
with Stream(store, ring_bytes=1 << 20, throttle=100.0) as stream:
    stream.schedule(store.units())
    print("waiting", flush=True)
    try:
        stream.take(store.blocks[0].dense)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
print("closed", flush=True)
"""


def test_ctrl_c_while_waiting_ends_at_once(store: Store) -> None:
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(store.path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "waiting\n"
        time.sleep(0.2)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=10)
    finally:
        child.kill()
    assert out == "interrupted\nclosed\n"
    assert err == ""


def test_an_interrupted_take_gives_its_memory_back(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = list(store.units())
    with Stream(store, ring_bytes=1 << 20, read_ahead=False) as stream:
        stream.schedule(units)

        def interrupt() -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(stream._changed, "wait", interrupt)
            with pytest.raises(KeyboardInterrupt):
                stream.take(units[0])
        wait_until(lambda: stream._ring.used == 0)
        stream.take(units[1]).release()
