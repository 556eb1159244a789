"""Events are written whole, or not at all as far as a reader can see."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
from pathlib import Path

import pytest

from lamina.errors import LaminaError
from lamina.telemetry.events import EvalEvent, EventWriter, StartEvent, StepEvent, read_events


def step(number: int, **changes: object) -> StepEvent:
    event = StepEvent(
        step=number,
        total_steps=100,
        epoch=0.5,
        loss=1.25,
        learning_rate=1e-4,
        grad_norm=0.75,
        tokens=4096,
        loss_tokens=1024,
        tokens_per_second=120.5,
        store_bytes_read=10**9,
        seconds_waited=0.5,
        seconds=34.0,
        peak_memory_bytes=2 * 10**9,
        predicted_end="2026-11-24T12:00:00+00:00",
    )
    return dataclasses.replace(event, **changes)


START = StartEvent(
    total_steps=100, trainable_parameters=1000, store_bytes=10**9, planned_memory_bytes=10**9
)
EVAL = EvalEvent(step=0, loss=2.5, loss_tokens=99, seconds=1.5)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events = [START, EVAL, step(1), step(2, predicted_end=None)]
    with EventWriter(path) as writer:
        for event in events:
            writer(event)
            assert path.read_bytes().endswith(b"\n")  # at once, not at close

    assert read_events(path) == events
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()] == [
        "start",
        "eval",
        "step",
        "step",
    ]


def test_a_second_writer_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for number in (1, 2):
        with EventWriter(path) as writer:
            writer.write(step(number))

    assert read_events(path) == [step(1), step(2)]


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventWriter(path) as writer:
        writer.write(step(1, loss=math.nan, grad_norm=math.inf, predicted_end=None))

    (event,) = read_events(path)
    assert isinstance(event, StepEvent)
    assert math.isnan(event.loss)
    assert math.isnan(event.grad_norm)
    assert event.predicted_end is None
    assert "NaN" not in path.read_text()


@pytest.mark.parametrize("cut", [1, 10, 10_000])
def test_a_torn_last_line(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "events.jsonl"
    with EventWriter(path) as writer:
        writer.write(step(1))
        writer.write(EVAL)
    whole = path.read_bytes()
    torn = (whole[: whole.index(b"\n") + 1] + b"x" * 10_000)[: whole.index(b"\n") + 1 + cut]
    path.write_bytes(torn)

    assert read_events(path) == [step(1)]
    with EventWriter(path) as writer:
        writer.write(step(2))
    assert read_events(path) == [step(1), step(2)]


def test_a_file_with_nothing_but_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b"x" * 9000)

    assert read_events(path) == []
    with EventWriter(path) as writer:
        writer.write(EVAL)
    assert read_events(path) == [EVAL]


def test_later_versions_may_add(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventWriter(path) as writer:
        writer.write(EVAL)
    line = json.loads(path.read_text())
    path.write_text(json.dumps(line | {"new": 1}) + "\n" + '{"kind": "novel", "x": 1}\n')

    assert read_events(path) == [EVAL]


@pytest.mark.parametrize(
    "line", ["{}", "[]", "3", "not JSON", '{"kind": "eval"}', "\x00", '"kind"']
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "events.jsonl"
    with EventWriter(path) as writer:
        writer.write(EVAL)
    path.write_text(path.read_text() + line + "\n" + path.read_text())

    with pytest.raises(LaminaError, match=r"events\.jsonl, line 2: not an event"):
        read_events(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(LaminaError, match="can't be read"):
        read_events(tmp_path / "events.jsonl")


def test_a_full_disk_leaves_no_torn_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "events.jsonl"
    real = os.write

    def half(file: int, data: bytes) -> int:
        if len(data) < 200:
            raise OSError(28, "No space left on device")
        return real(file, data[:150])

    with EventWriter(path) as writer:
        writer.write(EVAL)
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", half)
            with pytest.raises(OSError, match="No space left"):
                writer.write(step(1))
        writer.write(step(2))

    assert read_events(path) == [EVAL, step(2)]


def test_a_reader_beside_a_writer_sees_a_prefix(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    events = [step(number) for number in range(1, 501)]

    def write() -> None:
        for event in events:
            writer.write(event)

    with EventWriter(path) as writer:
        thread = threading.Thread(target=write)
        thread.start()
        while thread.is_alive():
            seen = read_events(path)
            assert seen == events[: len(seen)]
        thread.join()
    assert read_events(path) == events
