"""What is to be written: the files of a store, and where each of their tensors comes from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lamina.errors import CheckpointError
from lamina.models.spec import Block, Linear, Plain, Sources
from lamina.store.checkpoint import Checkpoint, Rows, resolve
from lamina.store.codec import NF4_BLOCK, encode
from lamina.store.encoder import Task, not_finite
from lamina.store.headers import SourceTensor
from lamina.store.layout import BlockChecksums, BlockLayout, UnitLayout, manifest_block, plan_blocks
from lamina.store.pieces import StoredTensor, padded_header
from lamina.store.quantized import Fp8, Nf4

__all__ = ["Item", "Job", "Range", "block_jobs", "extra_jobs", "notes", "used_tensors"]

_EXTRA_BYTES = 4 << 30


@dataclass(frozen=True)
class Item:
    """A tensor to be written.

    Args:
        start: where its unit starts in the file; of a tensor that is carried along, where it does.
        tensor: as the unit holds it; None if it is carried along as it is.
        rows: where it comes from.
    """

    start: int
    tensor: StoredTensor | None
    rows: tuple[Rows, ...]

    @cached_property
    def sources(self) -> tuple[SourceTensor, ...]:
        """All tensors of the checkpoint that it is made of."""
        return tuple(tensor for row in self.rows for tensor in row.tensors)

    @cached_property
    def files(self) -> frozenset[Path]:
        """The files in which these are."""
        return frozenset(tensor.file for tensor in self.sources)

    @property
    def nbytes(self) -> int:
        if self.tensor is None:
            return sum(tensor.nbytes for tensor in self.sources)
        return sum(piece.nbytes for piece in self.tensor.pieces)

    @property
    def task(self) -> Task | None:
        """What must be encoded for it, if anything."""
        return (
            None if self.tensor is None or self.tensor.codec == "bf16" else (self.tensor, self.rows)
        )

    def views(
        self, source: Checkpoint, encoded: Iterator[dict[str, Tensor]]
    ) -> Iterator[tuple[int, memoryview]]:
        """Its bytes, and where they go in the file; each is valid until the next is asked for.

        Args:
            encoded: the pieces of what must be encoded, in order.

        Raises:
            CheckpointError: it can't be read, or isn't finite.
        """
        at = self.start
        if self.tensor is None:
            for view in source.copy(self.rows[0].tensor):
                yield at, view
                at += len(view)
        elif self.tensor.codec != "bf16":
            pieces = next(encoded)
            for piece in self.tensor.pieces:
                yield at + piece.start, _bytes(pieces[piece.suffix])
        else:
            at += self.tensor.pieces[0].start
            for view in _plain(source, self.rows):
                yield at, view
                at += len(view)


@dataclass(frozen=True)
class Range:
    """A range of the file that has a checksum of its own."""

    start: int
    stop: int
    items: tuple[Item, ...] = ()


@dataclass(frozen=True)
class Job:
    """A file to be written.

    Args:
        file: relative to the store.
        header: its first bytes.
        ranges: what follows or includes the header, without gaps.
        entry: makes its entry in store.json of the checksums of the ranges.
    """

    file: str
    nbytes: int
    header: bytes
    ranges: tuple[Range, ...]
    entry: Callable[[Sequence[str]], Any]

    @cached_property
    def items(self) -> tuple[Item, ...]:
        return tuple(item for part in self.ranges for item in part.items)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().data


def _plain(source: Checkpoint, rows: Sequence[Rows]) -> Iterator[memoryview]:
    for row in rows:
        for chunk in source.rows(row):
            try:
                yield _bytes(encode(chunk, "bf16")[""])
            except ValueError as error:
                raise not_finite(source, rows) from error


# The blocks of the model


@dataclass
class _Found:
    """Where the tensors of a block come from: of its dense part, then of each expert."""

    dense: dict[str, tuple[Rows, ...]]
    experts: list[dict[str, tuple[Rows, ...]]]


def block_jobs(
    source: Checkpoint, blocks: Sequence[Block], codec: str, prefixes: Sequence[str]
) -> list[Job]:
    """The files of the blocks.

    Raises:
        CheckpointError: with all that is missing or doesn't fit.
    """
    problems: list[str] = []
    kept = False

    def find(
        where: str, sources: Sources, shape: tuple[int, ...], matrix: bool
    ) -> tuple[Rows, ...]:
        nonlocal kept
        found = resolve(source, sources, shape, prefixes)
        if not isinstance(found, str) and matrix and codec == "nf4":
            kept |= any(isinstance(row.scheme, Nf4) for row in found)
            found = _cannot_keep(found) or found
        if isinstance(found, str):
            problems.append(f"{where}: {found}")
            return ()
        return found

    places = []
    for block in blocks:
        tensors: list[Plain | Linear] = [*block.plain, *block.linears]
        place = _Found({}, [])
        for t in tensors:
            where, matrix = f"{block.name}.{t.name}", isinstance(t, Linear)
            place.dense[t.name] = find(where, t.sources, t.shape, matrix)
        if (e := block.experts) is not None:
            for i in range(e.num_experts):
                name = f"{block.name}.experts.{i}"
                gate_up = find(
                    f"{name}.gate_up_proj", e.gate_up_sources(i), e.gate_up_shape, matrix=True
                )
                down = find(f"{name}.down_proj", e.down_sources(i), e.down_shape, matrix=True)
                place.experts.append({"gate_up_proj": gate_up, "down_proj": down})
        places.append(place)
    if problems:
        more = [f"... and {len(problems) - 100} more."] if len(problems) > 100 else []
        raise CheckpointError(
            f"The checkpoint {source.path} doesn't have what this model needs.",
            hint="See that the folder holds all files of the model, and that its config.json fits.",
            problems=[*problems[:100], *more],
        )
    layouts = plan_blocks(blocks, codec, wide_scales=kept)
    return [_block_job(layout, place) for layout, place in zip(layouts, places, strict=True)]


def _cannot_keep(rows: Sequence[Rows]) -> str | None:
    """Why the codes of rows that bitsandbytes has quantized can't be kept, if they can't."""
    other = "prepare it with --codec int8 or bf16, or from weights that aren't quantized."
    for row in rows:
        if isinstance(row.scheme, Nf4) and row.transpose:
            return (
                f"{row} was quantized by bitsandbytes as [in, out], and its blocks run along the "
                f"other dimension than the store's: {other}"
            )
    # Where a part ends inside a block, the scales of what follows would belong to other weights.
    if any(isinstance(row.scheme, Nf4) for row in rows):
        for row in rows[:-1]:
            if torch.Size(row.shape).numel() % NF4_BLOCK:
                return f"{row} {list(row.shape)} ends inside a block of {NF4_BLOCK}: {other}"
    return None


def _block_job(layout: BlockLayout, place: _Found) -> Job:
    def unit(start: int, held: UnitLayout, rows_of: dict[str, tuple[Rows, ...]]) -> Range:
        items = tuple(Item(start, tensor, rows_of[tensor.name]) for tensor in held.tensors)
        return Range(start, start + held.nbytes, items)

    ranges = [Range(0, len(layout.header)), unit(layout.dense_offset, layout.dense, place.dense)]
    if layout.experts is not None:
        size = layout.experts.nbytes
        ranges += [
            unit(layout.experts_offset + e * size, layout.experts, rows_of)
            for e, rows_of in enumerate(place.experts)
        ]

    def entry(sums: Sequence[str]) -> dict[str, Any]:
        return manifest_block(layout, BlockChecksums(sums[0], sums[1], tuple(sums[2:])))

    return Job(layout.file, layout.nbytes, layout.header, tuple(ranges), entry)


def used_tensors(jobs: Sequence[Job]) -> set[str]:
    """The names of the tensors that the jobs read."""
    return {tensor.name for job in jobs for item in job.items for tensor in item.sources}


def notes(jobs: Sequence[Job]) -> list[str]:
    """What a user should know about the conversion of the blocks, one sentence each."""
    counts: Counter[str] = Counter()
    seen: set[str] = set()
    for job in jobs:
        for item in job.items:
            for row in item.rows:
                if row.tensor.name not in seen:
                    seen.add(row.tensor.name)
                    counts[_what_happened(item, row)] += 1
    return [f"{n} tensors of the checkpoint {what}." for what, n in sorted(counts.items()) if what]


def _what_happened(item: Item, row: Rows) -> str:
    if isinstance(row.scheme, Fp8):
        return f"are {row.tensor.dtype} with scales; they were decoded to bf16"
    if isinstance(row.scheme, Nf4):
        assert item.tensor is not None
        kept = item.tensor.wide_scales
        what = "their codes and fp32 scales were kept" if kept else "they were decoded to bf16"
        return f"had been quantized to NF4 by bitsandbytes; {what}"
    dtype = row.tensor.dtype
    return "" if dtype == "BF16" else f"are {dtype}; they were rounded to bf16"


# Tensors that training doesn't use


def extra_jobs(tensors: Sequence[SourceTensor]) -> list[Job]:
    """The files that carry `tensors` along as they are."""
    groups: list[list[SourceTensor]] = []
    room = 0
    for tensor in tensors:
        if tensor.nbytes > room:
            groups.append([])
            room = _EXTRA_BYTES
        groups[-1].append(tensor)
        room -= tensor.nbytes
    return [_extra_job(f"extra-{i:05d}.safetensors", group) for i, group in enumerate(groups, 1)]


def _extra_job(file: str, tensors: Sequence[SourceTensor]) -> Job:
    # Wider dtypes first, as safetensors itself does: so that each tensor is aligned to its items.
    tensors = sorted(
        tensors, key=lambda t: (-t.nbytes // max(1, torch.Size(t.shape).numel()), t.name)
    )
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    starts = []
    at = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, at + tensor.nbytes],
        }
        starts.append(at)
        at += tensor.nbytes
    header = padded_header(entries)
    nbytes = len(header) + at
    items = tuple(
        Item(len(header) + start, None, (Rows(tensor, None, False),))
        for start, tensor in zip(starts, tensors, strict=True)
    )
    return Job(file, nbytes, header, (Range(0, nbytes, items),), lambda s: [file, nbytes, s[0]])
