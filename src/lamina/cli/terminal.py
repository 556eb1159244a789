"""Data goes to stdout and everything else to stderr; here is the everything else, and tables.

Colours and live displays are rich's, which leaves them out where stderr isn't a terminal and
honours NO_COLOR.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from lamina.errors import LaminaError

__all__ = [
    "LINE_EVERY",
    "Progress",
    "byte_progress",
    "bytes_line",
    "console",
    "duration",
    "note",
    "print_json",
    "print_table",
    "show_error",
    "size",
]

#: Told the bytes done, the bytes in all (0: not known) and what is being worked on.
Progress = Callable[[int, int, str], None]

#: Seconds between two lines of progress where there is no terminal to redraw.
LINE_EVERY = 10.0


def console() -> Console:
    """rich's console on stderr. Made anew at each call: tests and notebooks exchange sys.stderr."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


def note(message: str, *, style: str | None = None) -> None:
    """A message for the person at the terminal, never for a pipe."""
    console().print(message, style=style, markup=False, soft_wrap=True)


def show_error(error: LaminaError) -> None:
    """What went wrong, all of it, and what to do about it."""
    from rich.text import Text

    out = console()
    out.print(Text("error: ", style="bold red") + Text(error.message, style=""), soft_wrap=True)
    for problem in error.problems:
        out.print(Text(f"  - {problem}"), soft_wrap=True)
    if error.hint:
        out.print(Text("hint: ", style="bold cyan") + Text(error.hint, style=""), soft_wrap=True)


def print_json(value: Any) -> None:
    """A JSON value to stdout. JSON has no NaN and no infinity: null stands for them."""
    sys.stdout.write(json.dumps(_finite(value), indent=2, ensure_ascii=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns to stdout, as wide as they need to be: grep and cut read them too."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        sys.stdout.write("  ".join(cells).rstrip() + "\n")


def size(count: float) -> str:
    """Bytes for a person: `512 B`, `1.3 GB`, `213 GB`."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while abs(count) >= 999.5 and len(units) > 1:
        count /= 1000
        del units[0]
    whole = units[0] == "B" or abs(count) >= 99.95
    return f"{count:.{0 if whole else 1}f} {units[0]}"


def duration(seconds: float) -> str:
    """Time for a person: `8s`, `3m 05s`, `2h 10m`, `3d 4h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600}h"


def bytes_line(done: int, total: int, what: str) -> str:
    """How far something over bytes is."""
    share = f" of {size(total)}, {100 * done / total:.0f}%" if total else ""
    return f"{what}: {size(done)}{share}"


@contextmanager
def byte_progress(title: str) -> Iterator[Progress]:
    """A progress bar over bytes on a terminal; a line now and then elsewhere."""
    out = console()
    if out.is_terminal:
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as Bar

        with Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=out,
            transient=True,
        ) as bar:
            task = bar.add_task(title, total=None)

            def redraw(done: int, total: int, what: str) -> None:
                bar.update(
                    task, completed=done, total=total or None, description=f"{title}: {what}"
                )

            yield redraw
        return

    last = time.monotonic()

    def line(done: int, total: int, what: str) -> None:
        nonlocal last
        if time.monotonic() - last >= LINE_EVERY:
            last = time.monotonic()
            note(f"{title}: {bytes_line(done, total, what)}")

    yield line
