"""What doctor measures: plausible figures, quickly, and nothing left behind."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from lamina.plan import measure
from lamina.plan.measure import measure_disk, measure_machine


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(measure, "_SECONDS", 0.02)
    monkeypatch.setattr(measure, "_FILE", 8 << 20)
    monkeypatch.setattr(measure, "_shapes", lambda device: measure.Shapes(64, 64, 96))


def test_a_machine(tmp_path: Path) -> None:
    said: list[str] = []

    machine = measure_machine(said.append)

    assert len(said) == len(set(said)) >= 6
    assert machine.disk_measured
    assert 1e7 < machine.disk < 1e12
    for rate in (machine.bf16, machine.fp32):
        assert 1e8 < rate < 1e16
    assert 1e7 < machine.lora < machine.bf16 * 2
    for rate in (machine.elementwise, machine.decode, machine.host):
        assert 1e7 < rate < 1e14
    assert (machine.bus > 0) == torch.cuda.is_available()
    assert list((tmp_path / "home").iterdir()) == []


def test_a_disk_is_read_past_the_cache_where_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags: list[int] = []
    real = os.open

    def refuse(name: str, flag: int, *args: int) -> int:
        flags.append(flag)
        if flag & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no")
        return real(name, flag, *args)

    monkeypatch.setattr(measure.os, "open", refuse)

    assert measure_disk(tmp_path) > 1e6
    assert flags[-2] & os.O_DIRECT
    assert not flags[-1] & os.O_DIRECT


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")

    with pytest.raises(OSError, match=r"exists|Not a directory"):
        measure_disk(file)
