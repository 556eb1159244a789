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
    "run_or_model",
]

_RUNS = "`lamina tune` writes runs to the folder that --out names, or to runs/."
#: What tells the folder of a run, of a store and of a checkpoint.
_MARKS = ("recipe.yaml", "store.json", "config.json")


def data_problems(files: Iterable[Path]) -> list[str]:
    """Sentences on files that can't be data. Patterns, folders and names on the hub are left to
    those who read them."""
    problems = []
    for file in files:
        if file.is_dir() or (not file.exists() and _may_be_more_than_a_file(str(file))):
            continue
        if not file.exists():
            problems.append(f"{file}: there is no such file{did_you_mean(file)}")
        elif not os.access(file, os.R_OK):
            problems.append(f"{file}: can't be read: permission denied")
        elif file.stat().st_size == 0:
            problems.append(f"{file}: is empty")
    return problems


def _may_be_more_than_a_file(text: str) -> bool:
    """Whether it can be a pattern, or a name on the hub: owner/name, without a file's ending."""
    pattern = any(mark in text for mark in "*?[")
    return pattern or (text.count("/") == 1 and text[0] not in "./~" and not Path(text).suffix)


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


def run_or_model(text: str) -> str:
    """The text, once it can be the folder of a run, a store or a model, or else a model's name.

    Raises:
        UsageError: it is empty.
        LaminaError: it is another folder, or looks like a folder and there is none.
    """
    if not text:
        raise UsageError("a run or a model is needed")
    path = Path(text).expanduser()
    if path.is_dir():
        if not any((path / file).is_file() for file in _MARKS):
            raise LaminaError(
                f"{text}: is neither the folder of a run nor that of a model", hint=_RUNS
            )
        return str(path)
    beside = Path("runs") / text
    if beside.is_dir():
        raise LaminaError(f"{text}: there is no such folder", hint=f"There is a {beside}.")
    # A hub's name has at most one slash, and doesn't begin with one, a dot or a tilde.
    if text[0] in "./~" or text.count("/") > 1 or text.startswith("runs/"):
        raise LaminaError(f"{text}: there is no such folder{did_you_mean(path)}", hint=_RUNS)
    return text


def did_you_mean(path: Path) -> str:
    """`; did you mean ...?` for a path that isn't there, or nothing."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""
