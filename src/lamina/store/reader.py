"""Reads units from disk, past the page cache.

The page cache would compete with the memory that a plan has given away, and it forgets exactly what
the palindrome of a step needs next. So files are opened with `O_DIRECT` and read with `preadv` by a
few threads into page-aligned buffers. A large unit is cut into pieces that all threads share, in
order: the unit asked for first is complete first. Where a file system refuses direct reads, they
are buffered and their pages given back with `posix_fadvise`.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from lamina.errors import StoreError
from lamina.store.layout import ALIGNMENT, HINT_BLOCK, Store, Unit, size_problem

__all__ = ["Reader", "Ticket", "aligned_buffer", "verify"]

#: Bytes of one `preadv`: large enough for a drive's full rate, small enough to share and to stop.
PIECE_BYTES = 4 << 20

Progress = Callable[[int, int, str], None]


def aligned_buffer(nbytes: int) -> Tensor:
    """Page-aligned memory as a uint8 tensor `[nbytes]`. The system provides its pages at first use
    and takes them back when the last view is gone."""
    memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: only slower
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)[:nbytes]


class _Files:
    """The open files of a store: direct where the file system allows it."""

    def __init__(self, root: Path, direct: bool):
        self.root = root
        self._direct = direct and hasattr(os, "O_DIRECT")
        self._lock = threading.Lock()
        self._open: dict[tuple[str, bool], int] = {}
        self._buffered: set[str] = set()

    def read_into(self, file: str, view: memoryview, offset: int) -> None:
        """Fills `view` (of page-aligned memory) with the file's bytes from `offset` on.

        Raises:
            EOFError: the file ends before.
            OSError: it can't be read.
        """
        aligned = len(view) % ALIGNMENT == 0 and offset % ALIGNMENT == 0
        if self._direct and aligned and file not in self._buffered:
            try:
                self._fill(self._fd(file, direct=True), view, offset)
                return
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                    raise
                self._buffered.add(file)
        fd = self._fd(file, direct=False)
        self._fill(fd, view, offset)
        os.posix_fadvise(fd, offset, len(view), os.POSIX_FADV_DONTNEED)

    @staticmethod
    def _fill(fd: int, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            n = os.preadv(fd, [view[done:]], offset + done)
            if n == 0:
                raise EOFError(f"ends at byte {offset + done:,}")
            done += n

    def _fd(self, file: str, direct: bool) -> int:
        with self._lock:
            key = (file, direct)
            if key not in self._open:
                flags = os.O_RDONLY | os.O_CLOEXEC | (os.O_DIRECT if direct else 0)
                self._open[key] = os.open(self.root / file, flags)
            return self._open[key]

    def close(self) -> None:
        with self._lock:
            for fd in self._open.values():
                os.close(fd)
            self._open.clear()


class Ticket:
    """A read that was asked for. `wait` for it, or be called when it is done: then it is
    `complete`, or has an `error`, or was cancelled."""

    def __init__(self, unit: Unit, buffer: Tensor, on_done: Callable[[Ticket], None] | None):
        self.unit = unit
        self.error: BaseException | None = None
        self.complete = False
        self.cancelled = False
        self._view = buffer.numpy().data
        self._on_done = on_done
        self._done = threading.Event()
        self._queued = True  # not all of it is being read yet
        self._next = 0  # where the next piece starts
        self._flying = 0  # pieces being read

    def wait(self) -> None:
        """Returns when the buffer is filled.

        Raises:
            StoreError: the unit is damaged or can't be read.
        """
        self._done.wait()
        if self.error is not None:
            raise self.error


class Reader:
    """Reads the units of a store with several reads in flight.

    Args:
        threads: reads in flight.
        direct: go past the page cache where the file system allows it.
        verify: compare a unit's checksum the first time it is read.
        throttle: at most so many bytes a second (a setting for tests), or None.
    """

    def __init__(
        self,
        store: Store,
        *,
        threads: int = 4,
        direct: bool = True,
        verify: bool = True,
        throttle: float | None = None,
    ):
        self.bytes_read = 0
        self._files = _Files(store.path, direct)
        self._verify = verify
        self._verified: set[Unit] = set()
        self._throttle = throttle
        self._free_at = 0.0  # when the throttled drive is free again
        self._queue: deque[Ticket] = deque()
        self._wake = threading.Condition()
        self._closing = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, name=f"lamina-read-{i}", daemon=True)
            for i in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def read(self, unit: Unit, buffer: Tensor) -> None:
        """Fills `buffer` (from `aligned_buffer`, at least `unit.nbytes`) with the unit.

        Raises:
            StoreError: the unit is damaged or can't be read.
        """
        self.submit(unit, buffer).wait()

    def submit(
        self, unit: Unit, buffer: Tensor, on_done: Callable[[Ticket], None] | None = None
    ) -> Ticket:
        """Asks for a read behind those already asked for, and returns at once.

        Args:
            on_done: called once from a reading thread when the buffer is filled, the read failed
                or its cancelling took effect.
        """
        ticket = Ticket(unit, buffer[: unit.nbytes], on_done)
        with self._wake:
            self._queue.append(ticket)
            self._wake.notify(len(self._threads))
        return ticket

    def cancel(self, ticket: Ticket) -> bool:
        """Drops what isn't being read yet. True if nothing was being read: then the buffer is free
        and `on_done` isn't called; otherwise it is free when `on_done` is called."""
        with self._wake:
            ticket.cancelled = True
            if not ticket._queued:
                return False
            self._unqueue(ticket)
            return ticket._flying == 0

    def close(self) -> None:
        """Ends the threads, each after the piece it is reading, and closes the files."""
        self._closing.set()
        with self._wake:
            self._wake.notify_all()
        for thread in self._threads:
            thread.join()
        for ticket in self._queue:
            ticket.error = RuntimeError("the reader was closed")
            ticket._done.set()
        self._files.close()

    def _unqueue(self, ticket: Ticket) -> None:
        if ticket._queued:
            ticket._queued = False
            self._queue.remove(ticket)

    def _work(self) -> None:
        while (piece := self._next_piece()) is not None:
            ticket, start, stop = piece
            error = self._read_piece(ticket, start, stop)
            with self._wake:
                ticket._flying -= 1
                if error is None:
                    self.bytes_read += stop - start
                elif ticket.error is None:
                    ticket.error = error
                    self._unqueue(ticket)
                last = ticket._flying == 0 and not ticket._queued
            if last:
                self._finish(ticket)

    def _next_piece(self) -> tuple[Ticket, int, int] | None:
        with self._wake:
            while not self._queue and not self._closing.is_set():
                self._wake.wait()
            if self._closing.is_set():
                return None
            ticket = self._queue[0]
            start = ticket._next
            stop = min(start + PIECE_BYTES, ticket.unit.nbytes)
            ticket._next = stop
            ticket._flying += 1
            if stop == ticket.unit.nbytes:
                self._unqueue(ticket)
            return ticket, start, stop

    def _read_piece(self, ticket: Ticket, start: int, stop: int) -> BaseException | None:
        unit = ticket.unit
        try:
            self._files.read_into(unit.file, ticket._view[start:stop], unit.offset + start)
        except (OSError, EOFError) as error:
            return _unreadable(self._files.root, unit, error)
        except BaseException as error:
            return error
        if self._throttle is not None:
            with self._wake:
                self._free_at = max(self._free_at, time.monotonic())
                self._free_at += (stop - start) / self._throttle
                delay = self._free_at - time.monotonic()
            self._closing.wait(delay)
        return None

    def _finish(self, ticket: Ticket) -> None:
        unit = ticket.unit
        complete = ticket.error is None and not ticket.cancelled
        if complete and self._verify and unit not in self._verified:
            if xxhash.xxh3_128_hexdigest(ticket._view) == unit.checksum:
                self._verified.add(unit)
            else:
                complete, ticket.error = False, _damaged(self._files.root, unit)
        ticket.complete = complete
        ticket._view.release()
        ticket._done.set()
        if ticket._on_done is not None:
            ticket._on_done(ticket)


