"""Converting a checkpoint whose files come one at a time and need never be there all at once.

A file of the store whose tensors all lie in one file of the source is written as usual. Any other
is written in parts: what can be made of the files up to now is, at its place in a part file, and
the journal says so. Tensors that wait for another one in a file yet to come (half of a fused
matrix, a weight without its scale) are put aside. So a file of the source is done with as soon as
the next one is asked for, and a preparation that was killed asks only for files of which something
is missing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Protocol

from lamina.store.checkpoint import Checkpoint
from lamina.store.encoder import Encoder
from lamina.store.files import Meter
from lamina.store.jobs import Item, Job
from lamina.store.journal import Record
from lamina.store.parts import (
    ASIDE,
    PART,
    PartFile,
    aside_path,
    put_aside,
    seal_part,
    sync_folder,
    write_whole,
)

__all__ = ["Progression", "Supplier"]


class Supplier(Protocol):
    """Brings the files of a checkpoint."""

    def nbytes(self, file: Path) -> int:
        """The size of a file."""

    def check_space(self, root: Path, store_bytes: int, files: Sequence[Path]) -> None:
        """Sees that there is room for what the store in `root` still takes, and for `files`.

        Raises:
            StoreError: there isn't.
        """

    def fetch(self, file: Path, meter: Meter) -> None:
        """Brings a file, and tells its bytes to the meter.

        Raises:
            LaminaError: it can't be brought.
        """

    def release(self, file: Path) -> None:
        """All that the file holds is in the store."""


class Progression:
    """The files of a store that are being made as the files of its source come.

    Args:
        todo: the files that aren't whole yet.
        meter: it also counts the bytes of the source's files.
    """

    def __init__(
        self,
        source: Checkpoint,
        root: Path,
        todo: list[Job],
        record: Record,
        meter: Meter,
        supplier: Supplier,
    ):
        self._source = source
        self._root = root
        self._record = record
        self._meter = meter
        self._supplier = supplier
        #: By job: what is still to be written, by the file with which the last of it comes.
        self._open: dict[str, dict[Path, list[Item]]] = {}
        self._jobs = {job.file: job for job in todo}
        self._position = {file: i for i, file in enumerate(source.files)}
        written = 0
        for job in todo:
            stages: dict[Path, list[Item]] = {}
            for item in job.items:
                stages.setdefault(self._last(item), []).append(item)
            for file in [f for f in stages if f.name in record.parts(job.file)]:
                written += sum(item.nbytes for item in stages.pop(file))
            self._open[job.file] = stages
        for item in self._waiting():
            for tensor in item.sources:
                path = aside_path(root, tensor)
                if path.exists() and path.stat().st_size == tensor.nbytes:
                    source.moved[tensor.name] = path
        self._needed = self._needed_files()
        self._missing = sum(job.nbytes for job in todo) - written
        sizes = {file: supplier.nbytes(file) for file in source.files}
        meter.total += sum(sizes.values())
        meter.done += written + sum(n for file, n in sizes.items() if file not in self._needed)

    def check_space(self, more: int) -> None:
        """Sees that there is room for the rest, and for `more` bytes.

        Raises:
            StoreError: there isn't.
        """
        nbytes = self._missing + self._most_put_aside() + more
        self._supplier.check_space(self._root, nbytes, self._needed)

    def _most_put_aside(self) -> int:
        """The most bytes that lie aside at any time."""
        change = [0] * (len(self._position) + 1)
        for item in self._waiting():
            last = self._position[self._last(item)]
            for tensor in item.sources:
                change[self._position[tensor.file]] += tensor.nbytes
                change[last] -= tensor.nbytes
        return max(accumulate(change))

    def _last(self, item: Item) -> Path:
        """The file with which the last comes that an item is made of."""
        return max(item.files, key=self._position.__getitem__)

    def run(self, encoder: Encoder) -> None:
        """Writes all files.

        Raises:
            CheckpointError: what the source holds can't be read, or isn't finite.
            LaminaError: a file of the source can't be brought.
        """
        self._finish_complete()
        for file in self._source.files:
            if file not in self._needed:
                self._supplier.release(file)
        for file in self._needed:
            self._meter.what = file.name
            self._supplier.fetch(file, self._meter)
            for name, stages in self._open.items():
                if file in stages:
                    self._write(self._jobs[name], file, stages.pop(file), encoder)
            self._finish_complete()
            self._put_aside(file)
            self._supplier.release(file)
        shutil.rmtree(self._root / ASIDE, ignore_errors=True)

    def _write(self, job: Job, file: Path, items: list[Item], encoder: Encoder) -> None:
        self._meter.what = job.file
        if len(items) == len(job.items):
            write_whole(job, self._root, self._source, encoder, self._record, self._meter)
            return
        tasks = [task for item in items if (task := item.task) is not None]
        encoded = encoder.encoded(tasks)
        with PartFile(self._root, job, self._meter) as part:
            for item in items:
                for at, view in item.views(self._source, encoded):
                    part.write(at, view)
        self._record.add_part(job.file, file.name)

    def _finish_complete(self) -> None:
        """Gives part files their names in which nothing is missing any more."""
        for name in [name for name, stages in self._open.items() if not stages]:
            job = self._jobs[name]
            del self._open[name]
            if self._record.has(name, job.nbytes):
                continue
            entry = job.entry(seal_part(self._root, job))
            self._record.check(name, entry)
            os.replace(self._root / (name + PART), self._root / name)
            sync_folder((self._root / name).parent)
            self._record.add(name, entry)
            self._meter.what = name
            self._meter.add(job.nbytes - sum(item.nbytes for item in job.items))

    def _put_aside(self, file: Path) -> None:
        """Keeps what later files need of this one, and drops what none needs any more."""
        needed = {tensor.name: tensor for item in self._waiting() for tensor in item.sources}
        for tensor in needed.values():
            if tensor.file == file and tensor.name not in self._source.moved:
                put_aside(self._root, self._source, tensor)
        for name in [name for name in self._source.moved if name not in needed]:
            self._source.moved.pop(name).unlink()

    def _waiting(self) -> Iterator[Item]:
        """What comes out of several files, and isn't written yet."""
        for stages in self._open.values():
            for items in stages.values():
                yield from (item for item in items if len(item.files) > 1)

    def _needed_files(self) -> list[Path]:
        """The files of which something is missing, in their order."""
        needed = {
            tensor.file
            for stages in self._open.values()
            for items in stages.values()
            for item in items
            for tensor in item.sources
            if tensor.name not in self._source.moved
        }
        return [file for file in self._source.files if file in needed]
