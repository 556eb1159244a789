"""Makes a store out of a checkpoint.

A killed preparation goes on where it stopped: a file gets its name only when it is whole and on
disk, and the journal says which files have theirs. `store.json` comes last; a folder without it is
no store. The same call mends a store: files that are gone or of the wrong size are made anew, and
must come out as they were.

What is in memory at any time: one slice of the source, one matrix in bf16 and its codes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamina.errors import CheckpointError, StoreError
from lamina.models.spec import Block, Linear, Plain, Sources
from lamina.store.checkpoint import Checkpoint, Rows, SourceTensor, resolve
from lamina.store.codec import CODECS, encode
from lamina.store.encoder import Encoder, Task, not_finite, work_bytes
from lamina.store.files import Meter, Progress, Writer, check_space, folder_errors, locked
from lamina.store.journal import Record
from lamina.store.layout import (
    FORMAT,
    MANIFEST,
    BlockChecksums,
    BlockLayout,
    Store,
    UnitLayout,
    manifest_block,
    plan_blocks,
)
from lamina.store.pieces import padded_header

__all__ = ["prepare"]

#: Small files of the source that go along; never code, never pickles.
_COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*")
_NOT_COPIED = ("*.index.json", "*.py", "*.bin", "*.pt", MANIFEST)
_COPY_LIMIT = 128 << 20
_EXTRA_BYTES = 4 << 30
#: For store.json and the journal: what a checksum or a tensor takes there, and some.
_RECORD_BYTES = 200


def prepare(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model_type: str,
    config: dict[str, Any],
    blocks: Sequence[Block],
    codec: str = "nf4",
    prefixes: Sequence[str] = ("",),
    progress: Progress | None = None,
) -> Store:
    """Converts the checkpoint in the folder `checkpoint` into a store in the folder `out`, or goes
    on with that, or mends it. Returns at once if all is there.

    Args:
        config: the source's transformers config.
        prefixes: what may stand before a key in this checkpoint, in order of preference.
        progress: called with (bytes done, bytes in total, what is being written).

    Raises:
        CheckpointError: tensors are missing, of the wrong shape or dtype (all are listed, before
            anything is written), or not finite.
        StoreError: `out` holds something else or is being written, or the disk is full.
    """
    root = Path(out)
    if codec not in CODECS:
        raise StoreError(f"There is no codec {codec!r}.", hint=f"Use one of {', '.join(CODECS)}.")
    source = Checkpoint.open(Path(checkpoint))
    jobs = _block_jobs(source, blocks, codec, prefixes)
    used = {
        row.tensor.name
        for job in jobs
        for _, rows_of in job.units()
        for rows in rows_of.values()
        for row in rows
    }
    unused = [tensor for name, tensor in sorted(source.tensors.items()) if name not in used]
    extras = _extra_jobs(unused)
    everything: list[_BlockJob | _ExtraJob] = [*jobs, *extras]
    identity = {
        "format": FORMAT,
        "model_type": model_type,
        "codec": codec,
        "config": json.loads(json.dumps(config)),
        "source": source.identity,
    }
    with folder_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        with locked(root):
            record = Record(root, identity)
            todo = [job for job in everything if not record.has(job.file, job.nbytes)]
            copied = _to_copy(source.path, root)
            needed = sum(job.nbytes for job in todo) + sum(f.stat().st_size for f in copied)
            units = sum(1 + len(job.experts) for job in jobs)
            check_space(root, needed + _RECORD_BYTES * (units + len(source.tensors)))

            (root / "blocks").mkdir(exist_ok=True)
            total = sum(job.nbytes for job in everything)
            meter = Meter(progress, total, total - sum(job.nbytes for job in todo))
            largest = max((work_bytes(*task) for job in jobs for task in job.tasks()), default=0)
            with Encoder(source, largest) as encoder:
                for job in todo:
                    meter.what = job.file
                    with Writer(root / job.file, meter) as writer:
                        entry = job.write(writer, source, encoder)
                        record.check(job.file, entry)
                    record.add(job.file, entry)
            for file in copied:
                _copy(file, root / file.name)
            files = [job.file for job in jobs], [job.file for job in extras]
            record.finish(*files, _notes(source, used))
            return Store.open(root)


# 1. What is to be written


@dataclass(frozen=True)
class _BlockJob:
    """A block file to be written."""

    layout: BlockLayout
    dense: dict[str, tuple[Rows, ...]]
    experts: tuple[dict[str, tuple[Rows, ...]], ...]

    @property
    def file(self) -> str:
        return self.layout.file

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes

    def units(self) -> Iterator[tuple[UnitLayout, dict[str, tuple[Rows, ...]]]]:
        """What each unit holds and where it comes from: the dense part, then the experts."""
        yield self.layout.dense, self.dense
        if self.layout.experts is not None:
            for rows in self.experts:
                yield self.layout.experts, rows

    def tasks(self) -> Iterator[Task]:
        """What must be encoded, in the order in which it is written."""
        for layout, rows_of in self.units():
            for tensor in layout.tensors:
                if tensor.codec != "bf16":
                    yield tensor, rows_of[tensor.name]

    def write(self, writer: Writer, source: Checkpoint, encoder: Encoder) -> dict[str, Any]:
        """Writes the file. Returns its entry in store.json."""
        writer.start_range()
        writer.write(memoryview(self.layout.header))
        header = writer.end_range()
        encoded = encoder.encoded(self.tasks())
        sums = [_write_unit(writer, source, *unit, encoded) for unit in self.units()]
        return manifest_block(self.layout, BlockChecksums(header, sums[0], tuple(sums[1:])))


@dataclass(frozen=True)
class _ExtraJob:
    """A file of unused tensors to be written."""

    file: str
    header: bytes
    tensors: tuple[SourceTensor, ...]
    nbytes: int

    def write(self, writer: Writer, source: Checkpoint, _: Encoder) -> list[Any]:
        """Writes the file. Returns its entry in store.json."""
        writer.start_range()
        writer.write(memoryview(self.header))
        for tensor in self.tensors:
            for view in source.copy(tensor):
                writer.write(view)
        return [self.file, self.nbytes, writer.end_range()]


def _block_jobs(
    source: Checkpoint, blocks: Sequence[Block], codec: str, prefixes: Sequence[str]
) -> list[_BlockJob]:
    """Raises CheckpointError with all that is missing or doesn't fit."""
    problems: list[str] = []

    def find(where: str, sources: Sources, shape: tuple[int, ...]) -> tuple[Rows, ...]:
        found = resolve(source, sources, shape, prefixes)
        if isinstance(found, str):
            problems.append(f"{where}: {found}")
            return ()
        return found

    jobs = []
    for block, layout in zip(blocks, plan_blocks(blocks, codec), strict=True):
        tensors: list[Plain | Linear] = [*block.plain, *block.linears]
        dense = {t.name: find(f"{block.name}.{t.name}", t.sources, t.shape) for t in tensors}
        experts = []
        if (e := block.experts) is not None:
            for i in range(e.num_experts):
                name = f"{block.name}.experts.{i}"
                gate_up = find(f"{name}.gate_up_proj", e.gate_up_sources(i), e.gate_up_shape)
                down = find(f"{name}.down_proj", e.down_sources(i), e.down_shape)
                experts.append({"gate_up_proj": gate_up, "down_proj": down})
        jobs.append(_BlockJob(layout, dense, tuple(experts)))
    if problems:
        more = [f"... and {len(problems) - 100} more."] if len(problems) > 100 else []
        raise CheckpointError(
            f"The checkpoint {source.path} doesn't have what this model needs.",
            hint="See that the folder holds all files of the model, and that its config.json fits.",
            problems=[*problems[:100], *more],
        )
    return jobs


