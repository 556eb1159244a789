"""Weights from a store, streamed in the order that the engine walks over the blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from lamina.engine.sources import ResidentSource, Walk
from lamina.lora.experts import ExpertWeights
from lamina.models.spec import Block
from lamina.store.layout import Store, Unit
from lamina.store.stream import Loaded, Stream, StreamStats


def resident(store: Store, dtype: torch.dtype, device: torch.device) -> ResidentSource:
    """All of a store, decoded and kept in memory."""
    stream = Stream(store, ring_bytes=64 << 20, cache_bytes=0)
    dense: dict[str, dict[str, Tensor]] = {}
    experts: dict[str, list[ExpertWeights]] = {}

    def tensors(unit: Unit) -> dict[str, Tensor]:
        with stream.take(unit) as loaded:
            return {
                name: tensor.to(device, copy=True) for name, tensor in loaded.tensors(dtype).items()
            }

    with stream:
        for block in store.blocks:
            stream.schedule([block.dense, *block.experts])
            dense[block.name] = tensors(block.dense)
            experts[block.name] = [_expert(tensors(unit)) for unit in block.experts]
    return ResidentSource(dense, experts)


class StreamedSource:
    """Weights streamed from a store in the order of the step: every unit once forward, once back.

    The embedding and the head stay in memory. Experts that no token of the walk is routed to are
    skipped as soon as that is known.
    """

    def __init__(self, store: Store, stream: Stream, dtype: torch.dtype, device: torch.device):
        self.stream = stream
        self._dtype = dtype
        self._device = device
        self._store_bytes = store.total_bytes
        # Decoding into memory that was used before is several times as fast as into new memory.
        self._dense_out: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._expert_out: dict[tuple[str, tuple[int, ...]], Tensor] = {}
        self._blocks = {block.name: block for block in store.blocks}
        self._resident: dict[str, dict[str, Tensor]] = {}
        ends = [block for block in store.blocks if block.kind in ("embed", "head")]
        self._body = [block for block in store.blocks if block.kind not in ("embed", "head")]
        stream.schedule([block.dense for block in ends])
        for block in ends:
            with stream.take(block.dense) as loaded:
                self._resident[block.name] = {
                    name: tensor.to(device, copy=True)
                    for name, tensor in loaded.tensors(dtype).items()
                }
        self._announced: Walk | None = None
        self._walk: Walk = "forward"
        self._routed: set[str] = set()
        stream.take_stats()

    @property
    def store_bytes(self) -> int:
        return self._store_bytes

    def take_stats(self) -> StreamStats:
        return self.stream.take_stats()

    def routed(self, block: Block, experts: Sequence[int]) -> None:
        """The others aren't read, now and in the walk's way back, as far as they haven't been."""
        if block.name in self._routed:
            return
        self._routed.add(block.name)
        wanted = set(experts)
        idle = [unit for e, unit in enumerate(self._blocks[block.name].experts) if e not in wanted]
        if idle:
            self.stream.skip(idle, times=2 if self._walk == "step" else 1)

    def _forward_order(self) -> Iterator[Unit]:
        for block in self._body:
            yield block.dense
            yield from block.experts

    def _backward_order(self) -> Iterator[Unit]:
        for block in reversed(self._body):
            yield block.dense
            yield from reversed(block.experts)

    def begin(self, walk: Walk, *, then: Walk | None) -> None:
        if self._announced is None:
            self._schedule(walk)
        else:
            assert walk == self._announced, f"{self._announced} was announced, {walk} begins"
        self._announced = then
        self._walk = walk
        self._routed.clear()
        if then is not None:
            self._schedule(then)

    def _schedule(self, walk: Walk) -> None:
        units = list(self._forward_order())
        if walk == "step":
            units += self._backward_order()
        self.stream.schedule(units)

    @contextmanager
    def dense(self, block: Block) -> Iterator[Mapping[str, Tensor]]:
        if block.name in self._resident:
            yield self._resident[block.name]
            return
        with self.stream.take(self._blocks[block.name].dense) as loaded:
            yield self._decoded(loaded, self._dense_out)

    @contextmanager
    def expert(self, block: Block, expert: int) -> Iterator[ExpertWeights]:
        with self.stream.take(self._blocks[block.name].experts[expert]) as loaded:
            yield _expert(self._decoded(loaded, self._expert_out))

    def _decoded(
        self, loaded: Loaded, buffers: dict[tuple[str, tuple[int, ...]], Tensor]
    ) -> dict[str, Tensor]:
        """A unit's tensors, in buffers that the next unit overwrites."""
        out = {}
        for tensor in loaded.unit.tensors:
            key = (tensor.name, tensor.shape)
            if tensor.codec == "bf16" and self._dtype == torch.bfloat16:
                continue  # a view of what was read
            if key not in buffers:
                buffers[key] = torch.empty(tensor.shape, dtype=self._dtype)
            out[tensor.name] = buffers[key]
        tensors = loaded.tensors(self._dtype, out=out)
        return {name: tensor.to(self._device) for name, tensor in tensors.items()}


def _expert(tensors: Mapping[str, Tensor]) -> ExpertWeights:
    return ExpertWeights(tensors["gate_up_proj"], tensors["down_proj"])
