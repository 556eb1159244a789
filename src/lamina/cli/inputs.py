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


def data_problems(files: Iterable[Path | str]) -> list[str]:
    """Sentences on files that can't be data. Patterns, folders and names on the hub are left to
    those who read them."""
    return [f"{file}: {problem}" for file in files if (problem := _data_problem(str(file)))]


def _data_problem(file: str) -> str | None:
    """Why a file can't be data, as far as that can be said before it is opened."""
    from lamina.data.columnar import hub_name

    path = Path(file)
    problem = None
    try:
        if not path.exists():
            if "=" in file:
                problem = "there is no such file (commas join what is mapped: --map a=b,c=d)"
            elif not any(char in file for char in "*?[") and hub_name(file) is None:
                problem = f"there is no such file{did_you_mean(path)}"
        elif not os.access(path, os.R_OK):
            problem = "can't be read: permission denied"
        elif path.is_file() and path.stat().st_size == 0:
            problem = "is empty"
        elif not path.is_file() and not path.is_dir():
            problem = "is not an ordinary file, and data is read more than once: save it first"
    except OSError as error:
        problem = f"can't be read: {error.strerror}"
    return problem


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
