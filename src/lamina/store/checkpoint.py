"""A source checkpoint: a folder of safetensors files, read by slice.

Files are read with plain `pread` and their pages given back at once: mapping them would count every
page read as memory of this process. Nothing is read beyond the headers until it is asked for, and
everything is asked for by file, so that files can come and go one at a time.
"""

from __future__ import annotations

import errno
import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from lamina.errors import CheckpointError
from lamina.models.spec import Part, Sources

__all__ = ["Checkpoint", "Rows", "SourceTensor", "resolve"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_HEADER_LIMIT = 100 << 20
_COPY_BYTES = 16 << 20
#: Rows are handed out in chunks of about so many elements.
_CHUNK_ELEMENTS = 16 << 20

#: What can be converted; anything else can only be carried along.
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of a checkpoint, and where its bytes lie."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a matrix: a tensor of the checkpoint, or its slice `index`, perhaps transposed."""

    tensor: SourceTensor
    index: int | None
    transpose: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """As part of the matrix: after slicing and transposing."""
        shape = self.tensor.shape if self.index is None else self.tensor.shape[1:]
        return shape[::-1] if self.transpose else shape

    @property
    def item_bytes(self) -> int:
        """The bytes of a weight in the checkpoint."""
        return _DTYPES[self.tensor.dtype].itemsize

    def __str__(self) -> str:
        return self.tensor.name if self.index is None else f"{self.tensor.name}[{self.index}]"


class Checkpoint:
    """An opened checkpoint: the headers of all its files.

    Args:
        tensors: by name.
        identity: stands for the contents: names, shapes and a sample of each file's bytes.
    """

    def __init__(self, path: Path, tensors: dict[str, SourceTensor], identity: str):
        self.path = path
        self.tensors = tensors
        self.identity = identity
        self._local = threading.local()  # each thread reads into memory of its own

    @staticmethod
    def open(path: Path) -> Checkpoint:
        """The checkpoint in the folder `path`.

        Raises:
            CheckpointError: there is none, or its files are missing, truncated or no safetensors;
                all problems are listed.
        """
        files, names = _weight_files(path)
        tensors: dict[str, SourceTensor] = {}
        problems = []
        identity = xxhash.xxh3_128()
        for file in files:
            try:
                found = _read_header(file)
            except OSError as error:
                problems.append(f"{file.name} can't be read: {error.strerror or error}.")
            except ValueError as error:
                problems.append(f"{file.name} {error}.")
            else:
                for tensor in found:
                    tensors[tensor.name] = tensor
                    identity.update(repr((tensor.name, tensor.dtype, tensor.shape)).encode())
                identity.update(_sample(file))
        if not problems and (lost := names - tensors.keys()):
            problems = [f"{name} is in {INDEX}, but in no file." for name in sorted(lost)[:100]]
        if problems:
            raise CheckpointError(
                f"The checkpoint {path} can't be used.",
                hint="Download the named files again.",
                problems=problems,
            )
        return Checkpoint(path, tensors, identity.hexdigest())

    def rows(self, rows: Rows) -> Iterator[Tensor]:
        """The rows in order, a chunk at a time (transposed ones all at once), in the source's dtype
        and perhaps not contiguous. A chunk is valid until this thread asks for the next."""
        tensor = rows.tensor
        shape = tensor.shape if rows.index is None else tensor.shape[1:]
        dtype = _DTYPES[tensor.dtype]
        slice_bytes = math.prod(shape) * dtype.itemsize
        offset = tensor.offset + (rows.index or 0) * slice_bytes
        columns = math.prod(rows.shape[1:])
        step = max(1, _CHUNK_ELEMENTS // max(1, columns))
        with _reading(tensor.file) as fd:
            if rows.transpose:
                # Whole: torch transposes a whole matrix 10 times as fast as a part of one.
                yield self._read(fd, offset, slice_bytes).view(dtype).view(shape).t()
                return
            for start in range(0, rows.shape[0], step):
                count = min(step, rows.shape[0] - start)
                nbytes = count * columns * dtype.itemsize
                chunk = self._read(fd, offset + start * columns * dtype.itemsize, nbytes)
                yield chunk.view(dtype).view(count, *rows.shape[1:])

    def copy(self, tensor: SourceTensor) -> Iterator[memoryview]:
        """The bytes of a tensor, a few megabytes at a time, each valid until the next."""
        with _reading(tensor.file) as fd:
            for start in range(0, tensor.nbytes, _COPY_BYTES):
                nbytes = min(_COPY_BYTES, tensor.nbytes - start)
                yield self._read(fd, tensor.offset + start, nbytes).numpy().data

    def _read(self, fd: int, offset: int, nbytes: int) -> Tensor:
        scratch: Tensor | None = getattr(self._local, "scratch", None)
        if scratch is None or scratch.numel() < nbytes:
            self._local.scratch = scratch = None  # before the larger one is made
            self._local.scratch = scratch = torch.empty(nbytes, dtype=torch.uint8)
        buffer = scratch[:nbytes]
        view = buffer.numpy().data
        done = 0
        while done < nbytes:
            n = os.preadv(fd, [view[done:]], offset + done)
            if n == 0:
                raise OSError(errno.EIO, "it ends early, so it has changed since it was opened")
            done += n
        os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
        return buffer


@contextmanager
def _reading(file: Path) -> Iterator[int]:
    """The open file. Raises CheckpointError for what goes wrong with it."""
    fd = -1
    try:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        yield fd
    except OSError as error:
        raise CheckpointError(
            f"{file} can't be read: {error.strerror or error}.",
            hint="Download it again and run the same command: it goes on from here.",
        ) from error
    finally:
        if fd >= 0:
            os.close(fd)


# Finding what a model needs


def resolve(
    checkpoint: Checkpoint,
    sources: Sources,
    shape: tuple[int, ...],
    prefixes: Sequence[str],
) -> tuple[Rows, ...] | str:
    """The rows that make up a tensor of `shape`, or what is wrong, as a sentence.

    Args:
        prefixes: what may stand before a key in this checkpoint, in order of preference.
    """
    for parts in sources:
        found = [_find(checkpoint, part, prefixes) for part in parts]
        rows = tuple(row for row in found if row is not None)
        if len(rows) == len(parts):
            return _misfit(rows, parts, shape) or rows
    missing = [part.key for part in sources[0] if _find(checkpoint, part, prefixes) is None]
    others = "".join(f" (or {' and '.join(p.key for p in parts)})" for parts in sources[1:])
    return f"missing: {', '.join(missing)}{others}."


def _find(checkpoint: Checkpoint, part: Part, prefixes: Sequence[str]) -> Rows | None:
    for prefix in prefixes:
        tensor = checkpoint.tensors.get(prefix + part.key)
        if tensor is not None:
            return Rows(tensor, part.index, part.transpose)
    return None


def _misfit(rows: Sequence[Rows], parts: Sequence[Part], shape: tuple[int, ...]) -> str | None:
    for row in rows:
        if row.tensor.dtype not in _DTYPES:
            known = ", ".join(_DTYPES)
            return f"{row.tensor.name} is {row.tensor.dtype}; {known} can be converted."
        if row.index is not None and row.index >= (row.tensor.shape or (0,))[0]:
            return f"{row.tensor.name} is {list(row.tensor.shape)}: it has no slice {row.index}."
    columns = {row.shape[1:] for row in rows}
    fits = all(row.shape for row in rows) and columns == {shape[1:]}
    if fits and sum(row.shape[0] for row in rows) == shape[0]:
        return None
    have = " and ".join(f"{row} {list(row.shape)}" for row in rows)
    turned = " (transposed)" if parts[0].transpose else ""
    return f"{have}{turned} should make {list(shape)}."


# Files and headers


def _weight_files(path: Path) -> tuple[list[Path], set[str]]:
    """The safetensors files, and the tensors that must be in them, as far as an index says so."""
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "doesn't exist"
        raise CheckpointError(f"The checkpoint {path} {what}.")
    index = path / INDEX
    if not index.exists():
        if (path / SINGLE).exists():
            return [path / SINGLE], set()
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt*"))
        why = "; its weights are pickled, and loading these can run any code" if pickled else ""
        raise CheckpointError(
            f"{path} has neither {INDEX} nor {SINGLE}{why}.",
            hint="Download or save the model in the safetensors format.",
        )
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{index} can't be used: {error!r}.", hint="Download this file again."
        ) from error
    if outside:
        raise CheckpointError(f"{index} names a file outside of its folder: {outside[0]!r}.")
    return [path / name for name in names], set(weight_map)


def _read_header(file: Path) -> list[SourceTensor]:
    """The tensors of a safetensors file.

    Raises:
        ValueError: it isn't one, or is truncated (the end of a sentence).
        OSError: it can't be read.
    """
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, _HEADER_LIMIT):
            raise ValueError("isn't a safetensors file, or is truncated")
        try:
            entries = json.loads(f.read(length))
            tensors = list(_entries(file, 8 + length, entries))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"has a damaged header ({error!r})") from error
    end = max((tensor.offset + tensor.nbytes for tensor in tensors), default=8 + length)
    if size < end:
        raise ValueError(f"is truncated: it has {size:,} of {end:,} bytes")
    return tensors


def _entries(file: Path, base: int, entries: dict[str, Any]) -> Iterable[SourceTensor]:
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        shape = tuple(int(n) for n in entry["shape"])
        dtype = _DTYPES.get(entry["dtype"])
        if not 0 <= start <= stop or (
            dtype is not None and stop - start != math.prod(shape) * dtype.itemsize
        ):
            raise ValueError(f"{name} has the wrong size")
        yield SourceTensor(name, entry["dtype"], shape, file, base + start, stop - start)


def _sample(file: Path) -> bytes:
    """A few bytes from the middle: two fine-tunes of one model have the same header."""
    with file.open("rb") as f:
        f.seek(file.stat().st_size // 2)
        return f.read(4096)
