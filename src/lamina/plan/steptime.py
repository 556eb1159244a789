"""From a recipe's walk over the blocks to the seconds of a step, for many sizes at once.

T = tokens of a step, U = units of a step, C = candidates.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from lamina.plan.hardware import Hardware
from lamina.plan.memory import adapters, boundary_bytes
from lamina.plan.shapes import BlockShape, ModelShape
from lamina.plan.simulate import Pipeline, simulate
from lamina.plan.work import (
    BlockWork,
    Setting,
    Work,
    block_work,
    expert_rows,
    head_work,
    kernel_shapes,
    kernels_kept,
    seconds,
    trains,
)
from lamina.store.spread import spread

__all__ = ["UPDATE_BYTES", "Sizes", "StepTime", "Timing"]

#: Into how many units at least a ring is divided in the simulation.
_FINE = 32
#: Bytes that an update moves for each trained weight: the weight, its gradient (set to zero, its
#: norm, its clipping, its use) and its states.
UPDATE_BYTES = {"adamw": 8 + 20 + 16, "adamw_8bit": 8 + 20 + 4, "adamw_4bit": 8 + 20 + 2}


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a search varies, in tokens and bytes.

    Args:
        device_ring: 0 on CPU, where nothing is copied.
    """

    tokens: int
    ring: int
    cache: int
    device_ring: int = 0


@dataclass(frozen=True, slots=True)
class StepTime:
    """Where the time of an optimizer step goes, in seconds. All of it is estimated.

    Args:
        seconds: of the step.
        matrix, attention, lora, elementwise, decode: of the blocks' visits: products with frozen
            matrices, of the attention core and of adapters, work between products, decoding of
            weights.
        calls: what operations take however small they are.
        head, update: of the head with its gradient, and of the optimizer.
        reads, copies: how long the disk and the bus are busy, behind all that where it is possible.
        bytes_read: from disk.
    """

    tokens: int
    seconds: float
    matrix: float
    attention: float
    lora: float
    elementwise: float
    decode: float
    calls: float
    head: float
    update: float
    reads: float
    copies: float
    bytes_read: int

    @property
    def busy(self) -> float:
        """How long the device computes."""
        products = self.matrix + self.attention + self.lora
        return products + self.elementwise + self.decode + self.calls + self.head + self.update

    @property
    def waiting(self) -> float:
        """How long it stands waiting for weights."""
        return max(0.0, self.seconds - self.busy)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def binds(self) -> str:
        """What sets the pace: `compute`, `reads` or `copies`."""
        lanes = {"compute": self.busy, "reads": self.reads, "copies": self.copies}
        return max(lanes, key=lambda lane: lanes[lane])


@dataclass(frozen=True, slots=True)
class _Visit:
    """What a unit is there for: an amount of work that many units share."""

    work: BlockWork
    part: str  # dense, expert, or after: what is left of a mixture once its experts are done
    experts: int = 1


