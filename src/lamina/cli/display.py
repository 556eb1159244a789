"""What `lamina tune` shows while it runs: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from datetime import datetime
from types import TracebackType
from typing import TYPE_CHECKING, Self

from lamina.cli.terminal import LINE_EVERY, bytes_line, console, duration, size
from lamina.telemetry.events import EvalEvent, Event, StartEvent, StepEvent

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["TuneDisplay", "eval_line", "step_line"]

#: Seconds that lie at least between two plain lines. The first and the last step are always there.
_LINE_EVERY = 2.0


class TuneDisplay:
    """Shows the events of a run on stderr. A context manager; called with each event."""

    def __init__(self, name: str) -> None:
        self._console = console()
        self._live: _Live | None = _Live(self._console, name) if self._console.is_terminal else None
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        if isinstance(event, StepEvent):
            if self._live is not None:
                self._live.update(event)
            elif self._due(event):
                self._print(step_line(event))
        elif isinstance(event, EvalEvent):
            self._print(eval_line(event))
        elif isinstance(event, StartEvent):
            if self._live is not None:
                self._live.prepare("before the first step")
            self._print(
                f"{event.trainable_parameters:,} trained weights, {event.total_steps} steps, "
                f"a store of {size(event.store_bytes)}"
            )

    def progress(self, done: int, total: int, what: str) -> None:
        """Told of what is prepared before the run, in bytes."""
        text = bytes_line(done, total, what)
        if self._live is not None:
            self._live.prepare(text)
        elif time.monotonic() - self._last_line >= LINE_EVERY:
            self._last_line = time.monotonic()
            self._print(text)

    def _due(self, event: StepEvent) -> bool:
        now = time.monotonic()
        if now - self._last_line < _LINE_EVERY and event.step not in (1, event.total_steps):
            return False
        self._last_line = now
        return True

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, soft_wrap=True)


def step_line(event: StepEvent) -> str:
    """A step in one line."""
    return f"step {event.step}/{event.total_steps}  {_figures(event)}{_until(event)}"


def eval_line(event: EvalEvent) -> str:
    """A measurement on held-out data in one line."""
    when = "before the first step" if event.step == 0 else f"after step {event.step}"
    return f"held-out loss {event.loss:.4f} {when} ({event.loss_tokens:,} tokens)"


def _figures(event: StepEvent) -> str:
    waiting = 100 * event.seconds_waited / event.seconds if event.seconds > 0 else 0
    return "  ".join(
        (
            f"loss {event.loss:.4f}",
            f"lr {event.learning_rate:.2e}",
            f"grad {event.grad_norm:.3f}",
            f"{event.tokens_per_second:,.0f} tok/s",
            f"read {size(event.store_bytes_read)}",
            f"waiting {waiting:.0f}%",
            f"peak {size(event.peak_memory_bytes)}",
        )
    )


def _until(event: StepEvent) -> str:
    """How long it still takes, or nothing where nothing is known or left."""
    if event.predicted_end is None or event.step >= event.total_steps:
        return ""
    end = datetime.fromisoformat(event.predicted_end)
    left = (end - datetime.now(end.tzinfo)).total_seconds()
    return f"  {duration(max(left, 0))} left"


class _Live:
    """A bar and a line of figures, redrawn in place."""

    def __init__(self, out: object, name: str) -> None:
        from rich.console import Console
        from rich.live import Live

        assert isinstance(out, Console)
        self._name = name
        self._doing = "before the first step"
        self._event: StepEvent | None = None
        self._begun = time.monotonic()
        self._live = Live(
            get_renderable=self._render, console=out, refresh_per_second=4, transient=True
        )

    def start(self) -> None:
        self._live.start()

    def stop(self) -> None:
        self._live.stop()
        if self._event is not None:
            self._live.console.print(step_line(self._event), markup=False, soft_wrap=True)

    def prepare(self, what: str) -> None:
        self._doing = what

    def update(self, event: StepEvent) -> None:
        self._event = event
        self._live.refresh()

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.spinner import Spinner
        from rich.table import Table
        from rich.text import Text

        event = self._event
        if event is None:
            passed = duration(time.monotonic() - self._begun)
            return Spinner("dots", Text(f"{self._name}: {self._doing}, {passed}"))
        line = Table.grid(padding=(0, 1))
        line.add_row(
            Text(self._name, style="bold"),
            ProgressBar(total=event.total_steps, completed=event.step, width=30),
            Text(f"step {event.step}/{event.total_steps}{_until(event)}"),
        )
        return Group(line, Text(_figures(event), overflow="fold"))
