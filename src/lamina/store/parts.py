"""Writing a file of a store: whole and in order, or in parts, as the files of its source come."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import xxhash

from lamina.store.checkpoint import Checkpoint
from lamina.store.encoder import Encoder
from lamina.store.files import Meter, Writer
from lamina.store.headers import SourceTensor
from lamina.store.jobs import Job
from lamina.store.journal import PART, Record

__all__ = [
    "ASIDE",
    "PART",
    "PartFile",
    "aside_path",
    "put_aside",
    "seal_part",
    "sync_folder",
    "write_whole",
]

#: The folder of tensors that wait for another one, in a file yet to come.
ASIDE = "aside"
_SYNC_BYTES = 256 << 20
_READ_BYTES = 16 << 20


def write_whole(
    job: Job, root: Path, source: Checkpoint, encoder: Encoder, record: Record, meter: Meter
) -> None:
    """Writes a file in order, and records it.

    Raises:
        CheckpointError: what it is made of can't be read, or isn't finite.
        StoreError: a file made anew for a finished store isn't what it was.
    """
    meter.what = job.file
    with Writer(root / job.file, meter) as writer:
        writer.start_range()
        writer.write(memoryview(job.header))
        encoded = encoder.encoded(task for item in job.items if (task := item.task) is not None)
        sums = []
        for part in job.ranges:
            if part.start:
                writer.start_range()
            for item in part.items:
                for at, view in item.views(source, encoded):
                    writer.pad_to(at)
                    writer.write(view)
            writer.pad_to(part.stop)
            sums.append(writer.end_range())
        entry = job.entry(sums)
        record.check(job.file, entry)
    record.add(job.file, entry)


class PartFile:
    """An unfinished file of its full size, written at any place; what isn't written is zeros.
    On a clean exit it is forced to disk."""

    def __init__(self, root: Path, job: Job, meter: Meter):
        self._path = root / (job.file + PART)
        self._job = job
        self._meter = meter
        self._unsynced = 0

    def __enter__(self) -> Self:
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        os.ftruncate(self._fd, self._job.nbytes)
        self._write(0, memoryview(self._job.header))
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self._fd)
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(self._fd)

    def write(self, at: int, view: memoryview) -> None:
        self._write(at, view)
        self._meter.add(len(view))

    def _write(self, at: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done:], at + done)
        self._unsynced += len(view)
        if self._unsynced >= _SYNC_BYTES:
            os.fdatasync(self._fd)
            os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
            self._unsynced = 0


def seal_part(root: Path, job: Job) -> Sequence[str]:
    """The checksums of the ranges of a part file in which nothing is missing any more."""
    sums = []
    fd = os.open(root / (job.file + PART), os.O_RDONLY | os.O_CLOEXEC)
    buffer = memoryview(bytearray(_READ_BYTES))
    try:
        for part in job.ranges:
            digest = xxhash.xxh3_128()
            at = part.start
            while at < part.stop:
                n = os.preadv(fd, [buffer[: min(_READ_BYTES, part.stop - at)]], at)
                digest.update(buffer[:n])
                os.posix_fadvise(fd, at, n, os.POSIX_FADV_DONTNEED)
                at += n
            sums.append(digest.hexdigest())
    finally:
        os.close(fd)
    return sums


def put_aside(root: Path, source: Checkpoint, tensor: SourceTensor) -> None:
    """Copies a tensor, so that the file in which it is can go."""
    path = aside_path(root, tensor)
    path.parent.mkdir(exist_ok=True)
    with Writer(path) as writer:
        for view in source.copy(tensor):
            writer.write(view)
    source.moved[tensor.name] = path


def aside_path(root: Path, tensor: SourceTensor) -> Path:
    """Where a tensor is put aside."""
    return root / ASIDE / f"{xxhash.xxh3_128_hexdigest(tensor.name.encode())}.bin"


def sync_folder(path: Path) -> None:
    """Forces the names in a folder to disk."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
