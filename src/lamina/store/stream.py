"""Units in the order in which a step needs them, read ahead within a budget of bytes.

The consumer says which units are to come (`schedule`) and takes them in that order. Units are read
into a *ring*: one slab of memory, given out front to back as units come and handed back as they are
released. A unit that turns out not to be needed (an expert without tokens) is skipped by taking a
later one. Some units may live in a *cache* of their own, for good, so that they are read once.

Nothing here has a thread of its own: whatever makes room (a release, a skip) or work (a schedule)
hands the next reads to the reader's threads, as long as they fit the ring.
"""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import compress
from typing import Self, cast

import torch
from torch import Tensor

from lamina.store.codec import decode
from lamina.store.layout import ALIGNMENT, Piece, Store, Unit
from lamina.store.reader import Reader, Ticket, aligned_buffer
from lamina.store.spread import spread

__all__ = ["Loaded", "Stream", "StreamStats", "choose_cached"]

_DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "I8": torch.int8,
    "U8": torch.uint8,
}


@dataclass
class StreamStats:
    """What a stream did since its statistics were last reset.

    Args:
        bytes_read: from disk, units read ahead in vain included.
        bytes_from_cache: taken without a read.
        units_read: whole units read from disk.
        units_taken: units handed to the consumer.
        seconds_waited: how long the consumer stood in `take`.
        peak_ring_bytes: the most that was held at once outside the cache.
    """

    bytes_read: int = 0
    bytes_from_cache: int = 0
    units_read: int = 0
    units_taken: int = 0
    seconds_waited: float = 0.0
    peak_ring_bytes: int = 0


class _Ring:
    """A slab of memory, given out by first fit. What doesn't fit may come from outside of it, where
    the caller says so."""

    def __init__(self, nbytes: int):
        self.nbytes = nbytes - nbytes % ALIGNMENT
        self.used = 0
        self._slab = aligned_buffer(self.nbytes)
        self._holes = [(0, self.nbytes)] if self.nbytes else []  # (start, length), by start

    def take(self, nbytes: int, outside: bool) -> tuple[Tensor, int] | None:
        """Memory and its place (-1: outside of the slab), or None if there is no room."""
        if self.used + nbytes <= self.nbytes:
            for i, (start, length) in enumerate(self._holes):
                if length >= nbytes:
                    rest = [(start + nbytes, length - nbytes)] if length > nbytes else []
                    self._holes[i : i + 1] = rest
                    self.used += nbytes
                    return self._slab[start : start + nbytes], start
        if not outside:
            return None
        self.used += nbytes
        return aligned_buffer(nbytes), -1

    def give_back(self, start: int, nbytes: int) -> None:
        self.used -= nbytes
        if start < 0:
            return
        merged: list[tuple[int, int]] = []
        for hole in sorted([*self._holes, (start, nbytes)]):
            if merged and sum(merged[-1]) == hole[0]:
                merged[-1] = (merged[-1][0], merged[-1][1] + hole[1])
            else:
                merged.append(hole)
        self._holes = merged


class _Cached:
    """The place of a cached unit: empty, being read, or full."""

    def __init__(self, buffer: Tensor):
        self.buffer = buffer
        self.full = False
        self.ticket: Ticket | None = None
        self.waiting: list[_Slot] = []


class _Slot:
    """A scheduled unit on its way to the consumer."""

    def __init__(self, unit: Unit):
        self.unit = unit
        self.buffer: Tensor | None = None
        self.place = -1
        self.cached: _Cached | None = None
        self.ticket: Ticket | None = None
        self.done = False
        self.from_cache = False
        self.dropped = False
        self.error: BaseException | None = None


class Loaded:
    """A unit in memory. Use it as a context manager, or call `release`; then its bytes are reused,
    and tensors that `tensors` returned without copying are no longer valid."""

    def __init__(self, stream: Stream, slot: _Slot, buffer: Tensor):
        self.unit = slot.unit
        self._stream = stream
        self._slot: _Slot | None = slot
        self._buffer: Tensor | None = buffer

    @property
    def nbytes(self) -> int:
        """The bytes of the unit in its encoded form, padding included."""
        return self.unit.nbytes

    def encoded(self) -> dict[str, dict[str, Tensor]]:
        """Each tensor's stored pieces, by suffix (see `encode`): views, valid until release."""
        buffer = self._held()
        return {
            tensor.name: {piece.suffix: _view(buffer, piece) for piece in tensor.pieces}
            for tensor in self.unit.tensors
        }

    def tensors(
        self, dtype: torch.dtype, *, out: Mapping[str, Tensor] | None = None
    ) -> dict[str, Tensor]:
        """All tensors in `dtype`, by name (`q_proj`, `gate_up_proj`, `input_layernorm`).

        What is stored in `dtype` already (all of a bf16 store in bf16; norms and the like in any
        store) is returned as a view, valid until release.

        Args:
            out: where to write those tensors of it that have a name here (contiguous, of their
                shape and `dtype`); decoding into memory used before is several times as fast.
        """
        encoded = self.encoded()
        return {
            tensor.name: decode(
                encoded[tensor.name],
                tensor.shape,
                tensor.codec,
                dtype,
                out.get(tensor.name) if out is not None else None,
            )
            for tensor in self.unit.tensors
        }

    def release(self) -> None:
        """Gives the memory back to the ring. Calling it twice does no harm."""
        slot, self._slot, self._buffer = self._slot, None, None
        if slot is not None:
            self._stream._release(slot)

    def _held(self) -> Tensor:
        if self._buffer is None:
            raise RuntimeError(f"{self.unit} was released")
        return self._buffer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def _view(buffer: Tensor, piece: Piece) -> Tensor:
    flat = buffer[piece.start : piece.start + piece.nbytes]
    return flat.view(_DTYPES[piece.dtype]).view(piece.shape)