def _unreadable(root: Path, unit: Unit, error: OSError | EOFError) -> StoreError:
    file = root / unit.file
    if isinstance(error, EOFError):
        why = f"{file} is truncated: it {error}"
    else:
        why = f"{file} can't be read: {error.strerror or error}"
    return StoreError(f"{why} ({unit}: {_tensor_names(unit)}).", hint=HINT_BLOCK)


def _damaged(root: Path, unit: Unit) -> StoreError:
    return StoreError(
        f"{root / unit.file} is damaged: the checksum of {unit} ({_tensor_names(unit)}) "
        f"doesn't fit.",
        hint=HINT_BLOCK,
    )


def _tensor_names(unit: Unit) -> str:
    return ", ".join(tensor.name for tensor in unit.tensors)


# All of a store


def verify(
    store: Store, *, threads: int = 4, direct: bool = True, progress: Progress | None = None
) -> list[str]:
    """Reads all of a store and compares every checksum.

    Args:
        progress: called with (bytes done, bytes in total, file).

    Returns:
        What is wrong, one sentence a range; empty if the store is whole.
    """
    files = _Files(store.path, direct)
    stop = threading.Event()
    lock = threading.Lock()
    ranges = list(_ranges(store))
    total, done = sum(nbytes for _, _, nbytes, _, _ in ranges), 0

    def check(range_: tuple[str, int, int, str, str]) -> str | None:
        nonlocal done
        file, offset, nbytes, checksum, what = range_
        buffer = aligned_buffer(min(nbytes, PIECE_BYTES)).numpy().data
        digest = xxhash.xxh3_128()
        for start in range(0, nbytes, PIECE_BYTES):
            if stop.is_set():
                return None
            view = buffer[: min(PIECE_BYTES, nbytes - start)]
            try:
                files.read_into(file, view, offset + start)
            except EOFError as error:
                return f"{store.path / file} is truncated: it {error} ({what})."
            except OSError as error:
                return f"{store.path / file} can't be read: {error.strerror or error} ({what})."
            digest.update(view)
            with lock:
                done += len(view)
                if progress is not None:
                    progress(done, total, file)
        if digest.hexdigest() != checksum:
            return f"{store.path / file} is damaged: the checksum of {what} doesn't fit."
        return None

    sizes = [size_problem(store.path / file, nbytes) for file, nbytes in store.files()]
    with ThreadPoolExecutor(threads) as pool:
        try:
            found = list(pool.map(check, ranges))
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)
            files.close()
    return list(dict.fromkeys(problem for problem in [*sizes, *found] if problem is not None))


def _ranges(store: Store) -> Iterator[tuple[str, int, int, str, str]]:
    """(file, offset, bytes, checksum, what it is) of all that a store's checksums cover."""
    for block in store.blocks:
        yield block.file, 0, block.header_bytes, block.header_checksum, "its header"
        for unit in block.units:
            what = f"{unit} ({_tensor_names(unit)})"
            yield unit.file, unit.offset, unit.nbytes, unit.checksum, what
    for extra in store.extra:
        yield extra.file, 0, extra.nbytes, extra.checksum, "all of it"