def _extra_jobs(tensors: Sequence[SourceTensor]) -> list[_ExtraJob]:
    groups: list[list[SourceTensor]] = []
    room = 0
    for tensor in tensors:
        if tensor.nbytes > room:
            groups.append([])
            room = _EXTRA_BYTES
        groups[-1].append(tensor)
        room -= tensor.nbytes
    return [_extra_job(f"extra-{i:05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def _extra_job(file: str, tensors: Sequence[SourceTensor]) -> _ExtraJob:
    # Wider dtypes first, as safetensors itself does: so that each tensor is aligned to its items.
    tensors = sorted(tensors, key=lambda t: (-t.nbytes // max(1, _numel(t)), t.name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        at += tensor.nbytes
    header = padded_header(entries)
    return _ExtraJob(file, header, tuple(tensors), len(header) + at)


def _numel(tensor: SourceTensor) -> int:
    return torch.Size(tensor.shape).numel()


def _notes(source: Checkpoint, used: Iterable[str]) -> list[str]:
    dtypes = [source.tensors[name].dtype for name in sorted(used)]
    return [
        f"{dtypes.count(dtype)} tensors of the checkpoint are {dtype}; they were rounded to bf16."
        for dtype in sorted(set(dtypes))
        if dtype != "BF16"
    ]


# 2. Writing a unit


def _write_unit(
    writer: Writer,
    source: Checkpoint,
    layout: UnitLayout,
    rows_of: Mapping[str, tuple[Rows, ...]],
    encoded: Iterator[dict[str, Tensor]],
) -> str:
    """Writes a unit. Returns its checksum.

    Args:
        encoded: the pieces of the matrices that aren't bf16, in order.
    """
    start = writer.position
    writer.start_range()
    for tensor in layout.tensors:
        if tensor.codec == "bf16":
            writer.pad_to(start + tensor.pieces[0].start)
            _write_plain(writer, source, rows_of[tensor.name])
            continue
        pieces = next(encoded)
        for piece in tensor.pieces:
            writer.pad_to(start + piece.start)
            writer.write(_bytes(pieces[piece.suffix]))
    writer.pad_to(start + layout.nbytes)
    return writer.end_range()


def _write_plain(writer: Writer, source: Checkpoint, rows: Sequence[Rows]) -> None:
    for row in rows:
        for chunk in source.rows(row):
            try:
                writer.write(_bytes(encode(chunk, "bf16")[""]))
            except ValueError as error:
                raise not_finite(source, rows) from error


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


# 3. Small files


def _to_copy(source: Path, root: Path) -> list[Path]:
    return [
        file
        for file in sorted(source.iterdir())
        if any(fnmatch(file.name, pattern) for pattern in _COPIED)
        and not any(fnmatch(file.name, pattern) for pattern in _NOT_COPIED)
        and file.is_file()
        and file.stat().st_size <= _COPY_LIMIT
        and not (root / file.name).exists()
    ]


def _copy(file: Path, to: Path) -> None:
    with Writer(to) as writer:
        writer.write(memoryview(file.read_bytes()))
