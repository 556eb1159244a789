"""Checkpoints whose matrices are already quantized: how they are held, and what can be read.

* fp8, as compressed-tensors' `float-quantized` writes it (Llama 4 Maverick's FP8 release):
  `X.weight` is float8_e4m3fn `[O, I]`, `X.weight_scale` is `[O, 1]`, or one number. The weight is
  their product.
* NF4, as transformers writes what bitsandbytes has quantized: `X.weight` is the packed codes of the
  flattened `[O, I]`, two to a byte; beside it lie `.absmax` (fp32 scales of blocks of 64; or, with
  "double quantization", one byte each and `.nested_absmax`, `.nested_quant_map` to read these by),
  `.quant_map` (the 16 levels) and `.quant_state.bitsandbytes__nf4` (the rest, as JSON).

Headers alone decide whether a tensor can be read, so that what can't is known before anything big
is downloaded.

Quantizers know linears only: a release of stacked experts `experts.gate_up_proj[e]` that they have
been through has `experts.e.gate_proj.weight` and `experts.e.up_proj.weight` instead (`unstacked`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lamina.models.spec import Part
from lamina.store.codec import NF4_BLOCK, NF4_CODE
from lamina.store.headers import FLOATS, FP8, SourceTensor

__all__ = [
    "Fp8",
    "Nf4",
    "Scheme",
    "decode_fp8",
    "decode_scales",
    "scheme_of",
    "unstacked",
]

_STATE = ".quant_state.bitsandbytes__"
#: Rows of float8 decoded at once: their temporaries stay in the processor's cache.
_ROWS = 64


@dataclass(frozen=True, slots=True)
class Fp8:
    """float8 weights with a scale a row, or one for all."""

    scale: SourceTensor

    @property
    def beside(self) -> tuple[SourceTensor, ...]:
        """What must be read beside the weight itself."""
        return (self.scale,)


@dataclass(frozen=True, slots=True)
class Nf4:
    """bitsandbytes' codes.

    Args:
        shape: of the matrix that was flattened and quantized (of one slice, where it was a stack).
        beside: absmax, quant_map and the state; nested_absmax and nested_quant_map follow if the
            scales themselves are quantized.
    """

    shape: tuple[int, int]
    beside: tuple[SourceTensor, ...]

    @property
    def nested(self) -> bool:
        return len(self.beside) == 5


Scheme = Fp8 | Nf4


def scheme_of(
    tensors: Mapping[str, SourceTensor], tensor: SourceTensor, part: Part, shape: tuple[int, ...]
) -> Scheme | str | None:
    """How a tensor that should give `part` of a matrix of `shape` is quantized: None if it isn't,
    or what is wrong, as a sentence."""
    states = [f"{tensor.name}{_STATE}{kind}" for kind in ("nf4", "fp4")]
    if states[0] in tensors or f"{tensor.name}.quant_map" in tensors:
        if states[0] not in tensors:
            kind = "fp4" if states[1] in tensors else "something else than NF4"
            return f"{tensor.name} was quantized by bitsandbytes to {kind}; only NF4 can be read."
        return _nf4(tensors, tensor, part, shape)
    if tensor.dtype == FP8:
        return _fp8(tensors, tensor, part)
    if tensor.dtype not in FLOATS:
        known = ", ".join((*FLOATS, FP8))
        return f"{tensor.name} is {tensor.dtype}; {known} and bitsandbytes' NF4 can be converted."
    return None


def _fp8(tensors: Mapping[str, SourceTensor], tensor: SourceTensor, part: Part) -> Fp8 | str:
    scale = tensors.get(f"{tensor.name}_scale")
    if scale is None or scale.dtype not in FLOATS:
        return f"{tensor.name} is {FP8}, and its scale {tensor.name}_scale is missing."
    one = math.prod(scale.shape) == 1
    if len(tensor.shape) != 2 or part.index is not None:
        return f"{tensor.name} is {FP8} and {list(tensor.shape)}; only matrices can be so."
    if not one and scale.shape not in ((tensor.shape[0],), (tensor.shape[0], 1)):
        return (
            f"{scale.name} is {list(scale.shape)}: only one scale, or one a row, can be read "
            f"({[tensor.shape[0], 1]})."
        )
    return Fp8(scale)


def _nf4(
    tensors: Mapping[str, SourceTensor], tensor: SourceTensor, part: Part, shape: tuple[int, ...]
) -> Nf4 | str:
    names = [".absmax", ".quant_map", f"{_STATE}nf4"]
    if f"{tensor.name}.nested_absmax" in tensors:
        names += [".nested_absmax", ".nested_quant_map"]
    beside = tuple(tensors[tensor.name + n] for n in names if tensor.name + n in tensors)
    if len(beside) < len(names):
        lost = [tensor.name + n for n in names if tensor.name + n not in tensors]
        return f"{tensor.name} was quantized by bitsandbytes, but {', '.join(lost)} is missing."
    if beside[0].dtype != ("U8" if len(beside) == 5 else "F32"):
        return f"{beside[0].name} is {beside[0].dtype}, which isn't how bitsandbytes keeps scales."
    held = _nf4_shape(tensor, part, shape)
    if isinstance(held, str):
        return held
    weights = 2 * tensor.nbytes
    if math.prod(beside[0].shape) != -(-weights // NF4_BLOCK):
        size = weights / max(1, math.prod(beside[0].shape))
        return (
            f"{tensor.name} was quantized by bitsandbytes in blocks of {size:.0f} weights; only "
            f"blocks of {NF4_BLOCK} can be read."
        )
    return Nf4(held, beside)


def _nf4_shape(tensor: SourceTensor, part: Part, shape: tuple[int, ...]) -> tuple[int, int] | str:
    """The shape of a packed matrix. The header has the bytes alone; of a slice we know the shape,
    of a whole matrix the columns."""
    weights = 2 * tensor.nbytes
    if len(shape) != 2:
        return f"{tensor.name} was quantized by bitsandbytes, but {list(shape)} isn't a matrix."
    if part.index is not None:
        rows, columns = shape[::-1] if part.transpose else shape
        count = weights // (rows * columns)
        fits = weights == rows * columns * count and part.index < count
        if fits and count > 1 and rows * columns % NF4_BLOCK:
            return f"{tensor.name} has blocks of {NF4_BLOCK} weights that reach across its slices."
    else:
        columns = shape[0] if part.transpose else shape[1]
        rows = weights // columns
        fits = rows * columns <= weights <= rows * columns + 1
    if not fits:
        return f"{tensor.name} has {weights:,} weights, which don't make {list(shape)}."
    return rows, columns


def unstacked(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    """The same rows of a checkpoint that holds each expert's linears one by one."""
    found: list[Part] = []
    for part in parts:
        parent, _, leaf = part.key.rpartition(".")
        names = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        if part.index is None:
            found.append(part)
        else:
            found += [Part(f"{parent}.{part.index}.{name}.weight") for name in names]
    return tuple(found)


