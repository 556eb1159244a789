"""Keeping the process's memory near what it uses.

On CPU, tensors come from the C library's heap. A block's temporaries are freed around boundaries
and gradients that stay, which leaves holes that the library keeps: on mini-mixtral the process grew
to twice what it used (docs/log.md). Where the library is glibc, holes above a limit are given back.
"""

from __future__ import annotations

import ctypes
import os
import sys

#: Holes up to this size are kept for reuse: giving them back and taking them again costs time.
_KEPT_BYTES = 64 << 20


class _Mallinfo2(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    ]


def limit_kernel_cache() -> None:
    """Keep oneDNN from holding a thousand compiled kernels, half a megabyte each. Effective before
    the process's first matrix product; what the user has set stands."""
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")


class Heap:
    """The C library's heap, or nothing where it isn't glibc's."""

    def __init__(self) -> None:
        self._libc: ctypes.CDLL | None = None
        if sys.platform == "linux":
            libc = ctypes.CDLL(None)
            if hasattr(libc, "mallinfo2") and hasattr(libc, "malloc_trim"):
                libc.mallinfo2.restype = _Mallinfo2
                self._libc = libc

    def trim(self) -> None:
        """Give holes back to the system if there are many."""
        if self._libc is not None and self._libc.mallinfo2().fordblks > _KEPT_BYTES:
            self._libc.malloc_trim(0)
