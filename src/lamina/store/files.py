"""Writing the files of a store so that a crash, a full disk or a second process does no harm."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import xxhash

from lamina.errors import StoreError

__all__ = [
    "LOCK",
    "TEMPORARY",
    "Meter",
    "Progress",
    "Writer",
    "check_space",
    "folder_errors",
    "locked",
]

Progress = Callable[[int, int, str], None]

LOCK = "prepare.lock"
TEMPORARY = ".tmp"
#: Written pages are forced to disk and given back after so many bytes.
_SYNC_BYTES = 256 << 20


@dataclass
class Meter:
    """Tells how far the preparation is."""

    progress: Progress | None
    total: int
    done: int
    what: str = ""

    def add(self, nbytes: int) -> None:
        self.done += nbytes
        if self.progress is not None:
            self.progress(self.done, self.total, self.what)


class Writer:
    """A file written under a temporary name; on a clean exit it is forced to disk and renamed."""

    def __init__(self, path: Path, meter: Meter | None = None):
        self.position = 0
        self._path = path
        self._temporary = path.with_name(path.name + TEMPORARY)
        self._meter = meter
        self._synced = 0
        self._digest = xxhash.xxh3_128()

    def __enter__(self) -> Writer:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._fd = os.open(self._temporary, flags, 0o644)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self._fd)
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.replace(self._temporary, self._path)
                _sync_folder(self._path.parent)
        finally:
            os.close(self._fd)
            self._temporary.unlink(missing_ok=True)

    def write(self, view: memoryview) -> None:
        self._digest.update(view)
        done = 0
        while done < len(view):
            done += os.write(self._fd, view[done:])
        self.position += len(view)
        if self.position - self._synced >= _SYNC_BYTES:
            os.fdatasync(self._fd)
            os.posix_fadvise(self._fd, 0, self.position, os.POSIX_FADV_DONTNEED)
            self._synced = self.position
        if self._meter is not None:
            self._meter.add(len(view))

    def pad_to(self, position: int) -> None:
        """Writes zeros up to `position`."""
        if position > self.position:
            self.write(memoryview(bytes(position - self.position)))

    def start_range(self) -> None:
        """What is written from here on counts for the next checksum."""
        self._digest = xxhash.xxh3_128()

    def end_range(self) -> str:
        """The checksum of what was written since `start_range`."""
        return str(self._digest.hexdigest())


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def check_space(root: Path, needed: int) -> None:
    """Raises StoreError if the disk of `root` has less than `needed` bytes free."""
    free = shutil.disk_usage(root).free
    if free < needed:
        raise StoreError(
            f"{root} needs {needed / 1e9:.2f} GB more, and its disk has {free / 1e9:.2f} GB free.",
            hint=f"Free {(needed - free) / 1e9:.2f} GB, or prepare into a folder on another disk.",
        )


@contextmanager
def folder_errors(root: Path) -> Iterator[None]:
    """Turns what a disk says into what a user can do."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise StoreError(
                f"{root} couldn't be finished: {why}.",
                hint="Free some space and run the same command again: it goes on from here.",
            ) from error
        where = error.filename or root
        raise StoreError(f"{root} couldn't be written: {why} ({where}).") from error


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Holds the folder against other preparations; the lock ends with the process.

    Raises:
        StoreError: another process holds it.
    """
    path = root / LOCK
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one before us removed its file while we opened it: then this lock guards nothing.
            mine = path.exists() and os.path.samestat(os.fstat(fd), path.stat())
        except BlockingIOError:
            mine = False
        if not mine:
            raise StoreError(
                f"Another process is preparing {root}.",
                hint="Wait for it, or end it and run this command again.",
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(fd)
