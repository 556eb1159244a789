"""The files of a store, and `Store`, an opened one.

    store.json                          all that is needed to read the rest, with checksums
    config.json, tokenizer.json, ...    small files of the source
    blocks/007-layers.3.mlp.safetensors one file a block (see `pieces`)
    extra-00001.safetensors             tensors of the source that training doesn't use, verbatim

A *unit* is what one read brings: the dense part of a block, or one expert.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import xxhash

from lamina.errors import StoreError
from lamina.models.spec import Block, BlockKind
from lamina.store.pieces import (
    ALIGNMENT,
    FORMAT,
    ITEM_BYTES,
    BlockLayout,
    Piece,
    StoredTensor,
    UnitLayout,
    plan_block,
    plan_blocks,
)

__all__ = [
    "ALIGNMENT",
    "FORMAT",
    "HINT_BLOCK",
    "JOURNAL",
    "MANIFEST",
    "BlockChecksums",
    "BlockLayout",
    "ExtraFile",
    "Piece",
    "Store",
    "StoredBlock",
    "StoredTensor",
    "Unit",
    "UnitLayout",
    "manifest_block",
    "plan_block",
    "plan_blocks",
    "read_manifest",
    "seal",
    "size_problem",
]

MANIFEST = "store.json"
#: The record of a preparation under way, one line a finished file.
JOURNAL = "prepare.jsonl"

_HINT_MANIFEST = "Delete that folder and run `lamina prepare` again."
HINT_BLOCK = "Delete the named files and run `lamina prepare` again: it makes only these anew."


@dataclass(frozen=True, slots=True, eq=False)
class Unit:
    """What one read brings. Compared by identity: a store makes each unit once.

    Args:
        block: the name of its block.
        expert: the expert, or None for the dense part.
        file: the block's file, relative to the store.
        offset, nbytes: the range in that file; multiples of 4,096.
        checksum: xxh3-128 of the range, in hexadecimal.
    """

    block: str
    expert: int | None
    file: str
    offset: int
    nbytes: int
    checksum: str
    tensors: tuple[StoredTensor, ...]

    def __str__(self) -> str:
        part = "its dense part" if self.expert is None else f"expert {self.expert}"
        return f"block {self.block}, {part}"


@dataclass(frozen=True, slots=True, eq=False)
class StoredBlock:
    """A block of the model in a store: its dense part and its routed experts, if any.

    Args:
        file: relative to the store.
        nbytes: the file's size.
        header_bytes, header_checksum: of the safetensors header, padding included.
    """

    name: str
    kind: BlockKind
    layer: int | None
    file: str
    nbytes: int
    header_bytes: int
    header_checksum: str
    dense: Unit
    experts: tuple[Unit, ...]

    @property
    def units(self) -> tuple[Unit, ...]:
        """The dense part, then the experts: in the file's order."""
        return (self.dense, *self.experts)


@dataclass(frozen=True, slots=True)
class ExtraFile:
    """A safetensors file with unused tensors of the source; the checksum is of the whole file."""

    file: str
    nbytes: int
    checksum: str


# 1. What store.json says


@dataclass(frozen=True, slots=True)
class BlockChecksums:
    """The xxh3-128 of the parts of a written block file, in hexadecimal."""

    header: str
    dense: str
    experts: tuple[str, ...]


def manifest_block(layout: BlockLayout, checksums: BlockChecksums) -> dict[str, Any]:
    """The entry of a written block in store.json."""
    entry: dict[str, Any] = {
        "name": layout.name,
        "kind": layout.kind,
        "layer": layout.layer,
        "file": layout.file,
        "nbytes": layout.nbytes,
        "header": [len(layout.header), checksums.header],
        "dense": {
            "offset": layout.dense_offset,
            **_layout_to_json(layout.dense),
            "checksum": checksums.dense,
        },
        "experts": None,
    }
    if layout.experts is not None:
        entry["experts"] = {
            "offset": layout.experts_offset,
            **_layout_to_json(layout.experts),
            "checksums": list(checksums.experts),
        }
    return entry


