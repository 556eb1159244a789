"""Where everything in a block file lies: names, shapes and codec alone decide it, so the exact size
of a store is known before there is one.

A *unit* is one range of the file that starts and ends on a 4 KiB boundary: the dense part of a
block, then each expert. The files are plain safetensors: the header is padded with spaces to 4 KiB;
since gaps between tensors are refused, padding is a declared U8 tensor. Within a unit each piece
starts on a 64-byte boundary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamina.models.spec import Block, BlockKind

__all__ = [
    "ALIGNMENT",
    "FORMAT",
    "ITEM_BYTES",
    "BlockLayout",
    "Piece",
    "StoredTensor",
    "UnitLayout",
    "encoded_pieces",
    "padded_header",
    "plan_block",
    "plan_blocks",
    "unit_layout",
]

FORMAT = 1
ALIGNMENT = 4096
_PIECE_ALIGNMENT = 64
#: Weights that share a scale (`kernels/nf4.py`).
_NF4_BLOCK = 64
#: Bytes of an item of each dtype that a codec stores, by safetensors' names.
ITEM_BYTES = {"BF16": 2, "F32": 4, "I8": 1, "U8": 1}


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of the file: a matrix in bf16, or its codes, or its scales.

    Args:
        suffix: what follows the matrix's name in the file: `""`, `.absmax` or `.scale`.
        dtype: safetensors' name of it.
        start, nbytes: where it lies, from the start of its unit.
    """

    suffix: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of the model, as its unit holds it: `q_proj` is `q_proj.weight` in the file. Two are
    equal if they hold the same tensor, wherever its pieces lie."""

    name: str
    shape: tuple[int, ...]
    codec: str
    pieces: tuple[Piece, ...] = field(compare=False)

    @property
    def wide_scales(self) -> bool:
        """Whether the scales of nf4 are fp32, as bitsandbytes has them."""
        return self.codec == "nf4" and self.pieces[-1].dtype == "F32"


@dataclass(frozen=True, slots=True)
class UnitLayout:
    """What a unit holds, wherever it lies: the experts of a block share one."""

    tensors: tuple[StoredTensor, ...]
    nbytes: int = field(compare=False)


@dataclass(frozen=True, slots=True)
class BlockLayout:
    """The file of a block that isn't written yet.

    Args:
        file: relative to the store.
        header: the safetensors header, its length and its padding included.
        dense_offset, experts_offset: where the dense unit and expert 0 start in the file.
        nbytes: the size of the file.
    """

    name: str
    kind: BlockKind
    layer: int | None
    file: str
    header: bytes
    dense: UnitLayout
    dense_offset: int
    experts: UnitLayout | None
    experts_offset: int
    num_experts: int
    nbytes: int


def encoded_pieces(
    shape: Sequence[int], codec: str, wide_scales: bool = False
) -> tuple[tuple[str, str, tuple[int, ...]], ...]:
    """What a tensor of `shape` becomes: (suffix, safetensors dtype, shape) of each stored piece.

    Args:
        wide_scales: the scales of nf4 are fp32.

    Raises:
        ValueError: there is no such codec.
    """
    n = math.prod(shape)
    if codec == "bf16":
        return (("", "BF16", tuple(shape)),)
    if codec == "int8":
        return (("", "I8", tuple(shape)), (".scale", "F32", (shape[0],)))
    if codec == "nf4":
        scales = "F32" if wide_scales else "BF16"
        return (("", "U8", (-(-n // 2),)), (".absmax", scales, (-(-n // _NF4_BLOCK),)))
    raise ValueError(f"no codec {codec!r}")


def plan_blocks(
    blocks: Sequence[Block], codec: str, wide_scales: bool = False
) -> tuple[BlockLayout, ...]:
    """The files of a model's blocks, in their order."""
    return tuple(plan_block(i, block, codec, wide_scales) for i, block in enumerate(blocks))


def plan_block(index: int, block: Block, codec: str, wide_scales: bool = False) -> BlockLayout:
    """The file of `block`, the model's block number `index`: names and shapes are enough.

    Args:
        wide_scales: the scales of nf4 are fp32, for codes taken over from bitsandbytes.

    Raises:
        ValueError: there is no such codec.
    """
    dense = unit_layout(
        [(p.name, p.shape, "bf16") for p in block.plain]
        + [(m.name, m.shape, codec) for m in block.linears],
        wide_scales,
    )
    expert = None
    if block.experts is not None:
        expert = unit_layout(
            [
                ("gate_up_proj", block.experts.gate_up_shape, codec),
                ("down_proj", block.experts.down_shape, codec),
            ],
            wide_scales,
        )
    num_experts = block.experts.num_experts if block.experts is not None else 0
    units = [("", dense)]
    if expert is not None:
        units += [(f"experts.{e}.", expert) for e in range(num_experts)]
    header = _header(units, {"format": "pt", "lamina": str(FORMAT), "block": block.name})
    experts_offset = len(header) + dense.nbytes
    return BlockLayout(
        name=block.name,
        kind=block.kind,
        layer=block.layer,
        file=f"blocks/{index:03d}-{block.name}.safetensors",
        header=header,
        dense=dense,
        dense_offset=len(header),
        experts=expert,
        experts_offset=experts_offset,
        num_experts=num_experts,
        nbytes=experts_offset + num_experts * (expert.nbytes if expert else 0),
    )


def unit_layout(
    tensors: Sequence[tuple[str, tuple[int, ...], str]], wide_scales: bool = False
) -> UnitLayout:
    """Where the pieces of these tensors (name, shape, codec) lie in a unit."""
    at = 0
    stored = []
    for name, shape, codec in tensors:
        pieces = []
        for suffix, dtype, piece_shape in encoded_pieces(shape, codec, wide_scales):
            at = _aligned(at, _PIECE_ALIGNMENT)
            nbytes = math.prod(piece_shape) * ITEM_BYTES[dtype]
            pieces.append(Piece(suffix, dtype, piece_shape, at, nbytes))
            at += nbytes
        stored.append(StoredTensor(name, tuple(shape), codec, tuple(pieces)))
    return UnitLayout(tuple(stored), _aligned(at, ALIGNMENT))


def _header(units: Sequence[tuple[str, UnitLayout]], metadata: dict[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": metadata}
    at = paddings = base = 0

    def add(name: str, dtype: str, shape: Sequence[int], start: int, stop: int) -> None:
        nonlocal at
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}
        at = stop

    def pad(to: int) -> None:
        nonlocal paddings
        if to > at:
            add(f"padding.{paddings}", "U8", [to - at], at, to)
            paddings += 1

    for prefix, layout in units:
        for tensor in layout.tensors:
            for piece in tensor.pieces:
                pad(base + piece.start)
                name = f"{prefix}{tensor.name}.weight{piece.suffix}"
                add(name, piece.dtype, piece.shape, at, at + piece.nbytes)
        base += layout.nbytes
        pad(base)
    return padded_header(entries)


def padded_header(entries: dict[str, Any]) -> bytes:
    """A safetensors header of these entries, its length in front, padded to 4 KiB."""
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = _aligned(8 + len(text), ALIGNMENT) - 8
    return length.to_bytes(8, "little") + text.ljust(length)


def _aligned(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment
