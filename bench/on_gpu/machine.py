"""The machine under measurement: its clock, its streams, its rates, its memory."""

from __future__ import annotations

import ctypes
import math
import mmap
import os
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from torch import Tensor

GB = 10**9
#: What the card under test is taken for, whatever it really has.
VRAM_CAP = 24 * GB


@dataclass
class Machine:
    """A device, and two streams beside the one that computes. On a CPU there are none, and what
    is meant for them happens in order.

    Args:
        deadline: on `time.monotonic`'s clock; what wouldn't end before it isn't begun.
        repeats: of what is timed.
    """

    device: torch.device
    deadline: float = math.inf
    repeats: int = 7
    copies: torch.cuda.Stream | None = field(init=False, default=None)
    decoding: torch.cuda.Stream | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.cuda:
            self.copies, self.decoding = torch.cuda.Stream(), torch.cuda.Stream()

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.cuda else "CPU"

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    # --- streams

    def on(self, stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
        return nullcontext() if stream is None else torch.cuda.stream(stream)

    def record(
        self, stream: torch.cuda.Stream | None = None, *, timed: bool = False
    ) -> torch.cuda.Event | None:
        """A mark in a stream (the one that computes, if None), or None on a CPU."""
        if not self.cuda:
            return None
        event = torch.cuda.Event(enable_timing=timed)
        event.record(stream or torch.cuda.current_stream())
        return event

    def wait(self, event: torch.cuda.Event | None, stream: torch.cuda.Stream | None = None) -> None:
        """A stream stands still until a mark is reached. The host doesn't."""
        if event is not None:
            (stream or torch.cuda.current_stream()).wait_event(event)

    # --- memory

    def cap_memory(self, nbytes: int | None) -> None:
        """What this process may take of the device's memory; None for all of it."""
        if self.cuda:
            total = torch.cuda.get_device_properties(self.device).total_memory
            share = 1.0 if nbytes is None else min(1.0, nbytes / total)
            torch.cuda.set_per_process_memory_fraction(share, self.device)

    def forget_peak(self) -> None:
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Bytes that the allocator held at most: what other programs couldn't have."""
        return torch.cuda.max_memory_reserved(self.device) if self.cuda else 0

    # --- time

    def seconds(self, work: Callable[[], object]) -> float:
        """The median time of `work`, once it is warm."""
        for _ in range(self.repeats // 3):
            work()
        times = []
        for _ in range(self.repeats):
            self.synchronize()
            start = time.perf_counter()
            work()
            self.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)


def matrix_rate(machine: Machine, size: int) -> float:
    """bf16 FLOP/s of a square matrix product."""
    x, w = (torch.randn(size, size, device=machine.device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(x)
    return 2 * size**3 / machine.seconds(lambda: torch.mm(x, w, out=out))


def copy_rate(machine: Machine, nbytes: int) -> float:
    """Bytes a second from pinned host memory to the device."""
    host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=machine.cuda)
    there = torch.empty(nbytes, dtype=torch.uint8, device=machine.device)
    return nbytes / machine.seconds(lambda: there.copy_(host, non_blocking=True))


def memory_rate(machine: Machine, nbytes: int) -> float:
    """Bytes a second, read and written, of a copy within the device's memory."""
    a = torch.empty(nbytes, dtype=torch.uint8, device=machine.device)
    b = torch.empty_like(a)
    return 2 * nbytes / machine.seconds(lambda: b.copy_(a))


def ram_available() -> int:
    """Bytes that this process may still take, by the system and by its control groups."""
    available = int(psutil.virtual_memory().available)
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            most = (Path("/sys/fs/cgroup") / limit).read_text().strip()
            now = (Path("/sys/fs/cgroup") / used).read_text().strip()
        except OSError:
            continue
        if most.isdigit():
            available = min(available, int(most) - int(now))
    return available


def pinned_size(nbytes: int) -> int:
    """What PyTorch takes for so many pinned bytes: it rounds up to a power of two."""
    return 1 << (nbytes - 1).bit_length()


class Slab:
    """Host memory in one piece, registered with CUDA: `torch.empty(pin_memory=True)` would round
    75 GB up to 128 GiB."""

    def __init__(self, nbytes: int, machine: Machine):
        self._memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):
                self._memory.madvise(mmap.MADV_HUGEPAGE)  # fewer pages to lock
        self.bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self._registered = False
        if machine.cuda:
            # Touched by many threads first: registering alone would do it with one.
            self.bytes[: nbytes // 8 * 8].view(torch.int64).fill_(0)
            status = torch.cuda.cudart().cudaHostRegister(self.bytes.data_ptr(), nbytes, 0)
            if int(status):
                raise RuntimeError(f"cudaHostRegister of {nbytes / GB:.0f} GB gave {status}")
            self._registered = True

    def part(self, start: int, nbytes: int) -> Tensor:
        return self.bytes[start : start + nbytes]

    def close(self) -> None:
        """Give the memory back; no tensor over it may be used after that."""
        if self._registered:
            torch.cuda.synchronize()
            torch.cuda.cudart().cudaHostUnregister(self.bytes.data_ptr())
        address, nbytes = self.bytes.data_ptr(), len(self._memory)
        del self.bytes
        try:
            self._memory.close()
        except BufferError:
            # A tensor still looks at it: its pages go, its addresses stay.
            libc = ctypes.CDLL(None, use_errno=True)
            libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(nbytes), mmap.MADV_DONTNEED)


def cores() -> int:
    return len(os.sched_getaffinity(0))
