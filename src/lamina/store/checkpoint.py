"""A source checkpoint: a folder of safetensors files, read by slice.

Files are read with plain `pread` and their pages given back at once: mapping them would count every
page read as memory of this process. Nothing is read beyond the headers until it is asked for, and
everything is asked for by file, so that files can come and go one at a time (`moved` says where a
tensor is whose file had to go).
"""

from __future__ import annotations

import errno
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from torch import Tensor

from lamina.errors import CheckpointError
from lamina.models.spec import Part, Sources
from lamina.store.codec import NF4_BLOCK, decode
from lamina.store.headers import (
    FLOATS,
    INDEX,
    Header,
    SourceTensor,
    read_on_disk,
    weight_files,
)
from lamina.store.quantized import (
    Fp8,
    Nf4,
    Scheme,
    decode_fp8,
    decode_scales,
    scheme_of,
    unstacked,
)

__all__ = ["Checkpoint", "Rows", "resolve"]

_COPY_BYTES = 16 << 20
#: Rows are handed out in chunks of about so many elements.
_CHUNK_ELEMENTS = 16 << 20


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a matrix: a tensor of the checkpoint, or its slice `index`, perhaps transposed, and
    how it is quantized, if it is."""

    tensor: SourceTensor
    index: int | None
    transpose: bool
    scheme: Scheme | None = None

    @property
    def held_shape(self) -> tuple[int, ...]:
        """As the checkpoint holds it, after slicing."""
        if isinstance(self.scheme, Nf4):
            return self.scheme.shape
        return self.tensor.shape if self.index is None else self.tensor.shape[1:]

    @property
    def shape(self) -> tuple[int, ...]:
        """As part of the matrix: after slicing and transposing."""
        return self.held_shape[::-1] if self.transpose else self.held_shape

    @property
    def work_bytes(self) -> int:
        """About what reading it takes: all of it if it is transposed, else a chunk; quantized
        weights are widened to fp32 on the way to bf16."""
        n = math.prod(self.shape)
        n = n if self.transpose else min(n, _CHUNK_ELEMENTS)
        return n * (4 if self.scheme is None else 8)

    @property
    def tensors(self) -> tuple[SourceTensor, ...]:
        """All tensors of the checkpoint that must be read for it."""
        return (self.tensor, *(self.scheme.beside if self.scheme is not None else ()))

    def __str__(self) -> str:
        return self.tensor.name if self.index is None else f"{self.tensor.name}[{self.index}]"


class Checkpoint:
    """An opened checkpoint: the headers of all its files.

    Args:
        files: in the order in which they are read where they come one at a time.
        tensors: by name.
        identity: stands for the contents: names, shapes and a sample of each file's bytes.
    """

    def __init__(
        self, path: Path, files: Sequence[Path], tensors: dict[str, SourceTensor], identity: str
    ):
        self.path = path
        self.files = tuple(files)
        self.tensors = tensors
        self.identity = identity
        #: Tensors that were set aside, each in a file of its own.
        self.moved: dict[str, Path] = {}
        self._local = threading.local()  # each thread reads into memory of its own

    @staticmethod
    def open(path: Path) -> Checkpoint:
        """The checkpoint in the folder `path`.

        Raises:
            CheckpointError: there is none, or its files are missing, truncated or no safetensors;
                all problems are listed.
        """
        files, names = weight_files(path)
        return Checkpoint.read(path, files, names, read_on_disk)

    @staticmethod
    def read(
        path: Path, files: Sequence[Path], names: Iterable[str], headers: Callable[[Path], Header]
    ) -> Checkpoint:
        """The checkpoint made of `files`.

        Args:
            names: the tensors that must be in them, as far as an index says so.
            headers: reads the header of a file. A ValueError of it is the end of a sentence.

        Raises:
            CheckpointError: files can't be read; all problems are listed.
        """
        tensors: dict[str, SourceTensor] = {}
        problems = []
        identity = xxhash.xxh3_128()
        for file in files:
            try:
                found, sample = headers(file)
            except OSError as error:
                problems.append(f"{file.name} can't be read: {error.strerror or error}.")
            except ValueError as error:
                problems.append(f"{file.name} {error}.")
            else:
                for tensor in found:
                    tensors[tensor.name] = tensor
                    identity.update(repr((tensor.name, tensor.dtype, tensor.shape)).encode())
                identity.update(sample)
        if not problems and (lost := set(names) - tensors.keys()):
            problems = [f"{name} is in {INDEX}, but in no file." for name in sorted(lost)[:100]]
        if problems:
            raise CheckpointError(
                f"The checkpoint {path} can't be used.",
                hint="Download the named files again.",
                problems=problems,
            )
        return Checkpoint(path, files, tensors, identity.hexdigest())

    def rows(self, rows: Rows) -> Iterator[Tensor]:
        """The rows in order, a chunk at a time (transposed ones all at once), in the source's dtype
        (in bf16 if they are quantized) and perhaps not contiguous. A chunk is valid until this
        thread asks for the next.

        Raises:
            CheckpointError: the file can't be read, or what is beside quantized weights is wrong.
        """
        if isinstance(rows.scheme, Nf4):
            return self._decoded(rows)
        return self._float_rows(rows)

    def _float_rows(self, rows: Rows) -> Iterator[Tensor]:
        dtype = FLOATS.get(rows.tensor.dtype, torch.float8_e4m3fn)
        shape = rows.held_shape
        scale = None
        if isinstance(rows.scheme, Fp8):
            scale = self._small(rows.scheme.scale).float()
        offset = (rows.index or 0) * math.prod(shape) * dtype.itemsize
        columns = math.prod(shape[1:])
        step = shape[0] if rows.transpose else max(1, _CHUNK_ELEMENTS // max(1, columns))
        with self._reading(rows.tensor) as (fd, base):
            for start in range(0, shape[0], max(1, step)):
                count = min(step, shape[0] - start)
                at = base + offset + start * columns * dtype.itemsize
                chunk = self._read(fd, at, count * columns * dtype.itemsize)
                chunk = chunk.view(dtype).view(count, *shape[1:])
                if scale is not None:
                    chunk = decode_fp8(chunk, scale, start)
                # Whole: torch transposes a whole matrix 10 times as fast as a part of one.
                yield chunk.t() if rows.transpose else chunk

    def _decoded(self, rows: Rows) -> Iterator[Tensor]:
        codes, absmax = self.kept(rows)
        n, columns = math.prod(rows.held_shape), rows.held_shape[1]
        if rows.transpose:
            pieces = {"": codes, ".absmax": absmax}
            yield decode(pieces, rows.held_shape, "nf4", torch.bfloat16).t()
            return
        step = NF4_BLOCK * max(1, _CHUNK_ELEMENTS // (NF4_BLOCK * columns)) * columns
        for start in range(0, n, step):
            stop = min(start + step, n)
            pieces = {
                "": codes[start // 2 : -(-stop // 2)],
                ".absmax": absmax[start // NF4_BLOCK : -(-stop // NF4_BLOCK)],
            }
            yield decode(pieces, ((stop - start) // columns, columns), "nf4", torch.bfloat16)

    def kept(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """The codes `[N / 2]` of NF4 rows as they are, and their fp32 scales `[N / 64]`.

        Raises:
            CheckpointError: the file can't be read, or holds something else than NF4.
        """
        assert isinstance(rows.scheme, Nf4)
        n = math.prod(rows.held_shape)
        first = (rows.index or 0) * n
        with self._reading(rows.tensor) as (fd, base):
            codes = self._read(fd, base + first // 2, -(-n // 2)).clone()
        absmax = self._part(rows.scheme.beside[0], first // NF4_BLOCK, -(-n // NF4_BLOCK))
        try:
            scales = decode_scales(
                rows.tensor.name, rows.scheme, self._small, absmax, first // NF4_BLOCK
            )
        except ValueError as error:
            raise CheckpointError(f"{rows.tensor.name} of {self.path} {error}.") from error
        return codes, scales

    def _small(self, tensor: SourceTensor) -> Tensor:
        """All of a tensor, flat, in memory of its own."""
        return self._part(tensor, 0, math.prod(tensor.shape))

    def _part(self, tensor: SourceTensor, start: int, count: int) -> Tensor:
        dtype = FLOATS.get(tensor.dtype, torch.uint8)
        with self._reading(tensor) as (fd, base):
            raw = self._read(fd, base + start * dtype.itemsize, count * dtype.itemsize)
            return raw.clone().view(dtype)

    def copy(self, tensor: SourceTensor) -> Iterator[memoryview]:
        """The bytes of a tensor, a few megabytes at a time, each valid until the next."""
        with self._reading(tensor) as (fd, base):
            for start in range(0, tensor.nbytes, _COPY_BYTES):
                nbytes = min(_COPY_BYTES, tensor.nbytes - start)
                yield self._read(fd, base + start, nbytes).numpy().data

    @contextmanager
    def _reading(self, tensor: SourceTensor) -> Iterator[tuple[int, int]]:
        """The open file in which a tensor lies, and where it starts there. Raises CheckpointError
        for what goes wrong with it."""
        file = self.moved.get(tensor.name, tensor.file)
        fd = -1
        try:
            fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
            yield fd, 0 if tensor.name in self.moved else tensor.offset
        except OSError as error:
            raise CheckpointError(
                f"{file} can't be read: {error.strerror or error}.",
                hint="Download it again and run the same command: it goes on from here.",
            ) from error
        finally:
            if fd >= 0:
                os.close(fd)

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
    for parts in (*sources, *map(unstacked, sources)):
        found = [(_find(checkpoint, part, prefixes), part) for part in parts]
        tensors = [(tensor, part) for tensor, part in found if tensor is not None]
        if len(tensors) < len(parts):
            continue
        rows = []
        for tensor, part in tensors:
            scheme = scheme_of(checkpoint.tensors, tensor, part, shape)
            if isinstance(scheme, str):
                return scheme
            rows.append(Rows(tensor, part.index, part.transpose, scheme))
        return _misfit(rows, parts, shape) or tuple(rows)
    missing = [part.key for part in sources[0] if _find(checkpoint, part, prefixes) is None]
    others = "".join(f" (or {' and '.join(p.key for p in parts)})" for parts in sources[1:])
    return f"missing: {', '.join(missing)}{others}."


def _find(checkpoint: Checkpoint, part: Part, prefixes: Sequence[str]) -> SourceTensor | None:
    for prefix in prefixes:
        tensor = checkpoint.tensors.get(prefix + part.key)
        if tensor is not None:
            return tensor
    return None


def _misfit(rows: Sequence[Rows], parts: Sequence[Part], shape: tuple[int, ...]) -> str | None:
    for row in rows:
        held = row.tensor.shape
        if row.index is not None and row.scheme is None and row.index >= (held or (0,))[0]:
            return f"{row.tensor.name} is {list(held)}: it has no slice {row.index}."
    columns = {row.shape[1:] for row in rows}
    fits = all(row.shape for row in rows) and columns == {shape[1:]}
    if fits and sum(row.shape[0] for row in rows) == shape[0]:
        return None
    have = " and ".join(f"{row} {list(row.shape)}" for row in rows)
    turned = " (transposed)" if parts[0].transpose else ""
    return f"{have}{turned} should make {list(shape)}."
