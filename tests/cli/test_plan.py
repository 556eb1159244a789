"""`lamina plan` and `lamina doctor`, as they are typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lamina.cli.main import main
from lamina.plan import measure
from lamina.plan.hardware import described_machine, doctor_file, save_measured

Lamina = Callable[..., tuple[int, str, str]]
MAVERICK = ("plan", "maverick-24gb", "--gpu", "RTX 4090", "--disk-gbps", "7")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("PATH", str(tmp_path))  # no driver's tool


@pytest.fixture
def run(work: Path, capsys: pytest.CaptureFixture[str]) -> Lamina:
    def run(*words: str) -> tuple[int, str, str]:
        code = main(words)
        return (code, *capsys.readouterr())

    return run


def test_a_plan_that_fits(run: Lamina) -> None:
    code, out, err = run(*MAVERICK, "--ram", "128")

    assert code == 0
    assert err == ""
    assert "It fits." in out
    for word in (
        "boundaries",
        "64.4 GB",
        "device ring",
        "tokens/s",
        "estimated",
        "reads are hidden",
    ):
        assert word in out
    assert max(map(len, out.splitlines())) <= 80
    assert "803 GB" in out  # the checkpoint


def test_a_plan_that_does_not_fit(run: Lamina) -> None:
    code, out, _ = run(*MAVERICK, "--ram", "48")

    assert code == 1
    assert "It doesn't fit." in out
    assert "boundaries" in out
    assert "It would fit with any of these:" in out
    assert "cache=0%" in out


def test_what_it_proposes_fits(run: Lamina) -> None:
    _, out, _ = run(*MAVERICK, "--ram", "48")
    proposal = out.split("any of these:\n")[1].splitlines()[0].split("tokens/s")[1].split()

    code, again, _ = run(*MAVERICK, "--ram", "48", *proposal)

    assert code == 0, again


def test_nothing_fits(run: Lamina) -> None:
    code, out, _ = run(*MAVERICK, "--ram", "2GiB")

    assert code == 1
    assert "Even with everything as small as it gets" in out


def test_json(run: Lamina) -> None:
    code, out, err = run(*MAVERICK, "--ram", "48", "--json")

    assert (code, err) == (1, "")
    found = json.loads(out)
    assert found["fits"] is False
    assert found["would_fit"]
    assert found["hides_reads_from_tokens"] > 8192
    assert found["disk_bytes"]["checkpoint"] > found["disk_bytes"]["store"] > 2e11


def test_every_recipe_on_this_machine(run: Lamina) -> None:
    code, out, err = run("plan", "mini-mixtral")

    assert code == 0
    assert "assumed" in out
    assert "lamina doctor" in err


def test_what_doctor_measured_is_used(run: Lamina) -> None:
    save_measured(described_machine(None, ram=8 << 30, disk=1.23e9))

    _, out, err = run("plan", "mini-mixtral")

    assert "measured by `lamina doctor`" in out
    assert "1.2 GB/s" in out
    assert err == ""


@pytest.fixture
def data(work: Path) -> Path:
    path = work / "chats.jsonl"
    row = {
        "messages": [{"role": "user", "content": "x" * 300}, {"role": "assistant", "content": "y"}]
    }
    path.write_text(f"{json.dumps(row)}\n" * 500)
    return path


def test_a_run_over_data(run: Lamina, data: Path) -> None:
    words = ("--data", str(data), "--price-hour", "2", "--price-kwh", "0.5", "--watts", "1000")

    code, out, _ = run(*MAVERICK, "--ram", "128", *words)

    assert code == 0
    for word in ("500 rows", "4 characters", "warning", "electricity", "1000 W", "rent"):
        assert word in out
    assert max(map(len, out.splitlines())) <= 80
    _, text, _ = run(*MAVERICK, "--ram", "128", *words, "--json")
    found = json.loads(text)["run"]
    assert found["rows"] == 500
    assert found["steps_per_epoch"] == 1
    assert found["rental_cost"] == pytest.approx(4 * found["electricity_cost"])


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--gpu", "RTX 9999"], 2, "isn't in the table"),
        (["--vram", "24"], 2, "--gpu"),
        (["--gpu", "4090", "--ram", "lots"], 2, "--ram lots: must be a size"),
        (["--gpu", "4090", "--vram", "0"], 2, "must be a size"),
        (["--data", "nothing.jsonl"], 1, "there is no such file"),
        (["rr=4"], 1, "no such key"),
        (["target_modules=qq_proj"], 1, "'qq_proj' matches nothing"),
        (["model=somebody/something"], 1, "its shape isn't known"),
    ],
)
def test_mistakes(run: Lamina, words: list[str], code: int, message: str) -> None:
    found, out, err = run("plan", "mini-mixtral", *words)

    assert (found, out) == (code, "")
    assert message in err
    assert "Traceback" not in err


def test_less_memory_than_the_card_has(run: Lamina) -> None:
    _, out, _ = run(*MAVERICK, "--ram", "128", "--vram", "16", "--json")

    found = json.loads(out)
    assert found["vram_bytes"] <= found["vram_budget_bytes"] < 16 << 30


def test_doctor(run: Lamina, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_SECONDS", 0.01)
    monkeypatch.setattr(measure, "_FILE", 8 << 20)
    monkeypatch.setattr(measure, "_shapes", lambda device: measure.Shapes(64, 64, 96))

    code, out, err = run("doctor")

    assert code == 0
    assert doctor_file().is_file()
    for word in (
        "disk, direct reads",
        "matrices, bf16",
        "NF4 decoding",
        "measured",
        "mini-mixtral",
    ):
        assert word in out
    assert str(doctor_file()) in err
    assert max(map(len, out.splitlines())) <= 80
    code, out, _ = run("doctor", "--json")
    found: dict[str, Any] = json.loads(out)
    assert found["hardware"]["measured"]
    fits = {one["recipe"]: one["fits"] for one in found["recipes"]}
    assert fits["mini-mixtral"]
