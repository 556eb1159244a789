"""What `lamina doctor` measures: the rates that a plan goes by, with the engine's own operations.

Each takes a second or so. The shapes of products on CPU are those of the small models, which are
what a CPU tunes; on CUDA those of the large ones.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lamina.errors import UsageError
from lamina.models.common import rms_norm
from lamina.optim import make_optimizer
from lamina.plan.cards import CARDS, find_card
from lamina.plan.hardware import Hardware, described_machine, memory_of_this_machine, processor_name
from lamina.plan.steptime import UPDATE_BYTES
from lamina.plan.work import NORM_BYTES
from lamina.recipe.places import home
from lamina.store.codec import decode, encode
from lamina.store.reader import aligned_buffer

__all__ = ["Progress", "Shapes", "measure_disk", "measure_machine"]

#: Told what is being measured.
Progress = Callable[[str], None]

#: Seconds from somewhere on.
Clock = Callable[[], float]

#: Seconds that each measurement takes at least.
_SECONDS = 1.0
#: Bytes of the file that is read, and of one read; reads in flight.
_FILE = 512 << 20
_PIECE = 4 << 20
_THREADS = 4


def measure_machine(progress: Progress | None = None, *, clock: Clock = time.monotonic) -> Hardware:
    """This machine's rates, in under a minute.

    Args:
        clock: what arithmetic is timed by; `time.thread_time` with a single thread leaves out what
            other programs take of a CPU.

    Raises:
        OSError: nothing can be written under lamina's home.
    """
    say = progress or (lambda what: None)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    watch = _Watch(device, clock)
    hardware = _described(cuda)
    say("direct reads")
    disk = measure_disk(home())
    if cuda:
        say("copies to the device")
        hardware = replace(hardware, bus=_bus(watch))
    say("matrix products")
    bf16, fp32 = (_matrix(watch, dtype) for dtype in (torch.bfloat16, torch.float32))
    say("products of adapters")
    lora = _lora(watch)
    say("elementwise work")
    elementwise = _elementwise(watch)
    say("decoding of NF4 weights")
    decoded = _decode(watch)
    say("updates of adapters")
    return replace(
        hardware,
        disk=disk,
        disk_measured=True,
        bf16=bf16,
        fp32=fp32,
        lora=lora,
        elementwise=elementwise,
        decode=decoded,
        host=_update(clock),
    )


def _described(cuda: bool) -> Hardware:
    ram = memory_of_this_machine()
    if not cuda:
        return replace(described_machine(None, ram=ram), name=processor_name())
    properties = torch.cuda.get_device_properties(0)
    try:
        card = find_card(properties.name)
    except UsageError:  # then only its power is a guess: everything else is measured
        card = next(card for card in CARDS if card.name == "RTX 4090")
    here = described_machine(card, ram=ram, vram=properties.total_memory)
    return replace(here, name=properties.name)


# --- the disk


def measure_disk(folder: Path) -> float:
    """Bytes/s of direct reads of a new file in `folder`, several at a time; buffered where the file
    system refuses direct ones.

    Raises:
        OSError: the file can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    free = os.statvfs(folder)
    nbytes = min(_FILE, free.f_bavail * free.f_frsize // 4) // _PIECE * _PIECE
    with tempfile.NamedTemporaryFile(dir=folder, prefix="doctor-", suffix=".tmp") as file:
        block = torch.randint(256, (_PIECE,), dtype=torch.uint8).numpy().data
        for _ in range(max(1, nbytes // _PIECE)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return _read_rate(file.name, max(1, nbytes // _PIECE))


def _read_rate(name: str, pieces: int) -> float:
    direct = getattr(os, "O_DIRECT", 0)
    try:
        fd = os.open(name, os.O_RDONLY | direct)
    except OSError:
        fd = os.open(name, os.O_RDONLY)
    done, lock, until = 0, threading.Lock(), time.monotonic() + 2 * _SECONDS

    def work() -> None:
        nonlocal done
        view = aligned_buffer(_PIECE).numpy().data
        while time.monotonic() < until:
            with lock:
                piece, done = done, done + 1
            os.preadv(fd, [view], piece % pieces * _PIECE)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(_THREADS)]
    try:
        start = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return done * _PIECE / (time.monotonic() - start)
    finally:
        with suppress(OSError):
            os.close(fd)


# --- arithmetic


@dataclass(frozen=True)
class _Watch:
    """Takes the time of work on a device.

    Args:
        clock: seconds from somewhere on.
    """

    device: torch.device
    clock: Clock

    def seconds(self, work: Callable[[], object]) -> float:
        """The faster quarter's last of a second of repetitions, after one that warms up: what else
        runs now and then isn't the machine's."""
        work()
        times: list[float] = []
        begin = time.monotonic()
        while len(times) < 5 or time.monotonic() - begin < _SECONDS:
            self._wait()
            start = self.clock()
            work()
            self._wait()
            times.append(self.clock() - start)
        return statistics.quantiles(times, n=4)[0]

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@dataclass(frozen=True)
class Shapes:
    """Rows, and an expert's matrices: `gate_up [2I, H]` and `down [H, I]`. So many experts take
    turns that none is still in a cache, as in a step."""

    rows: int
    hidden: int
    intermediate: int
    copies: int = 2


def _shapes(device: torch.device) -> Shapes:
    return Shapes(4096, 5120, 8192) if device.type == "cuda" else Shapes(1024, 576, 1536, 16)


def _randn(*shape: int, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def _matrix(watch: _Watch, dtype: torch.dtype) -> float:
    """FLOP/s of experts' products, in a forward and in a gradient of activations."""
    device = watch.device
    s = _shapes(device)
    x = _randn(s.rows, s.hidden, device=device, dtype=dtype)
    h = _randn(s.rows, s.intermediate, device=device, dtype=dtype)
    dy = _randn(s.rows, 2 * s.intermediate, device=device, dtype=dtype)
    experts = cycle(
        [
            (
                _randn(2 * s.intermediate, s.hidden, device=device, dtype=dtype),
                _randn(s.hidden, s.intermediate, device=device, dtype=dtype),
            )
            for _ in range(s.copies)
        ]
    )

    def work() -> None:
        gate_up, down = next(experts)
        F.linear(x, gate_up)
        F.linear(h, down)
        torch.mm(dy, gate_up)
        torch.mm(x, down)

    flops = 2.0 * s.rows * s.hidden * s.intermediate * (2 + 1 + 2 + 1)
    return flops / watch.seconds(work)


def _lora(watch: _Watch) -> float:
    """FLOP/s of the products of an adapter of rank 16 on gate_up: forward, and gradients."""
    device = watch.device
    s, r = _shapes(device), 16
    wide = 2 * s.intermediate
    x, y = _randn(s.rows, s.hidden, device=device), _randn(s.rows, wide, device=device)
    a, b = _randn(r, s.hidden, device=device), _randn(wide, r, device=device)
    dx = torch.zeros_like(x)

    def work() -> None:
        z = x @ a.T
        y.addmm_(z, b.T, alpha=1e-6)
        dz = y @ b
        dz.T @ x
        y.T @ z
        dx.addmm_(dz, a, alpha=1e-6)

    flops = 2.0 * r * s.rows * (3 * s.hidden + 3 * wide)
    return flops / watch.seconds(work)


def _elementwise(watch: _Watch) -> float:
    """Bytes/s, as `work` counts them, of what surrounds an expert's products: the norm before it,
    and its gates forward and backward."""
    device = watch.device
    s = _shapes(device)
    x, weight = _randn(s.rows, s.hidden, device=device), _randn(s.hidden, device=device)
    gate_up = _randn(s.rows, 2 * s.intermediate, device=device)
    gate, up = gate_up.chunk(2, dim=-1)
    dh, dgate_up = _randn(s.rows, s.intermediate, device=device), torch.empty_like(gate_up)
    dgate, dup = dgate_up.chunk(2, dim=-1)

    def work() -> None:
        rms_norm(x, weight, 1e-5)
        silu = F.silu(gate)
        h = silu * up
        (dh * h).sum(-1, dtype=torch.float32)
        torch.mul(dh, silu, out=dup)
        torch.ops.aten.silu_backward.grad_input(dh * up, gate, grad_input=dgate)

    # In passes over an intermediate: silu 2, its product 3, the weight's gradient 5, three more
    # products and silu's gradient 3 each.
    nbytes = s.rows * (NORM_BYTES * s.hidden + 2 * (2 + 3 + 5 + 3 + 3 + 3) * s.intermediate)
    return nbytes / watch.seconds(work)


def _decode(watch: _Watch) -> float:
    """Weights/s from NF4 to bf16, into memory used before."""
    device = watch.device
    s = _shapes(device)
    shape = (2 * s.intermediate, s.hidden)
    out = torch.empty(shape, dtype=torch.bfloat16, device=device)
    encoded = encode(torch.randn(shape), "nf4")
    pieces = cycle(
        [{suffix: t.clone().to(device) for suffix, t in encoded.items()} for _ in range(s.copies)]
    )
    taken = watch.seconds(lambda: decode(next(pieces), shape, "nf4", torch.bfloat16, out))
    return out.numel() / taken


def _bus(watch: _Watch) -> float:
    """Bytes/s from pinned memory to the device."""
    there = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    here = torch.empty_like(there, device=watch.device)
    return there.numel() / watch.seconds(lambda: here.copy_(there, non_blocking=True))


def _update(clock: Clock) -> float:
    """Bytes/s, as a plan counts them, of an update of adapters in the host's memory."""
    count = 2 << 20
    parameter = nn.Parameter(torch.zeros(count))
    parameter.grad = torch.randn(count)
    optimizer = make_optimizer(
        [parameter],
        optim="adamw_8bit",
        learning_rate=1e-4,
        betas=(0.9, 0.999),
        epsilon=1e-8,
        weight_decay=0.0,
    )

    def work() -> None:
        assert parameter.grad is not None
        parameter.grad.norm()
        parameter.grad.mul_(0.999)
        optimizer.step()

    return UPDATE_BYTES["adamw_8bit"] * count / _Watch(torch.device("cpu"), clock).seconds(work)
