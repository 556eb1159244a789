"""Machines: those of the table, this one, and what is remembered of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from lamina.errors import UsageError
from lamina.plan import hardware
from lamina.plan.cards import CARDS, find_card
from lamina.plan.hardware import (
    Budgets,
    described_machine,
    doctor_file,
    load_measured,
    memory_of_this_machine,
    save_measured,
    this_machine,
)

GIB = 1 << 30


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAMINA_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("RTX 4090", "RTX 4090"),
        ("4090", "RTX 4090"),
        ("rtx4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "RTX 4070 Ti Super"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("h200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("a100", "A100 40GB"),
        ("NVIDIA RTX A6000", "RTX A6000"),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", "RTX PRO 6000"),
        ("3060", "RTX 3060 12GB"),
    ],
)
def test_cards_by_any_of_their_names(given: str, name: str) -> None:
    assert find_card(given).name == name


@pytest.mark.parametrize("given", ["", "RX 7900", "GTX 1080", "4099", "T4"])
def test_cards_that_are_not_there(given: str) -> None:
    with pytest.raises(UsageError) as caught:
        find_card(given)

    assert "RTX 4090" in str(caught.value)


def test_the_table_is_plausible() -> None:
    assert len({card.name for card in CARDS}) == len(CARDS)
    for card in CARDS:
        assert 8 << 30 < card.memory < 200 << 30
        assert 1.5 < card.bf16 / card.fp32 < 30
        assert 50 < card.watts < 1200
        assert 1e10 < card.bus < 1e11 < card.bandwidth < 1e13


def test_a_described_machine_stays_below_its_peaks() -> None:
    card = find_card("RTX 4090")
    machine = described_machine(card, ram=64 * GIB)

    assert machine.bf16 < card.bf16
    assert machine.elementwise < card.bandwidth
    assert machine.measured is None
    assert not machine.disk_measured
    assert machine.matrix("float32") < machine.matrix("bfloat16")


def test_budgets_leave_something_to_the_system() -> None:
    machine = described_machine(find_card("RTX 4090"), ram=64 * GIB)
    budgets = Budgets.of(machine)

    assert budgets.vram
    assert 61 * GIB < budgets.ram < 64 * GIB
    assert 23 * GIB < budgets.vram < machine.vram
    assert Budgets.of(described_machine(None, ram=2 * GIB)).vram is None


def test_what_was_measured_is_remembered() -> None:
    assert load_measured() is None
    machine = described_machine(None, ram=GIB, disk=2e9)

    path = save_measured(machine)

    assert path == doctor_file()
    again = this_machine()
    assert again.measured
    assert again.disk == 2e9
    assert again.ram == memory_of_this_machine()  # it may have changed


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record | {"host": "another"},
        lambda record: record | {"version": 0},
        lambda record: {"hardware": record["hardware"]},
        lambda record: record | {"hardware": {"device": "cpu"}},
        lambda record: [],
    ],
)
def test_what_is_not_of_this_machine_is_not_used(change: object) -> None:
    path = save_measured(described_machine(None, ram=GIB))
    path.write_text(json.dumps(change(json.loads(path.read_text()))))  # type: ignore[operator]

    assert load_measured() is None
    assert this_machine().measured is None


def test_a_damaged_memory_is_no_memory() -> None:
    doctor_file().parent.mkdir(exist_ok=True)
    doctor_file().write_text("{")

    assert load_measured() is None


def tool(folder: Path, line: str) -> None:
    """A driver's tool that says `line`."""
    file = folder / "nvidia-smi"
    file.write_text(f"#!/bin/sh\necho '{line}'\n")
    file.chmod(0o755)


@pytest.mark.parametrize(
    ("line", "device", "vram"),
    [
        ("NVIDIA GeForce RTX 4090, 24564", "cuda", 24564 << 20),
        ("NVIDIA GeForce RTX 9990, 65536", "cuda", 65536 << 20),
        ("No devices were found", "cpu", 0),
    ],
)
def test_the_drivers_own_tool_is_asked(
    line: str, device: str, vram: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool(tmp_path, line)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    machine = this_machine()

    assert (machine.device, machine.vram) == (device, vram)


@pytest.mark.parametrize(
    ("groups", "limits"),
    [
        ("0::/", {"/sys/fs/cgroup/memory.max": str(GIB)}),
        ("0::/a/b", {"/sys/fs/cgroup/a/memory.max": str(GIB), "/sys/fs/cgroup/memory.max": "max"}),
        (
            "4:cpu,cpuacct:/x\n5:memory:/y",
            {"/sys/fs/cgroup/memory/y/memory.limit_in_bytes": str(GIB)},
        ),
    ],
)
def test_memory_is_no_more_than_the_groups(
    groups: str, limits: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.read_text

    def read_text(self: Path, **kwargs: str) -> str:
        if self.name == "cgroup":
            return groups
        return limits[str(self)] if str(self) in limits else real(self, **kwargs)

    monkeypatch.setattr(Path, "read_text", read_text)

    assert memory_of_this_machine() == GIB
    assert hardware.processor_name()
