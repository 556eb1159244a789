"""Every buffer of a run: its name, its bytes, and where it lies.

What lies where: a stage of the step that is there for all tokens (boundaries) or that outgrows a
card (adapters of all experts, their gradients and states) can lie in the host's RAM; what a block's
visit works with lies on the device. On CPU all of it is RAM.

T = tokens of the step, H = hidden size, A = query heads, D = head dimension, I = intermediate size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from lamina.plan.shapes import BlockShape, ExpertsShape, ModelShape
from lamina.plan.work import Setting, adapted, expert_adapted, kernel_shapes, kernels_kept

__all__ = [
    "Adapters",
    "Buffer",
    "adapters",
    "boundary_bytes",
    "fixed_buffers",
    "state_bytes",
    "step_buffers",
    "weight_buffers",
]

Place = Literal["vram", "ram"]

#: Python, torch, transformers and what they load, before the first weight.
_LIBRARIES = 440_000_000
#: The context, code and libraries of CUDA on the device; and the same on the host's side.
_CUDA_CONTEXT, _CUDA_HOST = 900 << 20, 1500 << 20
#: A kernel that oneDNN compiled for a shape of a product.
_KERNEL = 700_000
#: Those that were dropped for others leave holes, of which so many aren't filled again.
_HOLES = 0.5
#: What the C library's allocator keeps of temporaries once they are freed, in widths of the widest
#: visit. It hands back what is larger than its threshold, so no more than a few of these stay.
_KEPT, _KEPT_MOST = 2, 4 * (32 << 20)
#: Bytes of a weight's optimizer states: two moments, and a scale for each block of them.
_STATES = {"adamw": 8.0, "adamw_8bit": 2 * (1 + 4 / 256), "adamw_4bit": 2 * (0.5 + 4 / 128)}


@dataclass(frozen=True, slots=True)
class Buffer:
    """A piece of memory that a run holds.

    Args:
        what: what lies in it, for a person.
    """

    name: str
    place: Place
    nbytes: int
    what: str


def boundary_bytes(shape: ModelShape, setting: Setting) -> int:
    """Bytes of a block's input, a token: in the compute type, or as float8 with a scale."""
    return shape.hidden + 4 if setting.float8 else shape.hidden * setting.item


@dataclass(frozen=True, slots=True)
class Adapters:
    """How many weights are trained.

    Args:
        dense: of norm-to-norm matrices and routers.
        experts: of routed experts.
        expert: of the routed expert that has most.
    """

    dense: int
    experts: int
    expert: int

    @property
    def all(self) -> int:
        return self.dense + self.experts


@lru_cache(maxsize=256)
def adapters(shape: ModelShape, setting: Setting) -> Adapters:
    """The trained weights of a model."""
    dense = experts = most = 0
    for block in shape.blocks:
        dense += sum(
            setting.r * (m.out + m.in_) for m in block.matrices if adapted(m, setting.targets)
        )
        if block.experts is None:
            continue
        one = sum(
            setting.r * (m.out + m.in_)
            for m in (block.experts.gate_up, block.experts.down)
            if expert_adapted(m, setting.targets)
        )
        experts += one * block.experts.count
        most = max(most, one)
        if setting.train_router:
            dense += block.experts.count * block.experts.hidden
    return Adapters(dense, experts, most)


def state_bytes(weights: int, optim: str) -> int:
    """What an optimizer keeps for so many weights."""
    return int(weights * _STATES[optim])


def fixed_buffers(shape: ModelShape, *, cuda: bool, item: int) -> list[Buffer]:
    """What doesn't depend on the batch: libraries, embedding and head."""
    libraries = "Python and libraries, before any weight"
    buffers = [Buffer("libraries", "ram", _CUDA_HOST if cuda else _LIBRARIES, libraries)]
    table = shape.vocab * shape.hidden * item
    if cuda:
        context = Buffer("CUDA", "vram", _CUDA_CONTEXT, "its context, code and libraries")
        buffers.append(context)
    if shape.tied:
        what = "embedding, which is the head too"
        return [*buffers, Buffer("embedding", "vram" if cuda else "ram", table, what)]
    # Only rows of the embedding are taken, so it can stay with the host.
    return [
        *buffers,
        Buffer("embedding", "ram", table, "one row of it a token"),
        Buffer("head", "vram" if cuda else "ram", table, "last norm and head"),
    ]


def weight_buffers(
    shape: ModelShape, setting: Setting, *, optim: str, cuda: bool, experts_on_host: bool
) -> list[Buffer]:
    """Adapters with all that belongs to them, and the memory that weights are decoded into."""
    device: Place = "vram" if cuda else "ram"
    found = adapters(shape, setting)
    parts = [("", found.dense, device)]
    if experts_on_host:
        parts.append((" of experts", found.experts, "ram"))
    else:
        parts = [("", found.all, device)]
    buffers = []
    for suffix, count, place in parts:
        if count:
            said = f"{count:,} trained weights"
            buffers += [
                Buffer(f"adapter{suffix}", place, 4 * count, f"{said}, fp32"),
                Buffer(f"gradients{suffix}", place, 4 * count, "of the adapter, fp32"),
                Buffer(
                    f"optimizer{suffix}", place, state_bytes(count, optim), f"states of {optim}"
                ),
            ]
    if experts_on_host and found.expert:
        what = "two experts', on their way"
        buffers.append(Buffer("adapter in use", device, 2 * 8 * found.expert, what))
    if decoded := _decoded(shape, setting, cuda):
        what = "those of a block and an expert, in use"
        buffers.append(Buffer("decoded weights", device, decoded, what))
    return buffers


