"""Keeping other people's libraries from talking over us.

Called before any of them is imported, since several read their switches only then. What Lamina
itself has to say is printed, never logged or warned, so nothing of it is lost. LAMINA_DEBUG=1 lets
everything through.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings

__all__ = ["debugging", "quiet"]

_SWITCHES = {
    "BITSANDBYTES_NOWELCOME": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
_LOGGERS = (
    "accelerate",
    "bitsandbytes",
    "huggingface_hub",
    "peft",
    "torch",
    "torch.utils._pytree",  # torch sets the level of "torch" anew when it is imported
    "torchao",
    "transformers",
)


def debugging() -> bool:
    """Whether the user wants to see everything."""
    return os.environ.get("LAMINA_DEBUG", "") not in ("", "0")


def _spin_rounds() -> str:
    """How long threads that wait for each other spin before they sleep: without spinning an idle
    machine loses a third of its speed, with it a busy one does (docs/log.md)."""
    try:
        with open("/proc/loadavg", encoding="ascii") as file:
            others = int(file.read().split()[3].partition("/")[0]) - 1
    except (OSError, ValueError, IndexError):
        others = 0
    return "10000" if others < (os.cpu_count() or 1) / 2 else "0"


def quiet() -> None:
    """Silence the warnings, loggers and progress bars of the libraries beneath us.

    What the user has set for them (an environment variable, `python -W`) stands.
    """
    if debugging():
        return
    for name, value in _SWITCHES.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("GOMP_SPINCOUNT", _spin_rounds())
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
