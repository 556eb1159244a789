"""The events a run writes, as JSON lines, and their reader.

Each event is one line, handed to the operating system in one write, so that a reader beside a live
run sees whole lines or, at worst, a torn last one, which it leaves for later. A run that was killed
may leave such a torn line behind; whoever goes on writing cuts it off first.

JSON has no NaN: numbers that aren't finite are written as null and read back as NaN.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

from lamina.errors import LaminaError

__all__ = ["EvalEvent", "Event", "EventWriter", "StartEvent", "StepEvent", "read_events"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StartEvent:
    """What is known before the first step."""

    kind: ClassVar[str] = "start"
    #: optimizer steps of the whole run
    total_steps: int
    #: numbers that are trained
    trainable_parameters: int
    store_bytes: int
    #: of the process (CPU) or the device (CUDA), as the plan has it
    planned_memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEvent:
    """One optimizer step."""

    kind: ClassVar[str] = "step"
    #: 1 for the first
    step: int
    total_steps: int
    #: passes over the data so far, in fractions
    epoch: float
    #: mean over the step's loss-carrying tokens, before the update
    loss: float
    learning_rate: float
    #: over all gradients, before clipping
    grad_norm: float
    tokens: int
    loss_tokens: int
    tokens_per_second: float
    #: bytes of weights read from the store's files in this step
    store_bytes_read: int
    #: seconds in which the arithmetic stood still for want of weights
    seconds_waited: float
    seconds: float
    #: the process's (CPU) or the device's (CUDA) highest so far
    peak_memory_bytes: int
    #: ISO 8601 with the offset to UTC, or None where nothing can be said yet
    predicted_end: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalEvent:
    """The loss over held-out data."""

    kind: ClassVar[str] = "eval"
    #: optimizer steps done by then; 0: before any
    step: int
    loss: float
    loss_tokens: int
    seconds: float


Event = StartEvent | StepEvent | EvalEvent

_KINDS: dict[str, type[Event]] = {event.kind: event for event in (StartEvent, StepEvent, EvalEvent)}


def _to_line(event: Event) -> bytes:
    values = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in dataclasses.asdict(event).items()
    }
    return json.dumps({"kind": event.kind, **values}, separators=(",", ":")).encode() + b"\n"


def _from_values(values: Mapping[str, Any]) -> Event | None:
    """The event, or None where a later version wrote one of a kind that isn't known here.

    Raises:
        TypeError: a value is missing.
    """
    kind = _KINDS.get(values["kind"])
    if kind is None:
        return None
    known: dict[str, Any] = {
        field.name: math.nan
        if values[field.name] is None and field.type == "float"
        else values[field.name]
        for field in dataclasses.fields(kind)
        if field.name in values
    }
    return kind(**known)


class EventWriter:
    """Appends events to a file. A context manager; also a function from event to None, so that it
    serves wherever a listener is wanted."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            OSError: the file can't be written.
        """
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._cut_torn_line()

    def __call__(self, event: Event) -> None:
        self.write(event)

    def write(self, event: Event) -> None:
        """Append one line; it is with the operating system on return.

        Raises:
            OSError: no space, say; what was written of the line is taken back.
        """
        line = _to_line(event)
        start = os.fstat(self._file).st_size
        try:
            written = os.write(self._file, line)
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError:
            os.ftruncate(self._file, start)
            raise

    def close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _cut_torn_line(self) -> None:
        """Drop what follows the last end of line."""
        end = os.fstat(self._file).st_size
        keep = end
        while keep > 0:
            start = max(0, keep - 4096)
            at = os.pread(self._file, keep - start, start).rfind(b"\n")
            if at >= 0:
                keep = start + at + 1
                break
            keep = start
        if keep < end:
            os.ftruncate(self._file, keep)


def read_events(path: Path) -> list[Event]:
    """The events of a run, live or over, in the order in which they were written.

    A torn last line is left out, and so are kinds of events that a later version may have added.

    Raises:
        LaminaError: there is no such file, or another line of it is damaged.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LaminaError(
            f"{path}: can't be read: {error.strerror}",
            hint="The folder of a run has an events.jsonl once the run has begun.",
        ) from error
    events = []
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), 1):
        try:
            event = _from_values(json.loads(line))
        except (ValueError, TypeError, KeyError):
            raise LaminaError(f"{path}, line {number}: not an event of a run") from None
        if event is not None:
            events.append(event)
    return events