@lru_cache(maxsize=256)
def _decoded(shape: ModelShape, setting: Setting, cuda: bool) -> int:
    """Buffers by name and shape that the next unit overwrites; two of each on CUDA, so that
    decoding and multiplying overlap."""
    if not setting.quantized:
        return 0
    dense: dict[tuple[str, int, int], int] = {}
    experts: dict[tuple[int, int], int] = {}
    for block in shape.body:
        for matrix in block.matrices:
            name = matrix.module.rpartition(".layers.")[2].partition(".")[2]
            dense[name, matrix.out, matrix.in_] = matrix.weights
        if block.experts is not None:
            for matrix in (block.experts.gate_up, block.experts.down):
                experts[matrix.out, matrix.in_] = matrix.weights
    weights = sum(dense.values()) + sum(experts.values())
    return weights * setting.item * (2 if cuda else 1)


def step_buffers(
    shape: ModelShape,
    setting: Setting,
    *,
    tokens: int,
    longest: int,
    equal_lengths: bool,
    logits_bytes: int,
    cuda: bool,
) -> list[Buffer]:
    """What a step of `tokens` tokens holds while it runs.

    Args:
        longest: tokens of the longest sequence, which goes through attention at once.
        equal_lengths: all sequences are of one length, so that shapes repeat.
    """
    device: Place = "vram" if cuda else "ram"
    mixtures = [block for block in shape.body if block.experts is not None]
    kept = len(shape.body) * boundary_bytes(shape, setting) * tokens
    hidden = tokens * shape.hidden * setting.item
    group = min(tokens, max(setting.group_tokens, longest))
    widest, what = _workspace(shape, setting, group, tokens, logits_bytes)
    chosen = tokens * shape.top_k
    buffers = [
        Buffer("boundaries", "ram", kept, f"{len(shape.body)} blocks' inputs, for the way back"),
        Buffer(
            "hidden states",
            device,
            hidden * (6 if cuda else 4),
            "of all tokens, in and out of a block",
        ),
        Buffer(
            "routing",
            device,
            8 * chosen * len(mixtures) + 48 * chosen,
            "where the forward sent its tokens",
        ),
        Buffer("workspace", device, widest, f"the widest visit: {what}"),
    ]
    if not cuda:
        most = kernels_kept()
        # Sequences of many lengths bring ever new shapes.
        met = sum(kernel_shapes(shape, setting, tokens)) if equal_lengths else 2 * most
        dropped = min(max(0, met - most), most)
        count = min(met, most) + int(_HOLES * dropped)
        kept = min(_KEPT * widest, _KEPT_MOST)
        buffers += [
            Buffer("kernels", "ram", count * _KERNEL, "products, compiled for each shape"),
            Buffer("allocator", "ram", kept, "freed temporaries that the C library keeps"),
        ]
    return buffers


def _workspace(
    shape: ModelShape, setting: Setting, group: int, tokens: int, logits_bytes: int
) -> tuple[int, str]:
    """The largest of what blocks work with, and whose it is."""
    visits = [(logits_bytes, "the head's logits")]
    for block in {block.kind: block for block in shape.body}.values():
        if block.kind == "attention":
            visits.append((group * _attention(shape, setting, block), "attention"))
            continue
        width = max((m.out for m in block.matrices), default=0)
        each = setting.item * (14 * shape.hidden + 9 * width)
        visits.append((group * each, "a dense feed-forward" if block.kind == "mlp" else "routing"))
        if block.experts is not None:
            rows = _expert_rows(block.experts, shape, setting, tokens)
            each = setting.item * (5 * shape.hidden + 9 * block.experts.intermediate)
            visits.append((rows * each, "an expert"))
    return max(visits)


def _attention(shape: ModelShape, setting: Setting, block: BlockShape) -> int:
    """A token's share of attention's backward, what autograd keeps included."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    piece = min(setting.length, block.chunk or setting.length)
    scores = int(1.2 * shape.heads * (piece + 64) / 2) if setting.blocked else 0
    return setting.item * (12 * shape.hidden + 10 * q + 10 * kv + scores)


def _expert_rows(experts: ExpertsShape, shape: ModelShape, setting: Setting, tokens: int) -> int:
    """Rows that go through an expert at once: its tokens, twice the mean being common, in parts."""
    return min(setting.group_tokens, 64 + 2 * tokens * shape.top_k // experts.count)
