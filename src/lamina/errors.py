"""What a user can do wrong.

Every error that a user can cause is a `LaminaError`: it says what was asked, what is true and what
to do. The command line prints it without a traceback and exits with its `exit_code`. Anything else
that escapes is our own bug.

    LaminaError            exit 1: the input can't be used
    ├── RecipeError        a recipe or an override
    ├── DataError          a dataset
    ├── CheckpointError    a source checkpoint (or GGUF) that can't be converted
    ├── StoreError         a store: truncated, damaged, of another model
    ├── AdapterError       an adapter that doesn't fit its base
    ├── TrainingError      a run that can't go on (non-finite loss, ...)
    └── UsageError         exit 2: wrong usage of a command
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "AdapterError",
    "CheckpointError",
    "DataError",
    "LaminaError",
    "RecipeError",
    "StoreError",
    "TrainingError",
    "UsageError",
]


class LaminaError(Exception):
    """A mistake in the user's input.

    Args:
        message: what was asked and what is true, naming the place (file, line, key, tensor).
        hint: what to do about it, as one sentence, or None.
        problems: several mistakes found at once, each a full sentence; shown as a list.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, problems: Sequence[str] = ()):
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.problems = tuple(problems)

    def __str__(self) -> str:
        lines = [self.message, *(f"  - {problem}" for problem in self.problems)]
        if self.hint:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


class RecipeError(LaminaError):
    """A recipe file, a recipe name or a `key=value` override that can't be used."""


class DataError(LaminaError):
    """A dataset that can't be read, or has nothing to learn from."""


class CheckpointError(LaminaError):
    """A source checkpoint that can't be converted."""


class StoreError(LaminaError):
    """A store that is missing, truncated, damaged, or of another model."""


class AdapterError(LaminaError):
    """An adapter that is missing, damaged, or doesn't fit its base model."""


class TrainingError(LaminaError):
    """A run that can't go on, such as one whose loss is no longer finite."""


class UsageError(LaminaError):
    """A command used wrongly."""

    exit_code = 2
