"""A machine as a plan sees it: how much memory, and how fast.

The rates come from `lamina doctor`, which measures them, or from data sheets and shares of their
peaks. A plan says which.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from pathlib import Path
from typing import Literal, Self

from lamina.errors import UsageError
from lamina.plan.cards import Card, find_card
from lamina.recipe.places import home

__all__ = [
    "Budgets",
    "Hardware",
    "described_machine",
    "doctor_file",
    "load_measured",
    "memory_of_this_machine",
    "save_measured",
    "this_machine",
]

Device = Literal["cpu", "cuda"]

#: Of a card's peak, what large matrix products reach, layout changes and launches included.
_MATRIX_SHARE = 0.65
#: Of a card's memory bandwidth, what elementwise kernels and decoding reach.
_BANDWIDTH_SHARE = 0.7
#: Bytes that decoding a 4-bit weight to bf16 moves: 17/32 read, 2 written.
_DECODE_BYTES = 17 / 32 + 2
#: A card that the table doesn't have: no faster than most.
_UNKNOWN_CARD = Card("", 0, 60e12, 20e12, 400e9, 12e9, 300)
#: A disk nobody has measured: an NVMe of its generation, in bytes/s.
_DISK = 3.5e9
#: What a processor core without measurements may do. It is stated as a guess wherever it is used.
_CORE_BF16, _CORE_FP32, _CORE_BYTES = 60e9, 40e9, 5e9
_CORE_DECODE, _CORE_LORA = 3e8, 20e9
#: A host's memory as an optimizer update sees it, where adapters live in RAM beside a card.
_HOST_BYTES = 15e9


@dataclass(frozen=True)
class Hardware:
    """A machine.

    Args:
        name: of the card or the processor.
        ram, vram: bytes it has (vram: 0 on CPU).
        bf16, fp32: FLOP/s of matrix products at a model's shapes, as reached.
        lora: FLOP/s of bf16 products with one side of 16, as reached: mostly memory traffic.
        elementwise: bytes/s through elementwise work in the compute type.
        decode: weights/s from NF4 to bf16.
        disk: bytes/s of direct reads.
        bus: bytes/s from host to device; 0 on CPU, where nothing is copied.
        host: bytes/s through the host's memory, for updates of adapters that live there.
        watts: of the whole machine under load.
        measured: when `lamina doctor` measured the rates (ISO 8601), or None for assumptions.
        disk_measured: whether the disk's rate was measured or given, and not assumed.
    """

    device: Device
    name: str
    ram: int
    vram: int
    bf16: float
    fp32: float
    lora: float
    elementwise: float
    decode: float
    disk: float
    bus: float
    host: float
    watts: float
    measured: str | None = None
    disk_measured: bool = False

    def matrix(self, dtype: str) -> float:
        """FLOP/s of matrix products in a compute type."""
        return self.bf16 if dtype == "bfloat16" else self.fp32


@dataclass(frozen=True)
class Budgets:
    """What a run may take, in bytes.

    Args:
        vram: of the device's memory; None on CPU.
    """

    ram: int
    vram: int | None = None

    @classmethod
    def of(cls, hardware: Hardware) -> Self:
        """All of a machine but what its system needs."""
        system = min(2 << 30, hardware.ram // 8)
        vram = int(hardware.vram * 0.97) if hardware.device == "cuda" else None
        return cls(hardware.ram - system, vram)


def described_machine(
    card: Card | None, *, ram: int, vram: int | None = None, disk: float | None = None
) -> Hardware:
    """A machine that isn't there: with a card of the table, or without one."""
    if card is None:
        cores = os.cpu_count() or 1
        return Hardware(
            device="cpu",
            name=f"a processor like this one ({cores} cores)",
            ram=ram,
            vram=0,
            bf16=cores * _CORE_BF16,
            fp32=cores * _CORE_FP32,
            lora=cores * _CORE_LORA,
            elementwise=cores * _CORE_BYTES,
            decode=cores * _CORE_DECODE,
            disk=disk or _DISK,
            bus=0.0,
            host=cores * _CORE_BYTES,
            watts=150.0,
            disk_measured=disk is not None,
        )
    bandwidth = _BANDWIDTH_SHARE * card.bandwidth
    return Hardware(
        device="cuda",
        name=card.name,
        ram=ram,
        vram=card.memory if vram is None else vram,
        bf16=_MATRIX_SHARE * card.bf16,
        fp32=_MATRIX_SHARE * card.fp32,
        lora=min(16 * bandwidth, _MATRIX_SHARE * card.bf16),
        elementwise=bandwidth,
        decode=bandwidth / _DECODE_BYTES,
        disk=disk or _DISK,
        bus=card.bus,
        host=_HOST_BYTES,
        watts=card.watts + 150.0,
        disk_measured=disk is not None,
    )


def this_machine() -> Hardware:
    """This machine: as `lamina doctor` measured it, or with assumed rates."""
    measured = load_measured()
    if measured is not None:
        return replace(measured, ram=memory_of_this_machine())
    card, vram = _card_here()
    hardware = described_machine(card, ram=memory_of_this_machine(), vram=vram)
    if card is None:
        return replace(hardware, name=processor_name())
    return hardware


def processor_name() -> str:
    """The processor and its cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    name = ""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass
    return f"{name or platform.processor() or platform.machine()}, {cores} cores"


def memory_of_this_machine() -> int:
    """Bytes of RAM that this process may use: the machine's, or its control group's if less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for file in _limits():
        try:
            text = file.read_text(encoding="utf-8").strip()
        except OSError:
            continue
        if text.isdigit():
            total = min(total, int(text))
    return total


def _limits() -> Iterator[Path]:
    """The files with memory limits of this process's control groups, and of those around them:
    version 2, or version 1 with its controllers apart."""
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        root = Path("/sys/fs/cgroup")
        if controllers and "memory" not in controllers.split(","):
            continue
        root, name = (
            (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        )
        inside = root / group.lstrip("/")
        for folder in (inside, *inside.parents):
            if folder == root.parent:
                break
            yield folder / name


def _card_here() -> tuple[Card | None, int | None]:
    """The first NVIDIA card of this machine and its bytes, from its driver's own tool: torch would
    take seconds to say the same."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None, None
    query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
        name, _, mib = done.stdout.splitlines()[0].rpartition(",")
        memory = int(mib) << 20
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None, None
    try:
        return find_card(name), memory
    except UsageError:
        return replace(_UNKNOWN_CARD, name=name.strip(), memory=memory), memory


# --- what doctor remembers


def doctor_file() -> Path:
    """Where `lamina doctor` keeps what it measured."""
    return home() / "machine.json"


@dataclass(frozen=True)
class _Record:
    host: str
    hardware: Hardware
    version: int = 1


def save_measured(hardware: Hardware) -> Path:
    """Remember measurements of this machine, with their date.

    Raises:
        OSError: the file can't be written.
    """
    path = doctor_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    now = datetime.now().astimezone().isoformat(timespec="seconds")
    record = _Record(platform.node(), replace(hardware, measured=now))
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(record), indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
    return path


def load_measured() -> Hardware | None:
    """What `lamina doctor` measured on this machine; None if it never did, or if the file is of
    another machine (a home folder may be shared) or of another version."""
    try:
        record = json.loads(doctor_file().read_text(encoding="utf-8"))
        if record["version"] != _Record.version or record["host"] != platform.node():
            return None
        values = record["hardware"]
        if set(values) != {f.name for f in fields(Hardware)}:
            return None
        return Hardware(**values)
    except (OSError, ValueError, KeyError, TypeError):
        return None
