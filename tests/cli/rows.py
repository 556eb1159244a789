"""What the tests of `lamina data` share, besides fixtures."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

#: Runs `lamina data` with these words; gives its exit code, stdout and stderr.
Lamina = Callable[..., tuple[int, str, str]]
WriteRows = Callable[..., Path]

LAMINA = [sys.executable, "-m", "lamina"]


def chat(question: str, answer: str, **columns: Any) -> dict[str, Any]:
    """A row with one question and its answer."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **columns}
