"""The work of one visit of a block: what is multiplied, moved, decoded.

Counted from the engine's own code, operation by operation, in the convention of the design:
forward, the recompute that no gradient can do without, gradients of activations, LoRA; frozen
weights have no gradients. The rates that turn it into seconds are the machine's.

Elementwise work is counted in *passes*: bytes read or written once over a tensor. The constants
below say how many passes over which tensor the code makes; none is fitted.

H = hidden size, A = query heads, K = key/value heads, D = head dimension, I = intermediate size,
R = rank.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from functools import lru_cache

from lamina.lora.targets import matches, matches_experts
from lamina.plan.hardware import Hardware
from lamina.plan.shapes import BlockShape, Matrix, ModelShape

__all__ = [
    "KERNELS",
    "NORM_BYTES",
    "BlockWork",
    "Setting",
    "Work",
    "adapted",
    "block_work",
    "expert_adapted",
    "expert_rows",
    "head_work",
    "kernel_shapes",
    "kernels_kept",
    "seconds",
    "trains",
]

#: A root-mean-square norm with its fp32 copies, forward and backward: bytes an element.
NORM_BYTES, _NORM_BACK_BYTES = 36, 50
#: Tokens of a block of queries in the attention core on CPU.
_QUERY_BLOCK = 64
#: The head's softmax in fp32 and back: bytes a logit.
_SOFTMAX = 44
#: The attention core's products have a side of 64 or 128, and reach this share of large ones' rate.
_CORE_SHARE = 0.65
#: An expert's rows are filled up to multiples of this (`lora/experts.py`).
_ROWS = 64
#: oneDNN compiles a kernel for each shape of a product, which takes so many seconds, and keeps so
#: many of them (`engine/__init__.py` sets the number).
_COMPILE, KERNELS = 3e-4, 512
#: Seconds that an operation takes however small it is: on CPU the threads' meeting, on CUDA the
#: launch, which runs ahead of the device and so only counts where the device would be faster.
_CPU_CALL, _CUDA_CALL = 6e-6, 6e-6
#: Calls that taking a unit from the stream and decoding it comes to.
_TAKE = 25


@dataclass(frozen=True, slots=True)
class Work:
    """An amount of work.

    Args:
        matrix, attention, lora: floating-point operations of frozen matrices, of the attention
            core and of adapters.
        elementwise: bytes.
        decode: quantized weights.
        calls: operations, whatever their size.
        compiles: kernels that are no longer there when they are needed again.
    """

    matrix: float = 0.0
    attention: float = 0.0
    lora: float = 0.0
    elementwise: float = 0.0
    decode: float = 0.0
    calls: float = 0.0
    compiles: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.matrix + other.matrix,
            self.attention + other.attention,
            self.lora + other.lora,
            self.elementwise + other.elementwise,
            self.decode + other.decode,
            self.calls + other.calls,
            self.compiles + other.compiles,
        )

    def __mul__(self, factor: float) -> Work:
        return Work(
            self.matrix * factor,
            self.attention * factor,
            self.lora * factor,
            self.elementwise * factor,
            self.decode * factor,
            self.calls * factor,
            self.compiles * factor,
        )


@dataclass(frozen=True, slots=True)
class Setting:
    """What of a recipe and of its data the work depends on.

    Args:
        targets: adapted modules, as the recipe names them.
        item: bytes of the compute type.
        length: tokens of a sequence.
        blocked: the attention core of a CPU, in blocks of queries.
        float8: boundaries are kept as fp8.
    """

    targets: tuple[str, ...]
    r: int
    train_router: bool
    quantized: bool
    item: int
    length: int
    group_tokens: int
    blocked: bool
    float8: bool = False


@dataclass(frozen=True, slots=True)
class BlockWork:
    """A block's work in one direction.

    Args:
        token: of its dense part, a token.
        row: of one routed expert, a token that goes to it.
        group: of its dense part whatever the tokens, for each group of them.
        part: of one routed expert, for each part of its rows; `compiles` are all of its products.
        unit, expert: whatever the tokens: decoding of the dense unit, and of one expert.
    """

    token: Work = Work()
    row: Work = Work()
    group: Work = Work()
    part: Work = Work()
    unit: Work = Work()
    expert: Work = Work()


def adapted(matrix: Matrix, targets: tuple[str, ...]) -> bool:
    """Whether a matrix of the dense part is adapted."""
    return matches(matrix.module, targets)


def expert_adapted(matrix: Matrix, targets: tuple[str, ...]) -> bool:
    """Whether a projection of the routed experts is."""
    experts, _, projection = matrix.module.rpartition(".")
    return matches_experts(experts, projection, targets)


def trains(block: BlockShape, setting: Setting) -> bool:
    """Whether a block has something to train."""
    if any(adapted(matrix, setting.targets) for matrix in block.matrices):
        return True
    if block.experts is None:
        return False
    return setting.train_router or any(
        expert_adapted(matrix, setting.targets)
        for matrix in (block.experts.gate_up, block.experts.down)
    )


@dataclass(frozen=True, slots=True)
class _Product:
    """A matrix product of a block, and whether it is adapted."""

    out: int
    in_: int
    skipped: bool
    lora: bool

    @classmethod
    def of(cls, matrix: Matrix, lora: bool) -> _Product:
        return cls(matrix.out, matrix.in_, matrix.feeds_residual, lora)


@dataclass(frozen=True, slots=True)
class _Alike:
    """What blocks have in common whose work is the same."""

    kind: str
    products: tuple[_Product, ...]
    experts: int
    gate_up: _Product | None
    down: _Product | None
    chunk: int | None


def block_work(
    shape: ModelShape,
    block: BlockShape,
    setting: Setting,
    *,
    backward: bool,
    input_grad: bool = True,
) -> BlockWork:
    """The work of a block's visit in one direction.

    Args:
        input_grad: whether a backward needs the gradient of the block's input.
    """
    targets, experts = setting.targets, block.experts
    alike = _Alike(
        block.kind,
        tuple(_Product.of(m, adapted(m, targets)) for m in block.matrices),
        experts.count if experts else 0,
        _Product.of(experts.gate_up, expert_adapted(experts.gate_up, targets)) if experts else None,
        _Product.of(experts.down, expert_adapted(experts.down, targets)) if experts else None,
        block.chunk,
    )
    return _block_work(shape, alike, setting, backward, input_grad)


@lru_cache(maxsize=256)
def _block_work(
    shape: ModelShape, block: _Alike, setting: Setting, backward: bool, input_grad: bool
) -> BlockWork:
    norms = 2 if block.kind == "moe" else 1
    weights = sum(p.out * p.in_ for p in block.products)
    unit = Work(decode=weights * setting.quantized, calls=_TAKE)
    token = _dense_passes(shape, block, setting, backward)
    group = Work(calls=(60 if backward else 30) * norms)
    for product in block.products:
        once, each = _product(product, setting.r, backward, input_grad)
        token, group = token + once, group + each
    if block.kind == "attention":
        core, calls = _core(shape, block, setting, backward)
        token, group = token + core, group + calls
    if block.gate_up is None or block.down is None:
        return BlockWork(token=token, group=group, unit=unit)
    router = 2.0 * block.experts * shape.hidden
    token += Work(matrix=router * ((3 + setting.train_router) if backward else 1))
    row, part = _expert(shape, block.gate_up, block.down, setting, backward)
    expert = sum(p.out * p.in_ for p in (block.gate_up, block.down))
    return BlockWork(
        token, row, group, part, unit, Work(decode=expert * setting.quantized, calls=_TAKE)
    )


def _product(product: _Product, r: int, backward: bool, input_grad: bool) -> tuple[Work, Work]:
    """A dense matrix and its adapter, a token, and a group of tokens."""
    out, in_ = product.out, product.in_
    size = 2.0 * out * in_
    if not backward:
        lora = 2.0 * r * (in_ + out) * product.lora
        return Work(size, lora=lora), _casts(product, r, 1, 3)
    again = 0.0 if product.skipped else 1.0
    lora = 2.0 * r * (again * (in_ + out) + 2 * out + 2 * in_ + input_grad * in_)
    casts = _casts(product, r, again + 1 + input_grad / 2, 16)
    return Work(size * (again + input_grad), lora=lora * product.lora), casts


def _casts(product: _Product, r: int, times: float, calls: int) -> Work:
    """Factors are kept in fp32 and turned into the compute type where they are used."""
    factors = r * (product.in_ + product.out)
    return Work(elementwise=6.0 * times * factors, calls=calls) * product.lora


def _dense_passes(shape: ModelShape, block: _Alike, setting: Setting, backward: bool) -> Work:
    """Elementwise work of the dense part, a token: norm, residual, rotary embedding, gates."""
    h, item = shape.hidden, setting.item
    gated = max((p.out for p in block.products), default=0) if block.kind != "attention" else 0
    if not backward:
        passes = NORM_BYTES * h + item * (7 * h + 5 * gated)
        if block.kind == "moe":
            passes += item * 6 * h  # the experts' input and the sum, once more
    else:
        passes = (NORM_BYTES + _NORM_BACK_BYTES) * h + item * (13 * h + 15 * gated)
        if block.kind == "moe":
            passes += (
                NORM_BYTES * h + item * 8 * h
            )  # routed twice: for the experts, then for gradients
    if setting.float8:
        passes += (12 if backward else 20) * h
    return Work(elementwise=passes)


def _core(shape: ModelShape, block: _Alike, setting: Setting, backward: bool) -> tuple[Work, Work]:
    """Rotary embedding and attention itself, a token, and the calls a group makes."""
    q, kv, item = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim, setting.item
    piece = min(setting.length, block.chunk or setting.length)
    seen = (piece + min(_QUERY_BLOCK, piece) if setting.blocked else piece) / 2
    product = 2.0 * 2.0 * q * seen
    scores = shape.heads * seen * setting.blocked  # a fused kernel never writes them
    blocks = -(-piece // _QUERY_BLOCK) * setting.blocked
    if not backward:
        passes = item * (20 * q + 14 * kv + 2 * scores)
        return Work(attention=product, elementwise=passes), Work(calls=30 + 8 * blocks)
    # Each block of queries gives the keys and values a gradient of the whole piece's size.
    passes = item * (44 * q + 26 * kv + 5 * scores + 10 * kv * blocks)
    times = 3.0 if setting.blocked else 3.5
    return Work(attention=times * product, elementwise=passes), Work(calls=90 + 30 * blocks)


def _expert(
    shape: ModelShape, gate_up: _Product, down: _Product, setting: Setting, backward: bool
) -> tuple[Work, Work]:
    """One routed expert: a row, and a part of its rows."""
    h, i, item, r = shape.hidden, down.in_, setting.item, setting.r
    sizes = (2.0 * gate_up.out * gate_up.in_, 2.0 * down.out * down.in_)
    gate_up_lora = 2.0 * r * gate_up.lora
    down_lora = 2.0 * r * down.lora
    factors = r * (gate_up.out + gate_up.in_) * gate_up.lora + r * (h + i) * down.lora
    adapters = gate_up.lora + down.lora
    if not backward:
        row = Work(
            matrix=sum(sizes),
            lora=gate_up_lora * (h + gate_up.out) + down_lora * (h + i),
            elementwise=item * (7 * h + 5 * i),
        )
        return row, Work(
            elementwise=6.0 * factors, calls=14 + 5 * adapters, compiles=2 + 2 * adapters
        )
    # The down projection isn't computed again; its gradient's factors are used twice where the
    # routing weight multiplies the output.
    twice = 0 if shape.scale_input else 1
    row = Work(
        matrix=2 * sizes[0] + sizes[1],
        lora=gate_up_lora * (3 * gate_up.out + 4 * h) + down_lora * ((2 + twice) * h + 3 * i),
        elementwise=item * (9 * h + 21 * i),
    )
    # Casts, and the gradient's sum: read twice, written once, in fp32.
    elementwise = (6.0 * 2.5 + 18.0) * factors
    return row, Work(elementwise=elementwise, calls=28 + 16 * adapters, compiles=3 + 5 * adapters)


def kernels_kept() -> int:
    """How many compiled kernels are kept at once, on CPU."""
    return int(os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", KERNELS))


def kernel_shapes(shape: ModelShape, setting: Setting, tokens: int) -> tuple[int, int]:
    """The shapes of products that a step of sequences of one length meets, in dense blocks and in
    experts."""
    body, targets = shape.body, setting.targets
    kinds = {(m.out, m.in_, adapted(m, targets)) for block in body for m in block.matrices}
    dense = sum(2 + 6 * lora for _, _, lora in kinds) + 4 * -(-setting.length // _QUERY_BLOCK)
    mixtures = [block.experts for block in body if block.experts is not None]
    if not mixtures:
        return dense, 0
    one, visits = mixtures[0], len(mixtures) * mixtures[0].count
    # Few rows are taken as they are; more are filled up, in parts of at most `group_tokens`.
    mean = tokens * shape.top_k / one.count
    few = visits * (1 - math.exp(-_ROWS / mean))
    rows = _ROWS * (1 - math.exp(-few / _ROWS))
    rows += min(setting.group_tokens, mean * math.log(visits)) / _ROWS
    adapters = sum(expert_adapted(m, targets) for m in (one.gate_up, one.down))
    return dense, int(rows * (4 + 6 * adapters))


def expert_rows(tokens: float, top_k: int, experts: int) -> tuple[float, float]:
    """The rows that an expert computes, with those of zeros, and the chance that it has any.

    Routing is uneven; as a rule of thumb, an expert's tokens are distributed exponentially.
    """
    rows = tokens * top_k / experts
    # More than 64 are filled up, by half of 64 on average.
    filled = rows + _ROWS / 2 * math.exp(-_ROWS / rows)
    return filled, 1 - (1 - top_k / experts) ** tokens


def head_work(shape: ModelShape, item: int) -> tuple[Work, Work]:
    """Of the last norm, the head and its gradient: a token that carries loss, and any token."""
    h, v = shape.hidden, shape.vocab
    learned = Work(
        matrix=2 * 2.0 * h * v,
        elementwise=(NORM_BYTES + _NORM_BACK_BYTES) * h + _SOFTMAX * v + item * 8 * h,
    )
    return learned, Work(elementwise=item * 8 * h)


def seconds(work: Work, hardware: Hardware, dtype: str, r: int) -> float:
    """What work takes on a machine."""
    # Products with a side of `r` are bound by memory: their rate grows with it.
    lora = min(hardware.lora * r / 16, hardware.matrix(dtype))
    busy = (
        work.matrix / hardware.matrix(dtype)
        + work.attention / (_CORE_SHARE * hardware.matrix(dtype))
        + work.lora / lora
        + work.elementwise / hardware.elementwise
        + work.decode / hardware.decode
    )
    if hardware.device == "cuda":
        return max(busy, work.calls * _CUDA_CALL)
    return busy + work.calls * _CPU_CALL + work.compiles * _COMPILE
