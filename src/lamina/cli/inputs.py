"""What can be said about a command's input before anything heavy is imported."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable
from pathlib import Path

from lamina.errors import DataError, LaminaError, UsageError

__all__ = [
    "data_problems",
    "did_you_mean",
    "out_problems",
    "require",
    "require_run",
    "run_or_model",
]


def data_problems(files: Iterable[Path]) -> list[str]:
    """Sentences on files that can't be data."""
    problems = []
    for file in files:
        if file.is_dir():
            problems.append(f"{file}: is a folder, not a file")
        elif not file.exists():
            problems.append(f"{file}: there is no such file{did_you_mean(file)}")
        elif not os.access(file, os.R_OK):
            problems.append(f"{file}: can't be read: permission denied")
        elif file.stat().st_size == 0:
            problems.append(f"{file}: is empty")
    return problems


def out_problems(out: Path) -> list[str]:
    """Sentences on a folder that can't be a new run's."""
    if out.is_dir() and any(out.iterdir()):
        return [f"{out}: isn't empty, and nothing is written over a run; give another --out"]
    if out.exists() and not out.is_dir():
        return [f"{out}: is a file, and --out is to be a folder"]
    return []


def require(problems: list[str], what: str) -> None:
    """
    Raises:
        DataError: there are problems.
    """
    if problems:
        raise DataError(f"{what} can't begin", problems=problems)


def require_run(run: Path) -> None:
    """
    Raises:
        LaminaError: the folder isn't a run's.
    """
    if not run.is_dir():
        raise LaminaError(f"{run}: there is no such run{did_you_mean(run)}", hint=_hint(run))
    if not (run / "recipe.yaml").is_file():
        raise LaminaError(
            f"{run}: isn't the folder of a run: it has no recipe.yaml", hint=_hint(run)
        )


def run_or_model(text: str) -> str:
    """The text, once it can be a run's folder, or else the name of a model.

    Raises:
        UsageError: it is empty.
        LaminaError: it looks like a folder, and there is none.
    """
    if not text:
        raise UsageError("a run or a model is needed")
    path = Path(text).expanduser()
    if path.is_dir():
        return str(path)
    # A hub's name has at most one slash, and doesn't begin with one, a dot or a tilde.
    if text[0] in "./~" or text.count("/") > 1 or text.startswith("runs/"):
        raise LaminaError(f"{text}: there is no such folder{did_you_mean(path)}", hint=_hint(path))
    return text


def _hint(run: Path) -> str:
    beside = Path("runs") / run.name
    if (beside / "recipe.yaml").is_file() and beside != run:
        return f"There is a {beside}."
    return "`lamina tune` writes runs to the folder that --out names, or to runs/."


def did_you_mean(path: Path) -> str:
    """`; did you mean ...?` for a path that isn't there, or nothing."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""
