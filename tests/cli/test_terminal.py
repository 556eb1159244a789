"""What is shown, on a terminal and elsewhere."""

from __future__ import annotations

import os
import pty
import re
import select
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta

import pytest

import lamina.cli.display
import lamina.cli.terminal
from lamina.cli.display import TuneDisplay, eval_line, step_line
from lamina.cli.terminal import byte_progress, duration, print_json, print_table, size
from lamina.telemetry.events import EvalEvent, StartEvent, StepEvent


def step(number: int, total: int = 10, end: str | None = None) -> StepEvent:
    return StepEvent(
        step=number,
        total_steps=total,
        epoch=0.5,
        loss=1.23456,
        learning_rate=1.5e-4,
        grad_norm=0.5,
        tokens=4096,
        loss_tokens=1024,
        tokens_per_second=1234.5,
        store_bytes_read=812_000_000,
        seconds_waited=1.0,
        seconds=4.0,
        peak_memory_bytes=2_100_000_000,
        predicted_end=end,
    )


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (99_940, "99.9 kB"),
        (99_960, "100 kB"),
        (999_600, "1.0 MB"),
        (1_300_000_000, "1.3 GB"),
        (213e9, "213 GB"),
        (4.8e12, "4.8 TB"),
        (4.8e15, "4800 TB"),
    ],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m 00s"),
        (3599.6, "1h 00m"),
        (7800, "2h 10m"),
        (90_000, "1d 1h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_tables(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("A", "LONG"), [("xyz", ""), ("", "1")])

    assert capsys.readouterr().out == "A    LONG\nxyz\n     1\n"


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [float("nan"), 1.5], "b": ("ä", float("inf"))})

    assert "".join(capsys.readouterr().out.split()) == '{"a":[null,1.5],"b":["ä",null]}'


def test_a_step_in_one_line() -> None:
    end = (datetime.now(UTC) + timedelta(seconds=184)).isoformat()

    assert re.sub(r"3m 0[34]s", "3m 04s", step_line(step(3, end=end))) == (
        "step 3/10  loss 1.2346  lr 1.50e-04  grad 0.500  1,234 tok/s  read 812 MB  waiting 25%  "
        "peak 2.1 GB  3m 04s left"
    )
    assert step_line(step(10, end=end)).endswith("peak 2.1 GB")


def test_plain_lines_are_throttled(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with TuneDisplay("mini") as display:
        display(
            StartEvent(
                total_steps=10,
                trainable_parameters=1_000_000,
                store_bytes=10**9,
                planned_memory_bytes=10**9,
            )
        )
        display(EvalEvent(step=0, loss=2.0, loss_tokens=1000, seconds=1.0))
        for number in range(1, 11):
            display(step(number))
        display(EvalEvent(step=10, loss=1.0, loss_tokens=1000, seconds=1.0))
    out, err = capsys.readouterr()
    lines = err.splitlines()

    assert out == ""
    assert lines[0] == "1,000,000 trained weights, 10 steps, a store of 1.0 GB"
    assert lines[1] == "held-out loss 2.0000 before the first step (1,000 tokens)"
    assert [line.split()[1] for line in lines[2:-1]] == ["1/10", "10/10"]
    assert lines[-1] == eval_line(EvalEvent(step=10, loss=1.0, loss_tokens=1000, seconds=1.0))

    monkeypatch.setattr(lamina.cli.display, "_LINE_EVERY", 0.0)
    with TuneDisplay("mini") as display:
        for number in range(1, 11):
            display(step(number))
    assert len(capsys.readouterr().err.splitlines()) == 10


def test_progress_over_bytes_in_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with byte_progress("preparing m") as progress:
        progress(1, 10, "shard 1")
    assert capsys.readouterr().err == ""

    monkeypatch.setattr(lamina.cli.terminal, "LINE_EVERY", 0.0)
    with byte_progress("preparing m") as progress:
        progress(500_000_000, 10**9, "shard 1")
        progress(10**9, 0, "shard 2")
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "preparing m: shard 1: 500 MB of 1.0 GB, 50%\npreparing m: shard 2: 1.0 GB\n"


def on_a_terminal(code: str) -> str:
    """What a program writes to a terminal of 100 columns that is its stderr."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"COLUMNS": "100", "TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stderr=theirs, stdin=theirs, env=environment
    )
    os.close(theirs)
    seen = b""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # Linux's way to say that the other end is closed
                break
            if not piece:
                break
            seen += piece
    os.close(ours)
    assert process.wait(timeout=30) == 0
    return seen.decode()


def test_a_live_display() -> None:
    seen = on_a_terminal(
        "import time\n"
        "from lamina.cli.display import TuneDisplay\n"
        "from lamina.telemetry.events import EvalEvent, StartEvent, StepEvent\n"
        "from datetime import datetime, timedelta, UTC\n"
        "def step(n):\n"
        "    end = (datetime.now(UTC) + timedelta(seconds=60)).isoformat()\n"
        "    return StepEvent(step=n, total_steps=9, epoch=0.5, loss=1.5, learning_rate=1e-4,\n"
        "        grad_norm=0.5, tokens=9, loss_tokens=9, tokens_per_second=77.0,\n"
        "        store_bytes_read=9, seconds_waited=0.5, seconds=1.0, peak_memory_bytes=9,\n"
        "        predicted_end=end)\n"
        "with TuneDisplay('[mini]') as display:\n"
        "    display.progress(3 * 10**8, 10**9, 'mini.safetensors')\n"
        "    time.sleep(0.6)\n"
        "    display(StartEvent(total_steps=9, trainable_parameters=9, store_bytes=9,"
        " planned_memory_bytes=9))\n"
        "    time.sleep(0.6)\n"
        "    display(EvalEvent(step=0, loss=2.0, loss_tokens=9, seconds=1.0))\n"
        "    for n in range(1, 5): display(step(n))\n"
    )

    assert "[mini]: mini.safetensors: 300 MB of 1.0 GB, 30%" in seen
    assert "[mini]: before the first step" in seen
    assert "held-out loss 2.0000 before the first step" in seen
    assert "step 4/9  1m 00s left" in seen or "step 4/9  59s left" in seen
    assert "━" in seen
    assert "loss 1.5000  lr 1.00e-04  grad 0.500  77 tok/s  read 9 B  waiting 50%" in seen
    assert "\x1b[?25h" in seen  # the cursor is back
    assert "step 4/9  loss 1.5000" in seen.rstrip().splitlines()[-1]  # what stays


def test_a_progress_bar() -> None:
    seen = on_a_terminal(
        "from lamina.cli.terminal import byte_progress\n"
        "with byte_progress('preparing [m]') as progress:\n"
        "    progress(250_000_000, 10**9, 'shard 1')\n"
    )

    assert "preparing [m]: shard 1" in seen
    assert "250.0/1000.0 MB" in seen or "0.2/1.0 GB" in seen or "0.3/1.0 GB" in seen
    assert "\x1b[?25h" in seen
