"""The C library's heap, which on CPU holds every tensor."""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any


@cache
def _glibc() -> Any:
    """The C library where it is glibc, else None."""
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None)
    return library if hasattr(library, "malloc_trim") else None


def trim() -> None:
    """Give free memory back to the system.

    What stays (compiled kernels, optimizer states) is allocated between temporaries of a step and
    leaves holes of their sizes, so that the process would grow from step to step. Between two
    blocks this costs a third of the speed (docs/log.md); it is for the time between two steps.
    """
    if (library := _glibc()) is not None:
        library.malloc_trim(0)
