"""How a matrix is held: `nf4`, `int8` or `bf16`.

* `nf4`: the flattened matrix in blocks of 64, four bits a weight, in bitsandbytes' code book and
  packing (the first of two weights in the high half of a byte). Weights are bf16 before they are
  quantized, so a block's scale, its largest magnitude, is exact in bf16: 4.25 bits a weight. Codes
  taken over from bitsandbytes keep its fp32 scales ("wide", 4.5 bits): it may have quantized other
  than bf16 weights, or the scales themselves.
* `int8`: symmetric, one fp32 scale a row (the row's largest magnitude / 127): 8 bits a weight.
* `bf16`: as it is; lossless for bf16 sources.

Encoding needs no search: the ratio of two bf16 numbers depends on two mantissas of 7 bits and a
difference of exponents, so one table of 512 KiB holds the code of every ratio. On a CPU that is 20
times as fast as bitsandbytes' own encoder, with the same bits. Decoding goes through bitsandbytes'
kernel where it is installed. `nf4_encode_reference` and `nf4_decode_reference` say
readably what both compute; tests hold them together.

O = out features, I = in features, N = O * I, G = blocks of 64 (the last may be partial).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import ModuleType
from typing import Literal, get_args

import torch
from torch import Tensor

from lamina.kernels.nf4 import NF4_BLOCK, NF4_LEVELS, decode_flat

__all__ = [
    "CODECS",
    "NF4_BLOCK",
    "NF4_CODE",
    "Codec",
    "decode",
    "encode",
    "import_bitsandbytes",
    "nf4_decode_reference",
    "nf4_encode_reference",
]

Codec = Literal["nf4", "int8", "bf16"]
CODECS: tuple[str, ...] = get_args(Codec)

#: As float32, like bitsandbytes.
NF4_CODE = torch.tensor(NF4_LEVELS)
_NF4_BOUNDS = (NF4_CODE[1:] + NF4_CODE[:-1]) / 2
#: Smallest divisor that bitsandbytes uses, so that a block of zeros encodes as zeros.
_TINY = 1e-38

#: Elements worked on at once: temporaries stay in the processor's cache.
_ENCODE_CHUNK = 1 << 20
_DECODE_CHUNK = 1 << 21
#: Columns of the view that a decode kernel gets; it shares rows among threads.
_DECODE_COLUMNS = 4096


def encode(weight_OI: Tensor, codec: str) -> dict[str, Tensor]:
    """The pieces that hold `weight_OI`, by their suffix (see `pieces.encoded_pieces`).

    Sources of any float dtype are rounded to bf16 first.

    Raises:
        ValueError: a weight isn't finite (in bf16), or there is no such codec.
    """
    if codec == "bf16":
        plain = weight_OI.to(torch.bfloat16).contiguous()
        if plain.numel():
            _refuse_non_finite(torch.stack(torch.aminmax(plain)))
        return {"": plain}
    if codec == "int8":
        codes, scale_O = _int8_encode(weight_OI)
        _refuse_non_finite(scale_O)
        return {"": codes, ".scale": scale_O}
    if codec == "nf4":
        codes, absmax_G = _nf4_encode(weight_OI.reshape(-1))
        _refuse_non_finite(absmax_G)
        return {"": codes, ".absmax": absmax_G}
    raise ValueError(f"no codec {codec!r}")


def decode(
    tensors: Mapping[str, Tensor],
    shape: Sequence[int],
    codec: str,
    dtype: torch.dtype,
    out: Tensor | None = None,
) -> Tensor:
    """The tensor of `shape` that `tensors` (as made by `encode`) hold, in `dtype`.

    Decoding into `out` (contiguous, of that shape and dtype) is much faster than into fresh memory,
    whose pages the system must first provide. Without `out`, a bf16 tensor asked for in bf16 is
    returned as it is, not copied.

    Raises:
        ValueError: `out` doesn't fit, or there is no such codec.
    """
    if out is not None and (
        tuple(out.shape) != tuple(shape) or out.dtype != dtype or not out.is_contiguous()
    ):
        raise ValueError(
            f"out is {tuple(out.shape)} {out.dtype}, needed is a contiguous {tuple(shape)} {dtype}"
        )
    first = tensors[""]
    if codec == "bf16":
        plain = first.view(tuple(shape))
        return plain.to(dtype) if out is None else out.copy_(plain)
    if codec not in CODECS:
        raise ValueError(f"no codec {codec!r}")
    if out is None:
        out = torch.empty(tuple(shape), dtype=dtype, device=first.device)
    if codec == "int8":
        _int8_decode(first, tensors[".scale"], out)
    else:
        _nf4_decode(first, tensors[".absmax"], out.view(-1))
    return out


def _refuse_non_finite(extremes: Tensor) -> None:
    if not bool(torch.isfinite(extremes).all()):
        raise ValueError("a weight is NaN or infinite")


# int8


def _int8_encode(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = weight_OI.shape
    codes_OI = torch.empty((rows, columns), dtype=torch.int8, device=weight_OI.device)
    scale_O = torch.empty(rows, dtype=torch.float32, device=weight_OI.device)
    step = max(1, _ENCODE_CHUNK // columns)
    for start in range(0, rows, step):
        part = weight_OI[start : start + step].to(torch.bfloat16).float()
        scale = part.abs().amax(dim=1) / 127
        scale_O[start : start + step] = scale
        divisor = torch.where(scale > 0, scale, 1)
        part.div_(divisor[:, None]).round_().clamp_(-127, 127)
        codes_OI[start : start + step] = part.nan_to_num_(0).to(torch.int8)
    return codes_OI, scale_O


def _int8_decode(codes_OI: Tensor, scale_O: Tensor, out_OI: Tensor) -> None:
    rows, columns = out_OI.shape
    step = max(1, _ENCODE_CHUNK // columns)
    for start in range(0, rows, step):
        part = codes_OI[start : start + step].float().mul_(scale_O[start : start + step, None])
        out_OI[start : start + step].copy_(part)


# nf4


def nf4_encode_reference(flat_N: Tensor) -> tuple[Tensor, Tensor]:
    """The codes `[ceil(N/2)]` (uint8, two a byte) and scales `[G]` (bf16) of bf16 weights."""
    n = flat_N.numel()
    whole = n - n % NF4_BLOCK
    x_N = flat_N.to(torch.bfloat16).float()
    blocks_GB = x_N[:whole].view(-1, NF4_BLOCK)
    scales = blocks_GB.abs().amax(dim=1) if whole else x_N.new_empty(0)
    # bitsandbytes multiplies whole blocks by the reciprocal and divides the partial one.
    ratios = (blocks_GB * (1.0 / scales.clamp(min=_TINY))[:, None]).reshape(-1)
    if whole < n:
        last = x_N[whole:].abs().amax()
        scales = torch.cat([scales, last[None]])
        ratios = torch.cat([ratios, x_N[whole:] / last.clamp(min=_TINY)])
    ratios = torch.nn.functional.pad(ratios, (0, n % 2))
    bounds = _NF4_BOUNDS.to(flat_N.device)
    codes = torch.bucketize(ratios, bounds, out_int32=True).to(torch.uint8)
    return (codes[0::2] << 4) | codes[1::2], scales.to(torch.bfloat16)


def nf4_decode_reference(
    codes: Tensor, absmax_G: Tensor, n: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """The `n` weights held by codes and scales: level times scale in fp32, rounded to `dtype`."""
    levels = NF4_CODE.to(codes.device)
    values = torch.stack([levels[(codes >> 4).long()], levels[(codes & 15).long()]], dim=1)
    scales_N = absmax_G.float().repeat_interleave(NF4_BLOCK)[:n]
    return (values.reshape(-1)[:n] * scales_N).to(dtype)


@lru_cache
def _code_table(device: torch.device) -> Tensor:
    """The code of x / a, at index `mantissa of a << 12 | sign of x << 11 | exponents' difference
    (at most 15) << 7 | mantissa of x`; with a difference of 15 every ratio rounds to zero."""
    mantissas = (torch.arange(128).float() + 128) / 128
    x = torch.arange(4096)
    sign = torch.where(x >> 11 == 1, -1.0, 1.0)
    ratios = sign * mantissas[x & 127] * torch.pow(2.0, -((x >> 7) & 15).float())
    ratios = ratios[None, :] * (1.0 / mantissas)[:, None]
    return torch.bucketize(ratios, _NF4_BOUNDS).to(torch.uint8).reshape(-1).to(device)


def _nf4_encode(flat_N: Tensor) -> tuple[Tensor, Tensor]:
    n, device = flat_N.numel(), flat_N.device
    codes = torch.empty(-(-n // 2), dtype=torch.uint8, device=device)
    absmax_G = torch.empty(-(-n // NF4_BLOCK), dtype=torch.bfloat16, device=device)
    table = _code_table(device)
    whole = n - n % NF4_BLOCK
    for start in range(0, whole, _ENCODE_CHUNK):
        stop = min(start + _ENCODE_CHUNK, whole)
        x = flat_N[start:stop].to(torch.bfloat16)
        bits = x.view(torch.int16).view(-1, NF4_BLOCK)
        magnitude = bits & 0x7FFF  # orders like the number it stands for
        largest = magnitude.amax(dim=1)
        # The table holds for scales from 2**-111 on (and for blocks of zeros).
        if bool(((largest > 0) & (largest < 16 << 7)).any()):
            codes[start // 2 : stop // 2], absmax_G[start // NF4_BLOCK : stop // NF4_BLOCK] = (
                nf4_encode_reference(x)
            )
            continue
        absmax_G[start // NF4_BLOCK : stop // NF4_BLOCK] = largest.view(torch.bfloat16)
        exponent = (largest >> 7).clamp_(min=16)
        index = (exponent[:, None] - (magnitude >> 7)).clamp_(max=15)
        index = (index << 7).bitwise_or_(bits & 0x7F).bitwise_or_((bits >> 4) & 0x800)
        wide = index.int().add_(((largest & 0x7F).int() << 12)[:, None])
        pairs = table.index_select(0, wide.view(-1)).view(-1, 2)
        torch.bitwise_or(pairs[:, 0] << 4, pairs[:, 1], out=codes[start // 2 : stop // 2])
    if whole < n:
        codes[whole // 2 :], absmax_G[whole // NF4_BLOCK :] = nf4_encode_reference(flat_N[whole:])
    return codes, absmax_G


def _nf4_decode(codes: Tensor, absmax_G: Tensor, out_N: Tensor) -> None:
    """Decodes in chunks: a kernel's fresh output stays in the cache and is copied from there, which
    is 5 times as fast as a fresh output of the whole matrix."""
    if _native_dequantize() is None:
        decode_flat(codes, absmax_G, out_N)
        return
    n = out_N.numel()
    scales_G = absmax_G.float()
    kernel_dtype = out_N.dtype if out_N.dtype in _KERNEL_DTYPES else torch.float32
    start = 0
    while start < n:
        stop = min(start + _DECODE_CHUNK, n)
        if stop - start > _DECODE_COLUMNS:
            stop -= (stop - start) % _DECODE_COLUMNS
        chunk = codes[start // 2 : -(-stop // 2)]
        scales = scales_G[start // NF4_BLOCK : -(-stop // NF4_BLOCK)]
        # The kernel wants an even row: an odd last weight shares its byte with padding.
        even = stop - start + (stop - start) % 2
        columns = _DECODE_COLUMNS if even % _DECODE_COLUMNS == 0 else even
        values = torch.ops.bitsandbytes.dequantize_4bit.default(
            chunk, scales, NF4_BLOCK, "nf4", [even // columns, columns], kernel_dtype
        )
        out_N[start:stop].copy_(values.view(-1)[: stop - start])
        start = stop


_KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class _WithoutKernelsNotice(logging.Filter):
    """bitsandbytes warns at import that an optional kernel, which we don't use, isn't there."""

    def filter(self, record: logging.LogRecord) -> bool:
        return "gemm_4bit_forward from kernels-community" not in record.getMessage()


@lru_cache
def import_bitsandbytes() -> ModuleType | None:
    """bitsandbytes, imported without its notice about an optional package, or None."""
    logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_WithoutKernelsNotice())
    try:
        import bitsandbytes
    except ImportError:
        return None
    module: ModuleType = bitsandbytes
    return module


@lru_cache
def _native_dequantize() -> ModuleType | None:
    """bitsandbytes, if its compiled library loaded: what it falls back to is slower than ours."""
    module = import_bitsandbytes()
    library = getattr(getattr(module, "cextension", None), "lib", None)
    return None if library is None or "ErrorHandler" in type(library).__name__ else module
