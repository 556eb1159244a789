# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# (Triton compiles the kernels below from their source, and types them itself.)
"""Triton kernels: products with nf4 weights decoded in the main loop, and decoding by itself.

One kernel serves `x @ W^T` and `dy @ W`, for one expert or for many, whose rows lie one after the
other. A program makes one tile of the output, of one expert's rows: it finds its expert by a
running sum over the experts' tiles, so that no table comes from the host. Programs that share
weights are neighbours, and their second reads come from the cache.

A tile of weights is decoded in one of two ways. Where rows are whole words of eight codes and bf16
is wanted, which holds for every released model, in registers (see `ptx`), with the scales of the
next tile already on their way: the compiler doesn't pipeline reads of two bytes. Otherwise weight
by weight, from the code book in memory: any shape, and fp32.

Under `TRITON_INTERPRET=1` the kernels run on a CPU. There PTX is replaced by the code book,
products take fp32 operands, since the interpreter's bf16 product is wrong, and rounding is spelled
out, since the interpreter cuts off.

P = rows, O = out features (`outs` in the kernels), I = in features (`ins`), E = experts. K is what
a product sums over, N the output's columns: I and O for `x @ W^T`, O and I for `dy @ W`.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lamina.kernels.nf4 import NF4_BLOCK, Groups, Nf4, levels
from lamina.kernels.ptx import CONSTRAINTS, decode_eight

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Triton 3.9 warns at its first compilation where this isn't set. No sum here follows a product.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

_PTX = tl.constexpr(decode_eight())
_CONSTRAINTS = tl.constexpr(CONSTRAINTS)
_BLOCK = tl.constexpr(NF4_BLOCK)


@triton.jit
def _rounded(x, DTYPE: tl.constexpr, INTERPRET: tl.constexpr):
    """fp32 to nearest, ties to even."""
    if INTERPRET and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def _by_code_book(words, scale, levels_ptr, SHIFT: tl.constexpr):
    """One of the eight weights of each word. Interpreted only."""
    level = tl.load(levels_ptr + ((words >> SHIFT) & 15))
    return _rounded(level * scale.to(tl.float32), tl.bfloat16, True)


@triton.jit
def _decode_words(words, scale, levels_ptr, INTERPRET: tl.constexpr):
    """`[R, C]` words and their `[R, C / W]` scales to `[R, 8 C]` bf16 weights."""
    R: tl.constexpr = words.shape[0]
    C: tl.constexpr = words.shape[1]
    S: tl.constexpr = scale.shape[1]
    words = tl.reshape(words, [R, S, C // S])
    if INTERPRET:
        s = scale[:, :, None]
        w0 = _by_code_book(words, s, levels_ptr, 4)
        w1 = _by_code_book(words, s, levels_ptr, 0)
        w2 = _by_code_book(words, s, levels_ptr, 12)
        w3 = _by_code_book(words, s, levels_ptr, 8)
        w4 = _by_code_book(words, s, levels_ptr, 20)
        w5 = _by_code_book(words, s, levels_ptr, 16)
        w6 = _by_code_book(words, s, levels_ptr, 28)
        w7 = _by_code_book(words, s, levels_ptr, 24)
    else:
        # The scale twice in a word, for arithmetic on pairs.
        bits = (scale.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF) * 0x10001
        twice = tl.broadcast_to(bits[:, :, None], [R, S, C // S])
        w0, w1, w2, w3, w4, w5, w6, w7 = tl.inline_asm_elementwise(
            _PTX,
            _CONSTRAINTS,
            [words, twice],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=1,
        )
    # A join's last index is which of the two: weight 4a + 2b + c at [..., a, b, c].
    even = tl.join(tl.join(w0, w4), tl.join(w2, w6))
    odd = tl.join(tl.join(w1, w5), tl.join(w3, w7))
    weights = tl.reshape(tl.join(even, odd), [R, 8 * C])
    if not INTERPRET:
        weights = weights.to(tl.bfloat16, bitcast=True)
    return weights


@triton.jit
def _decode_each(
    codes_ptr, absmax_ptr, levels_ptr, o, i, outs, ins, DTYPE: tl.constexpr, INTERPRET: tl.constexpr
):
    """Weights `[O, I]` at rows and columns of any number and place; zeros outside."""
    at = o[:, None] * ins + i[None, :]
    inside = (o[:, None] < outs) & (i[None, :] < ins)
    packed = tl.load(codes_ptr + at // 2, mask=inside, other=0).to(tl.int32)
    level = tl.load(levels_ptr + ((packed >> ((1 - (at & 1)) * 4)) & 15))
    scale = tl.load(absmax_ptr + at // _BLOCK, mask=inside, other=0.0)
    return _rounded(level * scale.to(tl.float32), DTYPE, INTERPRET)


@triton.jit
def _scales(absmax_ptr, o, group, outs, ins, SPAN: tl.constexpr):
    """The scale of each stretch of `SPAN` weights of a row (which lies in one block of 64)."""
    inside = (o[:, None] < outs) & (group[None, :] < ins // SPAN)
    place = (o[:, None] * (ins // SPAN) + group[None, :]) // (_BLOCK // SPAN)
    return tl.load(absmax_ptr + place, mask=inside, other=0.0)


@triton.jit
def _place(offsets_ptr, rows, n_tiles, E, GROUPED: tl.constexpr, EXPERTS: tl.constexpr,
           BLOCK_P: tl.constexpr, SWIZZLE: tl.constexpr):  # fmt: skip
    """Which tile a program makes: expert, its rows' start and end, row tile, column tile."""
    tile = tl.program_id(0)
    expert, start, stop = 0, 0, rows
    if GROUPED:
        e = tl.arange(0, EXPERTS)
        starts = tl.load(offsets_ptr + e, mask=e < E, other=0)
        stops = tl.load(offsets_ptr + e + 1, mask=e < E, other=0)
        ends = tl.cumsum((stops - starts + BLOCK_P - 1) // BLOCK_P * n_tiles, 0)
        expert = tl.sum((ends <= tile).to(tl.int32), 0)
        tile -= tl.max(tl.where(ends <= tile, ends, 0), 0)
        start = tl.load(offsets_ptr + expert)
        stop = tl.load(offsets_ptr + expert + 1)
    p_tiles = tl.cdiv(stop - start, BLOCK_P)
    # Column by column through SWIZZLE tiles of rows: what these share fits the cache.
    width = SWIZZLE * n_tiles
    first = tile // width * SWIZZLE
    height = tl.minimum(p_tiles - first, SWIZZLE)
    p_tile = first + tile % width % height
    n_tile = tile % width // height
    return expert, start, stop, p_tile, n_tile


@triton.jit
def _rows(x_row, k, K, EVEN_K: tl.constexpr):
    """A tile of the left operand."""
    if EVEN_K:
        x = tl.load(x_row + k[None, :])
    else:
        x = tl.load(x_row + k[None, :], mask=k[None, :] < K, other=0.0)
    return x


@triton.jit
def _words(codes_ptr, o, word, outs, ins, SPAN: tl.constexpr, EVEN: tl.constexpr):
    """A tile of codes, eight a word."""
    # Put like this, the compiler sees that rows of words are aligned.
    row_words = ins // SPAN * (SPAN // 8)
    at = codes_ptr + o[:, None] * row_words + word[None, :]
    if EVEN:
        words = tl.load(at)
    else:
        words = tl.load(at, mask=(o[:, None] < outs) & (word[None, :] < row_words), other=0)
    return words


@triton.jit
def _product(
    x_ptr, codes_ptr, absmax_ptr, levels_ptr, offsets_ptr, y_ptr,
    rows, outs, ins, E, x_stride, y_stride, codes_stride, absmax_stride, bucket,
    GRADIENT: tl.constexpr, GROUPED: tl.constexpr, EXPERTS: tl.constexpr, WORDS: tl.constexpr,
    INTERPRET: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SWIZZLE: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One tile of `x @ W^T`, or with `GRADIENT` of `x @ W`.

    `bucket` is about how many rows an expert has: the tiles are tuned for it.
    """
    N = ins if GRADIENT else outs
    K = outs if GRADIENT else ins
    # What a tile of weights has of each, and how it moves on.
    ROWS: tl.constexpr = BLOCK_K if GRADIENT else BLOCK_N
    COLUMNS: tl.constexpr = BLOCK_N if GRADIENT else BLOCK_K
    ROW_STEP: tl.constexpr = BLOCK_K if GRADIENT else 0
    COLUMN_STEP: tl.constexpr = 0 if GRADIENT else BLOCK_K

    expert, start, stop, p_tile, n_tile = _place(
        offsets_ptr, rows, tl.cdiv(N, BLOCK_N), E, GROUPED, EXPERTS, BLOCK_P, SWIZZLE
    )
    if GROUPED:
        codes_ptr += expert.to(tl.int64) * codes_stride
        absmax_ptr += expert.to(tl.int64) * absmax_stride
    p = start + p_tile * BLOCK_P + tl.arange(0, BLOCK_P)
    n = n_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    # Rows beyond the last are the last one again, and aren't stored: reads need no mask.
    x_row = x_ptr + tl.minimum(p, stop - 1).to(tl.int64)[:, None] * x_stride
    o_first = 0 if GRADIENT else n_tile * BLOCK_N
    i_first = n_tile * BLOCK_N if GRADIENT else 0
    o = o_first + tl.arange(0, ROWS)
    if WORDS:
        word = i_first // 8 + tl.arange(0, COLUMNS // 8)
        group = i_first // SPAN + tl.arange(0, COLUMNS // SPAN)
        scale = _scales(absmax_ptr, o, group, outs, ins, SPAN)
    else:
        i = i_first + tl.arange(0, COLUMNS)

    acc = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
    for _ in range(tl.cdiv(K, BLOCK_K)):
        x = _rows(x_row, k, K, EVEN_K)
        if WORDS:
            words = _words(codes_ptr, o, word, outs, ins, SPAN, EVEN_N and EVEN_K)
            word += COLUMN_STEP // 8
            group += COLUMN_STEP // SPAN
            next_scale = _scales(absmax_ptr, o + ROW_STEP, group, outs, ins, SPAN)
            w = _decode_words(words, scale, levels_ptr, INTERPRET)
            scale = next_scale
        else:
            w = _decode_each(codes_ptr, absmax_ptr, levels_ptr, o, i, outs, ins, x.dtype, INTERPRET)
            i += COLUMN_STEP
        k += BLOCK_K
        o += ROW_STEP
        if not GRADIENT:
            w = tl.trans(w)
        if INTERPRET:
            x, w = x.to(tl.float32), w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")

    y = y_ptr + p.to(tl.int64)[:, None] * y_stride + n[None, :]
    inside = (p[:, None] < stop) & (n[None, :] < N)
    tl.store(y, _rounded(acc, y_ptr.dtype.element_ty, INTERPRET), mask=inside)


@triton.jit
def _decode(
    codes_ptr, absmax_ptr, levels_ptr, out_ptr, n, codes_stride, absmax_stride, out_stride,
    WHOLE: tl.constexpr, BLOCKS: tl.constexpr, INTERPRET: tl.constexpr,
):  # fmt: skip
    """`BLOCKS` blocks of 64 weights of one expert; `WHOLE` if the last block is whole."""
    expert = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    HALF: tl.constexpr = _BLOCK // 2
    at = block[:, None] * HALF + tl.arange(0, HALF)[None, :]
    to = block[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    there = block < tl.cdiv(n, _BLOCK)
    # A mask that is the same for a whole block lets its bytes be read and written together.
    read = there[:, None] if WHOLE else at < (n + 1) // 2
    write = there[:, None] if WHOLE else to < n
    packed = tl.load(codes_ptr + expert * codes_stride + at, mask=read, other=0).to(tl.int32)
    scale = tl.load(absmax_ptr + expert * absmax_stride + block, mask=there, other=0.0)
    first = tl.load(levels_ptr + (packed >> 4))
    second = tl.load(levels_ptr + (packed & 15))
    weights = tl.interleave(first, second) * scale.to(tl.float32)[:, None]
    weights = _rounded(weights, out_ptr.dtype.element_ty, INTERPRET)
    tl.store(out_ptr + expert * out_stride + to, weights, mask=write)


def _span(in_features: int, columns: int) -> int:
    """The longest stretches of a row that lie within one block, whatever the row."""
    return min(math.gcd(in_features, NF4_BLOCK), columns)


_measured_shapes = triton.heuristics(
    {
        "EVEN_N": lambda a: (a["ins"] if a["GRADIENT"] else a["outs"]) % a["BLOCK_N"] == 0,
        "EVEN_K": lambda a: (a["outs"] if a["GRADIENT"] else a["ins"]) % a["BLOCK_K"] == 0,
        "SPAN": lambda a: _span(a["ins"], a["BLOCK_N"] if a["GRADIENT"] else a["BLOCK_K"]),
    }
)(_product)


@dataclass(frozen=True)
class Tiles:
    """What a program makes and how.

    Args:
        rows, columns, depth: of the output's tile, and how much is summed at a time.
        swizzle: how many tiles of rows share a pass over the columns.
        warps, stages: threads / 32, and how many tiles of operands are on their way.
    """

    rows: int
    columns: int
    depth: int
    swizzle: int = 8
    warps: int = 4
    stages: int = 3

    @property
    def config(self) -> Any:
        return triton.Config(
            {
                "BLOCK_P": self.rows,
                "BLOCK_N": self.columns,
                "BLOCK_K": self.depth,
                "SWIZZLE": self.swizzle,
            },
            num_warps=self.warps,
            num_stages=self.stages,
        )


#: What the tuner chooses from. Decoding costs the same for any number of rows, so tiles of many
#: rows are best where there are many.
CANDIDATES = (
    Tiles(256, 128, 64, warps=8, stages=3),
    Tiles(256, 64, 64, warps=8, stages=4),
    Tiles(128, 256, 64, warps=8, stages=3),
    Tiles(128, 128, 64, warps=8, stages=3),
    Tiles(128, 128, 64, warps=4, stages=4),
    Tiles(128, 64, 64, warps=4, stages=4),
    Tiles(64, 128, 64, warps=4, stages=4),
    Tiles(64, 64, 128, warps=4, stages=3),
    Tiles(32, 128, 64, warps=4, stages=4),
    Tiles(16, 128, 128, warps=4, stages=4),
)
#: For fp32, and for shapes that no released model has: right, and not tuned.
_PLAIN_TILES = Tiles(32, 64, 32, stages=2)
#: The interpreter takes about a millisecond for a step of a tile, whatever its size.
_INTERPRETED_TILES = Tiles(64, 64, 64)


def _fitting(configs: Sequence[Any], arguments: dict[str, Any], **_: Any) -> list[Any]:
    """Tiles neither higher than an expert's rows, nor so low that weights are decoded over and
    over."""
    bucket = arguments["bucket"]
    lowest, highest = min(bucket, 128) // 2, max(bucket, 16)
    return [c for c in configs if lowest <= c.kwargs["BLOCK_P"] <= highest]


_tuned = triton.autotune(
    configs=[tiles.config for tiles in CANDIDATES],
    # E and the exact rows change with every step and hardly matter.
    key=["outs", "ins", "bucket", "GRADIENT", "GROUPED"],
    prune_configs_by={"early_config_prune": _fitting},
    cache_results=True,
)(_measured_shapes)


def product(
    x: Tensor,
    weight: Nf4,
    groups: Groups | None,
    out: Tensor,
    *,
    gradient: bool,
    tiles: Tiles | None = None,
) -> None:
    """`x @ W^T` into `out`, or with `gradient` `x @ W`.

    Args:
        x: bf16 or fp32, `[P, I]` (with `gradient` `[P, O]`), its rows contiguous.
        groups: each expert's rows, for a stack of experts; None for a single matrix.
        out: of the type of `x`, its rows contiguous.
        tiles: instead of those that are measured to be the fastest, once for each shape.
    """
    words = _in_words(x, weight)
    if tiles is None and INTERPRETED:
        tiles = _INTERPRETED_TILES
    elif tiles is None and not words:
        tiles = _PLAIN_TILES
    counts = groups.counts if groups is not None else (x.shape[0],)
    if not any(counts):
        return
    columns = weight.in_features if gradient else weight.out_features
    experts = weight.num_experts or 1

    def grid(meta: dict[str, Any]) -> tuple[int]:
        row_tiles = sum(triton.cdiv(count, meta["BLOCK_P"]) for count in counts)
        return (row_tiles * triton.cdiv(columns, meta["BLOCK_N"]),)

    kernel, options = _tuned, {}
    if tiles is not None:
        config = tiles.config
        kernel = _measured_shapes
        options = {
            **config.kwargs,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
        }
    kernel[grid](
        x,
        weight.codes.view(torch.int32) if words else weight.codes,
        weight.absmax,
        levels(x.device),
        groups.offsets if groups is not None else weight.absmax,
        out,
        x.shape[0],
        weight.out_features,
        weight.in_features,
        experts,
        x.stride(0),
        out.stride(0),
        weight.codes.stride(0) // (4 if words else 1) if groups is not None else 0,
        weight.absmax.stride(0) if groups is not None else 0,
        _bucket(counts),
        GRADIENT=gradient,
        GROUPED=groups is not None,
        EXPERTS=max(2, triton.next_power_of_2(experts)),
        WORDS=words,
        INTERPRET=INTERPRETED,
        **options,
    )


def _in_words(x: Tensor, weight: Nf4) -> bool:
    """Whether the weights can be decoded eight at a time."""
    codes = weight.codes
    return (
        x.dtype == torch.bfloat16
        and weight.in_features % 8 == 0
        and codes.storage_offset() % 4 == 0
        and codes.data_ptr() % 4 == 0
        and (codes.dim() == 1 or codes.stride(0) % 4 == 0)
    )


def _bucket(counts: Sequence[int]) -> int:
    """The rows of an expert that has any, as a power of two from 16 to 1,024."""
    mean = sum(counts) // sum(count > 0 for count in counts)
    return min(max(1 << (mean - 1).bit_length(), 16), 1024)


def decode(weight: Nf4, out: Tensor) -> None:
    """All weights into `out`, contiguous, `[O, I]` or `[E, O, I]`, of any float type."""
    n = weight.out_features * weight.in_features
    experts, blocks = weight.num_experts, 128
    if not out.numel():
        return
    _decode[(triton.cdiv(n, blocks * NF4_BLOCK), experts or 1)](
        weight.codes,
        weight.absmax,
        levels(weight.device),
        out,
        n,
        weight.codes.stride(0) if experts is not None else 0,
        weight.absmax.stride(0) if experts is not None else 0,
        n,
        WHOLE=n % NF4_BLOCK == 0,
        BLOCKS=blocks,
        INTERPRET=INTERPRETED,
        num_warps=8,
    )