def _layout_to_json(layout: UnitLayout) -> dict[str, Any]:
    return {
        "nbytes": layout.nbytes,
        "tensors": [
            [t.name, t.shape, t.codec, [[p.suffix, p.dtype, p.shape, p.start] for p in t.pieces]]
            for t in layout.tensors
        ],
    }


def _layout_from_json(entry: dict[str, Any]) -> UnitLayout:
    tensors = []
    for name, shape, codec, pieces in entry["tensors"]:
        stored = tuple(
            Piece(suffix, dtype, tuple(dims), start, math.prod(dims) * ITEM_BYTES[dtype])
            for suffix, dtype, dims, start in pieces
        )
        tensors.append(StoredTensor(name, tuple(shape), codec, stored))
    return UnitLayout(tuple(tensors), entry["nbytes"])


def _block_from_json(entry: dict[str, Any]) -> StoredBlock:
    name, file, dense = entry["name"], entry["file"], entry["dense"]
    layout = _layout_from_json(dense)
    experts: tuple[Unit, ...] = ()
    if (stacked := entry["experts"]) is not None:
        one = _layout_from_json(stacked)
        experts = tuple(
            Unit(name, e, file, stacked["offset"] + e * one.nbytes, one.nbytes, sum_, one.tensors)
            for e, sum_ in enumerate(stacked["checksums"])
        )
    return StoredBlock(
        name=name,
        kind=cast(BlockKind, entry["kind"]),
        layer=entry["layer"],
        file=file,
        nbytes=entry["nbytes"],
        header_bytes=entry["header"][0],
        header_checksum=entry["header"][1],
        dense=Unit(
            name, None, file, dense["offset"], layout.nbytes, dense["checksum"], layout.tensors
        ),
        experts=experts,
    )