def choose_cached(store: Store, cache_bytes: int, first: Iterable[Unit] = ()) -> list[Unit]:
    """The units to keep within `cache_bytes`: `first` as far as they fit, then others, spread so
    that about the same share of every stretch of the store's bytes is cached."""
    chosen: dict[Unit, None] = {}
    left = cache_bytes
    for unit in first:
        if unit.nbytes <= left and unit not in chosen:
            chosen[unit] = None
            left -= unit.nbytes
    others = [unit for unit in store.units() if unit not in chosen]
    taken = spread([unit.nbytes for unit in others], left)
    return [*chosen, *compress(others, taken)]


class Stream:
    """Hands out units in the scheduled order, read ahead on other threads.

    One consumer: `schedule`, `take` and `release` are called from one thread.

    Args:
        ring_bytes: the most that is held at once, cache apart. A larger unit passes alone, and so
            does one that doesn't fit beside what the consumer itself holds.
        cache_bytes: units that fit in here are kept after their first read.
        cache_first: units to be cached before others, e.g. the dense ones for decoding.
        threads, direct, verify, throttle: see `Reader`.
        read_ahead: if not, a unit's read only starts when it is taken (for comparison).
    """

    def __init__(
        self,
        store: Store,
        *,
        ring_bytes: int,
        cache_bytes: int = 0,
        cache_first: Iterable[Unit] = (),
        threads: int = 4,
        direct: bool = True,
        verify: bool = True,
        read_ahead: bool = True,
        throttle: float | None = None,
    ):
        self._stats = StreamStats()
        self._ring = _Ring(ring_bytes)
        chosen = choose_cached(store, cache_bytes, cache_first)
        self.cached_bytes = sum(unit.nbytes for unit in chosen)
        slab, at = aligned_buffer(self.cached_bytes), 0
        self._cache: dict[Unit, _Cached] = {}
        for unit in chosen:
            self._cache[unit] = _Cached(slab[at : at + unit.nbytes])
            at += unit.nbytes
        self._read_ahead = read_ahead
        self._ahead: deque[_Slot] = deque()  # handed to the reader, or in memory
        self._pending: deque[_Slot] = deque()  # scheduled behind those
        self._counts: Counter[Unit] = Counter()  # of both
        self._wanted: _Slot | None = None  # what the consumer stands waiting for
        self._dropping = 0  # skipped units that are still being read
        self._changed = threading.Condition()  # its lock is reentrant
        self._closed = False
        self._reader = Reader(
            store, threads=threads, direct=direct, verify=verify, throttle=throttle
        )
        self._bytes_before = 0

    def schedule(self, units: Iterable[Unit]) -> None:
        """Appends to the order of units to come, and starts reading what fits."""
        with self._changed:
            if self._closed:
                raise RuntimeError("the stream is closed")
            for unit in units:
                self._pending.append(_Slot(unit))
                self._counts[unit] += 1
            self._pump()

    def take(self, unit: Unit) -> Loaded:
        """The next scheduled occurrence of `unit`; those scheduled before it are skipped, and what
        isn't being read of them never is. Waits until it is in memory.

        Raises:
            ValueError: it isn't scheduled.
            StoreError: it is damaged or can't be read.
        """
        started = time.monotonic()
        with self._changed:
            if self._closed:
                raise RuntimeError("the stream is closed")
            if not self._counts[unit]:
                raise ValueError(f"{unit} isn't scheduled")
            slot = self._skip_to(unit)
            self._wanted = slot
            try:
                self._pump()
                while not (slot.done or self._closed):
                    self._changed.wait()
                if self._closed:
                    raise RuntimeError("the stream was closed")
                if slot.error is not None:
                    raise slot.error
            except BaseException:
                if slot.buffer is None:
                    self._pending.popleft()
                    self._counts[unit] -= 1
                self._drop(slot)
                raise
            finally:
                self._wanted = None
                self._stats.seconds_waited += time.monotonic() - started
            self._stats.units_taken += 1
            self._stats.bytes_from_cache += unit.nbytes if slot.from_cache else 0
            assert slot.buffer is not None
            return Loaded(self, slot, slot.buffer)

    def skip(self, units: Iterable[Unit], times: int = 1) -> None:
        """Forgets the next `times` scheduled occurrences of each unit: they won't be taken, and
        what isn't being read of them never is."""
        with self._changed:
            left = {unit: min(times, self._counts[unit]) for unit in units}
            for queue in (self._ahead, self._pending):
                kept = []
                for slot in queue:
                    if left.get(slot.unit):
                        left[slot.unit] -= 1
                        self._counts[slot.unit] -= 1
                        self._drop(slot)
                    else:
                        kept.append(slot)
                queue.clear()
                queue.extend(kept)
            self._pump()

    def clear(self) -> None:
        """Forgets what is scheduled and not taken."""
        with self._changed:
            pending, self._pending = self._pending, deque()
            ahead, self._ahead = self._ahead, deque()
            self._counts.clear()
            for slot in [*pending, *ahead]:
                self._drop(slot)

    @property
    def stats(self) -> StreamStats:
        """What happened since the last `take_stats`."""
        with self._changed:
            return replace(self._stats, bytes_read=self._reader.bytes_read - self._bytes_before)

    def take_stats(self) -> StreamStats:
        """What happened since the last call; starts the counts anew."""
        with self._changed:
            stats = self.stats
            self._bytes_before += stats.bytes_read
            self._stats = StreamStats(peak_ring_bytes=self._ring.used)
            return stats

    def close(self) -> None:
        """Ends the threads. Tensors already taken stay valid."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._reader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Below, the lock is held by the caller, but for the two that the reader's threads call.

    def _skip_to(self, unit: Unit) -> _Slot:
        """The slot of `unit`, without those before it. If its read hasn't started, it is left at
        the front of the pending ones."""
        while True:
            slot = (self._ahead or self._pending)[0]
            if slot.unit is unit:
                if self._ahead:
                    self._ahead.popleft()
                    self._counts[unit] -= 1
                return slot
            (self._ahead or self._pending).popleft()
            self._counts[slot.unit] -= 1
            self._drop(slot)

    def _pump(self) -> None:
        """Starts the reads that are next and fit."""
        while self._pending and not self._closed:
            slot = self._pending[0]
            wanted = slot is self._wanted
            if not (wanted or self._read_ahead):
                return
            # The consumer can't release more than it holds: what it waits for must pass.
            if not self._start(slot, must=wanted and not self._dropping):
                return
            self._pending.popleft()
            if wanted:
                self._counts[slot.unit] -= 1
            else:
                self._ahead.append(slot)

    def _start(self, slot: _Slot, must: bool) -> bool:
        cached = self._cache.get(slot.unit)
        if cached is not None:
            slot.cached, slot.buffer = cached, cached.buffer
            slot.done = slot.from_cache = cached.full
            if not cached.full:
                cached.waiting.append(slot)
                self._read_cached(slot.unit, cached)
            return True
        place = self._ring.take(slot.unit.nbytes, outside=must)
        if place is None:
            return False
        slot.buffer, slot.place = place
        self._stats.peak_ring_bytes = max(self._stats.peak_ring_bytes, self._ring.used)
        slot.ticket = self._reader.submit(
            slot.unit, slot.buffer, lambda ticket: self._on_read(slot, ticket)
        )
        return True

    def _read_cached(self, unit: Unit, cached: _Cached) -> None:
        if cached.ticket is None:
            cached.ticket = self._reader.submit(
                unit, cached.buffer, lambda ticket: self._on_cached(cached, ticket)
            )

    def _on_read(self, slot: _Slot, ticket: Ticket) -> None:
        with self._changed:
            slot.done, slot.error = True, ticket.error
            self._stats.units_read += ticket.complete
            if slot.dropped:
                self._dropping -= 1
                self._free(slot)
                self._pump()
            self._changed.notify_all()

    def _on_cached(self, cached: _Cached, ticket: Ticket) -> None:
        with self._changed:
            cached.ticket = None
            if ticket.error is None and not ticket.complete:  # cancelled, and perhaps wanted again
                if cached.waiting:
                    self._read_cached(ticket.unit, cached)
                return
            cached.full = ticket.complete
            self._stats.units_read += ticket.complete
            for i, slot in enumerate(cached.waiting):
                slot.done, slot.error = True, ticket.error
                slot.from_cache = i > 0  # one read serves them all
            cached.waiting.clear()
            self._changed.notify_all()

    def _drop(self, slot: _Slot) -> None:
        """Gives up a slot that the consumer doesn't get."""
        if slot.buffer is None:
            return
        if (cached := slot.cached) is not None:
            if slot in cached.waiting:
                cached.waiting.remove(slot)
                unneeded = cached.ticket is not None and not cached.waiting
                if unneeded and self._reader.cancel(cast(Ticket, cached.ticket)):
                    cached.ticket = None
        elif slot.done or self._reader.cancel(cast(Ticket, slot.ticket)):
            self._free(slot)
        else:
            slot.dropped = True
            self._dropping += 1

    def _release(self, slot: _Slot) -> None:
        with self._changed:
            if slot.cached is None:
                self._free(slot)
                self._pump()

    def _free(self, slot: _Slot) -> None:
        self._ring.give_back(slot.place, slot.unit.nbytes)
        slot.buffer = None
