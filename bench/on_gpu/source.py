"""A source of weights that copies them from pinned host memory as the engine walks over the blocks.

Three lanes work beside each other, tied by events; the host never waits. The *copy* stream brings
units, in the order of the walk, into a ring in device memory, as far ahead as it has room. The
*decoding* stream writes a unit's matrices out in bf16, one unit ahead of the *compute* stream. Or,
with `fused`, experts stay in nf4, and their products decode them.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.engine.sources import Walk
from lamina.kernels import products
from lamina.kernels.nf4 import Nf4
from lamina.lora.experts import ExpertWeights
from lamina.models.spec import Block
from lamina.store.stream import StreamStats
from on_gpu.machine import Machine
from on_gpu.synthetic import SyntheticStore, Unit, matrix, plain


class InNf4:
    """Stands where the engine expects a matrix, and is multiplied as it is."""

    def __init__(self, weight: Nf4):
        self.weight = weight

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        x, other = args[:2]
        if func is F.linear:
            return products.linear(x, other.weight, way="fused")
        if func in (Tensor.matmul, Tensor.__matmul__, torch.matmul):
            return products.input_grad(x, other.weight, way="fused")
        raise NotImplementedError(f"{func} of a matrix in nf4")


@dataclass(eq=False)
class _Place:
    """A stretch of the ring, until what it holds has been read."""

    start: int
    nbytes: int
    released: bool = False
    read: torch.cuda.Event | None = None


class _Ring:
    """Device memory, given out round and round; what was taken first goes first."""

    def __init__(self, nbytes: int, device: torch.device):
        self.bytes = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._places: deque[_Place] = deque()
        self._next = 0
        self._reads: list[torch.cuda.Event] = []

    def take(self, nbytes: int) -> tuple[_Place, list[torch.cuda.Event]] | None:
        """A place, and what must have happened before it is written to; None if what lies there is
        still wanted."""
        start = self._next
        if start + nbytes > len(self.bytes):
            # Around the end: what lies behind the last place is older than what lies in front.
            if not self._clear(start, len(self.bytes)):
                return None
            start = 0
        if not self._clear(start, start + nbytes):
            return None
        place = _Place(start, nbytes)
        self._places.append(place)
        self._next = start + nbytes
        reads, self._reads = self._reads, []
        return place, reads

    def _clear(self, start: int, stop: int) -> bool:
        """Forget the oldest places for as long as they lie within these bounds."""
        while self._places:
            oldest = self._places[0]
            if oldest.start >= stop or oldest.start + oldest.nbytes <= start:
                return True
            if not oldest.released:
                return False
            if oldest.read is not None:
                self._reads.append(oldest.read)
            self._places.popleft()
        return True


@dataclass(eq=False)
class _Room:
    """Device memory for one unit in bf16."""

    flat: Tensor
    taken: bool = False
    read: torch.cuda.Event | None = None


@dataclass(eq=False)
class _Visit:
    """A unit on its way: copied once `place` is set, decoded once `tensors` are."""

    unit: Unit
    place: _Place | None = None
    copied: torch.cuda.Event | None = None
    tensors: dict[str, Tensor] = field(default_factory=dict)
    room: _Room | None = None
    decoded: torch.cuda.Event | None = None


class PinnedSource:
    """Weights of a `SyntheticStore`, as `lamina.engine.sources.WeightSource` gives them.

    Args:
        ring_bytes: how much in nf4 is on the device at once.
        fused: experts stay in nf4.
    """

    def __init__(self, store: SyntheticStore, machine: Machine, *, ring_bytes: int, fused: bool):
        self._store = store
        self._machine = machine
        self._fused = fused
        largest = max(unit.nbytes for unit in store.units)
        if ring_bytes < 3 * largest:
            raise ValueError(f"a ring of {ring_bytes} bytes, where a unit takes {largest}")
        self._ring = _Ring(ring_bytes, machine.device)
        self._rooms = {
            False: self._new_rooms(list(store.dense.values())),
            True: [] if fused else self._new_rooms([units[0] for units in store.experts.values()]),
        }
        self._ends = store.ends(machine.device)
        self._body = [block for block in store.family.blocks if block.name not in self._ends]
        self._pending: deque[_Visit] = deque()
        self._ahead: deque[_Visit] = deque()
        self._announced: Walk | None = None
        self._stats = StreamStats()
        self._waits: list[tuple[Any, Any]] = []
        # The other streams may write at once where the one that computes has just been given room.
        machine.synchronize()

    def _new_rooms(self, units: list[Unit]) -> list[_Room]:
        numel = max(sum(_numel(t.shape) for t in unit.layout.tensors) for unit in units)
        return [
            _Room(torch.empty(numel, dtype=torch.bfloat16, device=self._machine.device))
            for _ in range(2)
        ]

    # --- what the engine asks for

    @property
    def store_bytes(self) -> int:
        return self._store.total_bytes

    def take_stats(self) -> StreamStats:
        """`seconds_waited` is how long the compute stream stood waiting for weights."""
        self._machine.synchronize()
        stats, self._stats = self._stats, StreamStats()
        for start, stop in self._waits:
            stats.seconds_waited += start.elapsed_time(stop) / 1e3
        self._waits.clear()
        return stats

    def begin(self, walk: Walk, *, then: Walk | None) -> None:
        if self._announced is None:
            self._schedule(walk)
        self._announced = then
        if then is not None:
            self._schedule(then)
        self._copy_ahead()

    def routed(self, block: Block, experts: Sequence[int]) -> None:
        """The block's other experts are not copied, as far as they aren't on their way yet."""
        wanted = set(experts)
        for queue in (self._ahead, self._pending):
            kept = []
            # Up to the next dense part: where the walk turns, it is the same block's again.
            while queue and queue[0].unit.expert is not None:
                visit = queue.popleft()
                if visit.unit.expert in wanted:
                    kept.append(visit)
                elif visit.place is not None:
                    visit.place.released = True
            more = bool(queue)
            queue.extendleft(reversed(kept))
            if more:  # the block ends in this queue
                break
        self._copy_ahead()
        self._decode_next()

    @contextmanager
    def dense(self, block: Block) -> Iterator[Mapping[str, Tensor]]:
        if block.name in self._ends:
            yield self._ends[block.name]
            return
        visit = self._take(self._store.dense[block.name])
        yield visit.tensors
        self._leave(visit)

    @contextmanager
    def expert(self, block: Block, expert: int) -> Iterator[ExpertWeights]:
        visit = self._take(self._store.experts[block.name][expert])
        if self._fused:
            assert visit.place is not None
            held = self._ring.bytes[visit.place.start : visit.place.start + visit.unit.nbytes]
            made: dict[str, Any] = {
                t.name: InNf4(matrix(held, t)) for t in visit.unit.layout.tensors
            }
        else:
            made = visit.tensors
        yield ExpertWeights(cast(Tensor, made["gate_up_proj"]), cast(Tensor, made["down_proj"]))
        self._leave(visit)

    # --- the lanes

    def _schedule(self, walk: Walk) -> None:
        for block in self._body:
            self._append(block, reverse=False)
        if walk == "step":
            for block in reversed(self._body):
                self._append(block, reverse=True)

    def _append(self, block: Block, *, reverse: bool) -> None:
        experts = self._store.experts.get(block.name, [])
        units = [self._store.dense[block.name], *(reversed(experts) if reverse else experts)]
        self._pending.extend(_Visit(unit) for unit in units)

    def _copy_ahead(self) -> None:
        """Start the copies that the ring has room for."""
        machine = self._machine
        while self._pending:
            unit = self._pending[0].unit
            taken = self._ring.take(unit.nbytes)
            if taken is None:
                return
            visit = self._pending.popleft()
            visit.place, reads = taken
            for event in reads:
                machine.wait(event, machine.copies)
            with machine.on(machine.copies):
                to = self._ring.bytes[visit.place.start : visit.place.start + unit.nbytes]
                to.copy_(unit.host, non_blocking=True)
            visit.copied = machine.record(machine.copies)
            self._stats.bytes_read += unit.nbytes
            self._stats.units_read += 1
            self._ahead.append(visit)

    def _stays_encoded(self, unit: Unit) -> bool:
        return self._fused and unit.expert is not None

    def _take(self, unit: Unit) -> _Visit:
        started = time.monotonic()
        while True:
            if not self._ahead:
                self._copy_ahead()
            visit = self._ahead.popleft()
            if visit.unit is unit:
                break
            self._skip(visit)
        if not self._stays_encoded(unit) and visit.room is None:
            self._decode(visit)
        before = self._machine.record(timed=True)
        self._machine.wait(visit.decoded or visit.copied)
        if before is not None:
            self._waits.append((before, self._machine.record(timed=True)))
        else:
            self._stats.seconds_waited += time.monotonic() - started
        self._stats.units_taken += 1
        if unit.expert is not None or not self._store.experts.get(unit.block):
            self._decode_next()  # behind a mixture's dense part, routing decides what is next
        return visit

    def _skip(self, visit: _Visit) -> None:
        assert visit.place is not None
        visit.place.released = True
        if visit.room is not None:
            visit.room.taken = False

    def _leave(self, visit: _Visit) -> None:
        event = self._machine.record()
        if visit.room is not None:
            visit.room.taken, visit.room.read = False, event
        else:
            assert visit.place is not None
            visit.place.released, visit.place.read = True, event
        self._copy_ahead()

    def _decode_next(self) -> None:
        """Decode what is taken next, if it is on its way and there is room for it."""
        if not self._ahead:
            return
        visit = self._ahead[0]
        rooms = self._rooms[visit.unit.expert is not None]
        if visit.room is None and any(not room.taken for room in rooms):
            self._decode(visit)

    def _decode(self, visit: _Visit) -> None:
        """Write a unit out in bf16; then its place in the ring is free."""
        machine = self._machine
        assert visit.place is not None
        room = next(r for r in self._rooms[visit.unit.expert is not None] if not r.taken)
        room.taken, visit.room = True, room
        machine.wait(room.read, machine.decoding)
        machine.wait(visit.copied, machine.decoding)
        held = self._ring.bytes[visit.place.start : visit.place.start + visit.unit.nbytes]
        at = 0
        with machine.on(machine.decoding):
            for tensor in visit.unit.layout.tensors:
                numel = _numel(tensor.shape)
                out = room.flat[at : at + numel].view(tensor.shape)
                at += numel
                if tensor.codec == "nf4":
                    products.dequantize(matrix(held, tensor), out)
                else:
                    out.copy_(plain(held, tensor))
                visit.tensors[tensor.name] = out
        visit.decoded = machine.record(machine.decoding)
        visit.place.released, visit.place.read = True, visit.decoded


def _numel(shape: Sequence[int]) -> int:
    return torch.Size(shape).numel()