# Reading


def decode_fp8(weight_OI: Tensor, scale: Tensor, start: int) -> Tensor:
    """Rows of the matrix in bf16.

    A row has 256 possible values: looking them up is several times as fast as widening and
    multiplying.

    Args:
        weight_OI: the rows from `start` on, as float8.
        scale: of all rows `[O]`, or of all weights `[1]`, in fp32.
    """
    rows, columns = weight_OI.shape
    out_OI = torch.empty((rows, columns), dtype=torch.bfloat16)
    scale_O = scale.expand(start + rows)[start:] if scale.numel() == 1 else scale[start:][:rows]
    levels = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    first_O = (torch.arange(_ROWS, dtype=torch.int32) * 256)[:, None]
    for at in range(0, rows, _ROWS):
        codes = weight_OI[at : at + _ROWS].view(torch.uint8)
        # float8 times bf16 has 12 significant bits: exact in fp32, so this rounds once.
        table = (levels * scale_O[at : at + _ROWS, None]).to(torch.bfloat16)
        index = codes.int().add_(first_O[: len(codes)])
        torch.index_select(table.view(-1), 0, index.view(-1), out=out_OI[at : at + _ROWS].view(-1))
    return out_OI


def decode_scales(
    name: str, scheme: Nf4, read: Callable[[SourceTensor], Tensor], absmax: Tensor, first: int
) -> Tensor:
    """The fp32 scales of blocks `first` and on.

    Args:
        name: the weight's, for messages.
        read: gives a small tensor as a flat one.
        absmax: the stored scales of those blocks: fp32, or bytes if they are nested.

    Raises:
        ValueError: these aren't the levels or the blocks of NF4 as the store has it (the end of a
            sentence).
    """
    levels = read(scheme.beside[1])
    if levels.dtype != torch.float32 or not torch.equal(levels, NF4_CODE):
        raise ValueError("has other levels than NF4's, so its codes can't be kept")
    try:
        state = json.loads(bytes(read(scheme.beside[2]).tolist()))
        block, outer = int(state["blocksize"]), int(state.get("nested_blocksize", 1))
        offset = float(state.get("nested_offset", 0.0))
        rows = [int(n) for n in state["shape"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"has a damaged quant_state ({error!r})") from error
    if block != NF4_BLOCK or state.get("quant_type") != "nf4":
        raise ValueError(
            f"is {state.get('quant_type')} in blocks of {block}, not nf4 in blocks of 64"
        )
    if rows[-2:] != list(scheme.shape):
        raise ValueError(f"was {rows} before it was quantized, not {list(scheme.shape)}")
    if not scheme.nested:
        return absmax
    outer_scales, outer_levels = read(scheme.beside[3]), read(scheme.beside[4])
    index = torch.arange(first, first + absmax.numel()) // outer
    return outer_levels[absmax.long()].mul_(outer_scales[index]).add_(offset)