def seal(manifest: dict[str, Any]) -> str:
    """The fingerprint of a manifest: of everything in it but the fingerprint itself."""
    content = {key: value for key, value in manifest.items() if key != "fingerprint"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return str(xxhash.xxh3_128_hexdigest(text.encode()))


def read_manifest(path: Path) -> dict[str, Any]:
    """store.json of the store at `path`: of our format, and undamaged.

    Raises:
        StoreError: it isn't.
    """
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise StoreError(f"{file} can't be read: {error.strerror or error}") from error
    except ValueError as error:
        raise StoreError(f"{file} isn't JSON: {error}", hint=_HINT_MANIFEST) from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise StoreError(f"{file} isn't the description of a store.", hint=_HINT_MANIFEST)
    if manifest["format"] != FORMAT:
        raise StoreError(
            f"{path} is a store of format {manifest['format']}; this version reads {FORMAT}.",
            hint="Update Lamina, or run `lamina prepare` again into another folder.",
        )
    if seal(manifest) != manifest.get("fingerprint"):
        raise StoreError(f"{file} is damaged: its checksum doesn't fit.", hint=_HINT_MANIFEST)
    return manifest


# 2. An opened store


@dataclass(frozen=True)
class Store:
    """An opened store. `Store.open` is cheap: it reads store.json and the files' sizes.

    Args:
        model_type: transformers' name of the family.
        config: the source's transformers config.
        codec: of the matrices; other tensors are bf16.
        blocks: in the model's order.
        extra: the files with unused tensors of the source.
        notes: what a user should know about the conversion, one sentence each.
        fingerprint: identifies the contents: model, codec and checksums.
    """

    path: Path
    model_type: str
    config: dict[str, Any]
    codec: str
    blocks: tuple[StoredBlock, ...]
    extra: tuple[ExtraFile, ...]
    notes: tuple[str, ...]
    fingerprint: str
    _by_name: dict[str, StoredBlock] = field(repr=False, compare=False)

    @staticmethod
    def open(path: str | os.PathLike[str]) -> Store:
        """The store in the folder `path`.

        Raises:
            StoreError: there is none, it is unfinished, of another format, or files are missing or
                truncated (all of them are named).
        """
        root = Path(path)
        _check_there(root)
        manifest = read_manifest(root)
        try:
            blocks = tuple(_block_from_json(entry) for entry in manifest["blocks"])
            store = Store(
                path=root,
                model_type=manifest["model_type"],
                config=manifest["config"],
                codec=manifest["codec"],
                blocks=blocks,
                extra=tuple(ExtraFile(*entry) for entry in manifest["extra"]),
                notes=tuple(manifest["notes"]),
                fingerprint=manifest["fingerprint"],
                _by_name={block.name: block for block in blocks},
            )
        except (KeyError, TypeError, ValueError) as error:
            raise StoreError(
                f"{root / MANIFEST} lacks what a store of format {FORMAT} says ({error!r}).",
                hint=_HINT_MANIFEST,
            ) from error
        problems = [
            problem
            for file, nbytes in store.files()
            if (problem := size_problem(root / file, nbytes)) is not None
        ]
        if problems:
            raise StoreError(f"{root} is damaged.", hint=HINT_BLOCK, problems=problems)
        return store

    @property
    def total_bytes(self) -> int:
        """The bytes of all units: what reading every weight once reads."""
        return sum(unit.nbytes for unit in self.units())

    def files(self) -> Iterator[tuple[str, int]]:
        """Each file with tensors, relative to the store, and its size."""
        for block in self.blocks:
            yield block.file, block.nbytes
        for extra in self.extra:
            yield extra.file, extra.nbytes

    def units(self) -> Iterator[Unit]:
        """All units, block by block: the dense part, then the experts."""
        for block in self.blocks:
            yield from block.units

    def block(self, name: str) -> StoredBlock:
        """The block of that name.

        Raises:
            KeyError: there is none.
        """
        return self._by_name[name]

    def check_model(self, blocks: Sequence[Block]) -> None:
        """Sees that this store holds the model made of `blocks`.

        Raises:
            StoreError: names, order or shapes differ; the differences are listed.
        """
        asked = [_outline(layout) for layout in plan_blocks(blocks, self.codec)]
        held = [_stored_outline(block) for block in self.blocks]
        problems = [
            f"Block {i} is {have[0] if have else 'missing'} in the store"
            f"{' with other tensors or shapes' if have and want and have[0] == want[0] else ''}, "
            f"and {want[0] if want else 'not there'} in the model."
            for i in range(max(len(asked), len(held)))
            if (have := held[i] if i < len(held) else None)
            != (want := asked[i] if i < len(asked) else None)
        ]
        if problems:
            raise StoreError(
                f"{self.path} is a store of another model.",
                hint="Run `lamina prepare` for this model into another folder.",
                problems=problems[:10],
            )


def _outline(layout: BlockLayout) -> tuple[str, UnitLayout, int, UnitLayout | None]:
    return (layout.name, layout.dense, layout.num_experts, layout.experts)


def _stored_outline(block: StoredBlock) -> tuple[str, UnitLayout, int, UnitLayout | None]:
    dense = UnitLayout(block.dense.tensors, block.dense.nbytes)
    expert = block.experts[0] if block.experts else None
    layout = UnitLayout(expert.tensors, expert.nbytes) if expert is not None else None
    return (block.name, dense, len(block.experts), layout)


def _check_there(root: Path) -> None:
    if not root.is_dir():
        what = "is a file, not the folder of a store" if root.exists() else "doesn't exist"
        raise StoreError(f"{root} {what}.", hint="`lamina prepare MODEL` makes a store.")
    if (root / MANIFEST).exists():
        return
    if (root / JOURNAL).exists():
        raise StoreError(
            f"The preparation of {root} isn't finished.",
            hint="Run the same `lamina prepare` again: it goes on where it stopped.",
        )
    raise StoreError(
        f"{root} isn't a store: it has no {MANIFEST}.", hint="`lamina prepare MODEL` makes a store."
    )


def size_problem(file: Path, nbytes: int) -> str | None:
    """What is wrong with the size of `file`, as a sentence, or None."""
    try:
        found = file.stat().st_size
    except OSError as error:
        return f"{file} can't be read: {error.strerror or error}."
    if found < nbytes:
        return f"{file} is truncated: it has {found:,} of {nbytes:,} bytes."
    if found > nbytes:
        return f"{file} has {found:,} bytes where {nbytes:,} were written."
    return None