class Timing:
    """The time of steps of one recipe on one machine.

    Args:
        learned: the share of tokens that carry loss.
        experts_on_host: the experts' adapters lie in the host's RAM and come with their weights.
    """

    def __init__(
        self,
        shape: ModelShape,
        setting: Setting,
        hardware: Hardware,
        *,
        codec: str,
        optim: str,
        dtype: str,
        learned: float = 1.0,
        experts_on_host: bool = False,
    ):
        self.shape = shape
        self.setting = setting
        self.hardware = hardware
        self._codec = codec
        self._optim = optim
        self._dtype = dtype
        self._learned = learned
        self._experts_on_host = experts_on_host
        self._visits: dict[_Visit, int] = {}
        self._kinds: list[int] = []  # of each unit of a step, its visit
        self._places: list[int] = []  # ... and which unit of the store it is, or -1
        self._turn = 0  # where the head comes
        self._unit_bytes = shape.unit_sizes(codec)
        self._walk()
        self._kinds_U = np.array(self._kinds)
        self._places_U = np.array(self._places)
        self._cached: dict[int, NDArray[np.bool_]] = {}

    # --- the walk

    def _walk(self) -> None:
        """A forward over the body and the way back, down to the first block with an adapter."""
        body = self.shape.body
        first_unit, at = [], 1
        for block in body:
            first_unit.append(at)
            at += 1 + (block.experts.count if block.experts else 0)

        for block, unit in zip(body, first_unit, strict=True):
            work = block_work(self.shape, block, self.setting, backward=False)
            self._add(_Visit(work, "dense"), unit)
            self._add_experts(block, work, unit, 1)
        self._turn = len(self._kinds)
        first = next((i for i, b in enumerate(body) if trains(b, self.setting)), len(body))
        for place in range(len(body) - 1, first - 1, -1):
            block, unit = body[place], first_unit[place]
            work = block_work(
                self.shape, block, self.setting, backward=True, input_grad=place > first
            )
            if block.experts is None:
                self._add(_Visit(work, "dense"), unit)
                continue
            self._add(_Visit(work, "nothing"), unit)
            self._add_experts(block, work, unit, -1)
            self._add(_Visit(work, "dense"), -1)

    def _add(self, visit: _Visit, *units: int) -> None:
        kind = self._visits.setdefault(visit, len(self._visits))
        self._kinds += [kind] * len(units)
        self._places += units

    def _add_experts(self, block: BlockShape, work: BlockWork, unit: int, way: int) -> None:
        if block.experts is None:
            return
        count = block.experts.count
        self._add(_Visit(work, "expert", count), *range(unit + 1, unit + 1 + count)[::way])

    # --- work

    def _work(self, visit: _Visit, tokens: int) -> Work:
        work = visit.work
        if visit.part == "nothing":
            return Work()
        if visit.part == "dense":
            size = max(self.setting.group_tokens, self.setting.length)
            groups = -(-tokens // size)
            return work.token * tokens + work.group * groups + work.unit
        # With few tokens some experts have none, and then neither decoding nor calls.
        rows, chosen = expert_rows(tokens, self.shape.top_k, visit.experts)
        parts = math.ceil(rows / self.setting.group_tokens) * chosen
        part = replace(work.part, compiles=work.part.compiles * self._missing(tokens))
        return work.row * rows + part * parts + work.expert * chosen

    def _missing(self, tokens: int) -> float:
        """The share of experts' products whose kernel was dropped since it was last used."""
        if self.hardware.device == "cuda":
            return 0.0
        dense, experts = kernel_shapes(self.shape, self.setting, tokens)
        return max(0.0, 1 - kernels_kept() / max(1, dense + experts))

    def _seconds(self, work: Work) -> float:
        return seconds(work, self.hardware, self._dtype, self.setting.r)

    def _head(self, tokens: int) -> float:
        learned, any_ = head_work(self.shape, self.setting.item)
        return self._seconds(learned * (tokens * self._learned) + any_ * tokens)

    @cached_property
    def _update(self) -> float:
        found, each = adapters(self.shape, self.setting), UPDATE_BYTES[self._optim]
        here, rate = self.hardware, self.hardware.host
        on_device = here.elementwise if here.device == "cuda" else rate
        if self._experts_on_host:
            return found.dense * each / on_device + found.experts * each / rate
        return found.all * each / on_device

    # --- time

    def _cache(self, cache_bytes: int) -> NDArray[np.bool_]:
        """Of each unit of a step: whether it is cached."""
        if cache_bytes not in self._cached:
            chosen = np.array([*spread(self._unit_bytes, cache_bytes), True])
            self._cached[cache_bytes] = chosen[self._places_U]
        return self._cached[cache_bytes]

    def steps(self, candidates: Sequence[Sizes]) -> list[StepTime]:
        """The time of a step with each of these sizes."""
        nbytes_U = np.append(np.array(self._unit_bytes, dtype=np.float64), 0.0)[self._places_U]
        counts = np.bincount(self._kinds_U, minlength=len(self._visits))
        starts = self._starts(nbytes_U, candidates)
        cuda = self.hardware.device == "cuda"
        compute, read, copy, totals = [], [], [], []
        for sizes in candidates:
            works = [self._work(visit, sizes.tokens) for visit in self._visits]
            each_U = np.array([self._seconds(work) for work in works])[self._kinds_U]
            head = self._head(sizes.tokens)
            ends = [each_U[: self._turn], [head], each_U[self._turn :], [self._update]]
            compute.append(np.add.reduceat(np.concatenate(ends), starts))
            disk_U = np.where(self._cache(sizes.cache), 0.0, nbytes_U)
            bus_U = self._bus(nbytes_U, sizes.tokens) if cuda else np.zeros_like(nbytes_U)
            read.append(np.add.reduceat(self._with_ends(disk_U), starts))
            copy.append(np.add.reduceat(self._with_ends(bus_U), starts))
            parts = (work * int(n) for work, n in zip(works, counts, strict=True))
            total = sum(parts, Work())
            totals.append(total)
        held = np.add.reduceat(self._with_ends(nbytes_U), starts)
        pipeline = Pipeline(
            read_UC=np.stack(read, axis=1),
            copy_UC=np.stack(copy, axis=1),
            held_UC=np.stack([held] * len(candidates), axis=1),
            compute_UC=np.stack(compute, axis=1),
            ring_C=np.array([sizes.ring for sizes in candidates], dtype=np.float64),
            device_ring_C=np.array([s.device_ring for s in candidates], dtype=np.float64)
            if cuda
            else None,
            disk=self.hardware.disk,
            bus=self.hardware.bus,
        )
        lasts = simulate(pipeline)
        return [
            self._step_time(
                sizes, float(last), total, float(busy.sum()), float(r.sum()), float(c.sum())
            )
            for sizes, last, total, busy, r, c in zip(
                candidates, lasts, totals, compute, read, copy, strict=True
            )
        ]

    def _starts(
        self, nbytes_U: NDArray[np.float64], candidates: Sequence[Sizes]
    ) -> NDArray[np.intp]:
        """Where the units of the simulation begin: several experts make one where rings hold many
        of them, which is as exact and several times as fast."""
        rings = [ring for s in candidates for ring in (s.ring, s.device_ring) if ring]
        most = min(rings, default=0) / _FINE
        kinds, sizes = self._kinds_U.tolist(), nbytes_U.tolist()
        experts = [visit.part == "expert" for visit in self._visits]
        starts, held, last = [], 0.0, -1
        for i, (kind, size) in enumerate(zip(kinds, sizes, strict=True)):
            if i == self._turn:
                starts.append(i)  # the head, which comes between
            if kind == last and experts[kind] and held + size <= most and i != self._turn:
                held += size
                continue
            starts.append(i + (i >= self._turn))
            held, last = size, kind
        return np.array([*starts, len(kinds) + 1], dtype=np.intp)

    def _with_ends(self, nbytes_U: NDArray[np.float64]) -> NDArray[np.float64]:
        """With the head, between both ways, and the update, at the end: they read nothing."""
        return np.insert(nbytes_U, [self._turn, len(nbytes_U)], 0.0)

    def _bus(self, nbytes_U: NDArray[np.float64], tokens: int) -> NDArray[np.float64]:
        """Bytes that come to the device with each unit: weights, adapters, boundaries."""
        item = boundary_bytes(self.shape, self.setting) * tokens
        bus_U = nbytes_U.copy()
        parts = [visit.part for visit in self._visits]
        is_expert = np.array([part == "expert" for part in parts])[self._kinds_U]
        if self._experts_on_host:
            bus_U[is_expert] += 4 * adapters(self.shape, self.setting).expert
        back = np.arange(len(bus_U)) >= self._turn
        bus_U[back & ~is_expert & (self._places_U >= 0)] += item
        return bus_U

    def _step_time(
        self, sizes: Sizes, last: float, total: Work, busy: float, read: float, copied: float
    ) -> StepTime:
        parts = {
            "matrix": self._seconds(Work(matrix=total.matrix)),
            "attention": self._seconds(Work(attention=total.attention)),
            "lora": self._seconds(Work(lora=total.lora)),
            "elementwise": self._seconds(Work(elementwise=total.elementwise)),
            "decode": self._seconds(Work(decode=total.decode)),
            "head": self._head(sizes.tokens),
            "update": self._update,
        }
        bus = self.hardware.bus
        return StepTime(
            tokens=sizes.tokens,
            seconds=last,
            **parts,
            calls=max(0.0, busy - sum(parts.values())),
            reads=read / self.hardware.disk,
            copies=copied / bus if bus else 0.0,
            bytes_read=int(read),
        )
