"""Stores of random weights in host memory, laid out as the real ones are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lamina.engine.sources import ResidentSource
from lamina.kernels.nf4 import Nf4, reference_dequantize
from lamina.lora.experts import ExpertWeights
from lamina.models.common import Family
from lamina.store.pieces import StoredTensor, UnitLayout, plan_blocks
from on_gpu.machine import Machine, Slab


@dataclass(frozen=True, eq=False)
class Unit:
    """What one copy brings: a block's dense part (expert None) or one expert."""

    block: str
    expert: int | None
    layout: UnitLayout
    host: Tensor

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes


def matrix(unit_bytes: Tensor, tensor: StoredTensor) -> Nf4:
    """A matrix of a unit, as a view of its bytes."""
    codes, absmax = (unit_bytes[p.start : p.start + p.nbytes] for p in tensor.pieces)
    out_features, in_features = tensor.shape
    return Nf4(codes, absmax.view(torch.bfloat16), out_features, in_features)


def plain(unit_bytes: Tensor, tensor: StoredTensor) -> Tensor:
    (piece,) = tensor.pieces
    flat = unit_bytes[piece.start : piece.start + piece.nbytes]
    return flat.view(torch.bfloat16).view(tensor.shape)


class SyntheticStore:
    """Random weights of a model's exact layout, in host memory.

    Args:
        distinct: how many mixture blocks have experts of their own; the others share theirs.
    """

    def __init__(self, family: Family, machine: Machine, distinct: int):
        layouts = {layout.name: layout for layout in plan_blocks(family.blocks, "nf4")}
        self.family, self.distinct = family, distinct
        self.dense: dict[str, Unit] = {}
        self.experts: dict[str, list[Unit]] = {}
        body = [block for block in family.blocks if block.kind not in ("embed", "head")]
        sizes = [layouts[block.name].dense.nbytes for block in body]
        stack = self.stack_bytes(family)
        self._slab = Slab(sum(sizes) + stack * distinct, machine)
        at = stack * distinct
        mixtures = 0
        for block, size in zip(body, sizes, strict=True):
            layout = layouts[block.name]
            self.dense[block.name] = Unit(block.name, None, layout.dense, self._slab.part(at, size))
            at += size
            if layout.experts is not None:
                first, one = mixtures % distinct * stack, layout.experts
                self.experts[block.name] = [
                    Unit(block.name, e, one, self._slab.part(first + e * one.nbytes, one.nbytes))
                    for e in range(layout.num_experts)
                ]
                mixtures += 1
        self._fill(machine)

    @staticmethod
    def stack_bytes(family: Family) -> int:
        """The experts of one mixture block."""
        layouts = [layout for layout in plan_blocks(family.blocks, "nf4") if layout.experts]
        return layouts[0].num_experts * layouts[0].experts.nbytes  # type: ignore[union-attr]

    @property
    def units(self) -> list[Unit]:
        return [
            *self.dense.values(),
            *(unit for experts in self.experts.values() for unit in experts),
        ]

    @property
    def total_bytes(self) -> int:
        """What reading every weight once reads: a shared one counts each time."""
        return sum(unit.nbytes for unit in self.units)

    @property
    def held_bytes(self) -> int:
        return len(self._slab.bytes)

    def close(self) -> None:
        self.dense.clear()
        self.experts.clear()
        self._slab.close()

    def _fill(self, machine: Machine) -> None:
        """Any codes, with scales that keep activations near one. Made on the device, which is
        hundreds of times as fast."""
        generator = torch.Generator(machine.device).manual_seed(0)
        done: set[int] = set()
        for unit in self.units:
            if unit.host.data_ptr() in done:
                continue
            done.add(unit.host.data_ptr())
            made = torch.empty(unit.nbytes, dtype=torch.uint8, device=machine.device)
            made.random_(0, 256, generator=generator)
            for tensor in unit.layout.tensors:
                if tensor.codec == "nf4":
                    # The levels' mean square is about 1/4 for codes drawn alike.
                    scale = matrix(made, tensor).absmax.uniform_(0.5, 1.5, generator=generator)
                    scale.mul_(2 / tensor.shape[1] ** 0.5)
                elif len(tensor.shape) == 1:
                    plain(made, tensor).fill_(1)
                else:
                    router = plain(made, tensor)
                    router.normal_(0, tensor.shape[1] ** -0.5, generator=generator)
            unit.host.copy_(made)
        machine.synchronize()

    def ends(self, device: torch.device) -> dict[str, dict[str, Tensor]]:
        """The embedding and the head, which stay on the device."""
        generator = torch.Generator(device).manual_seed(1)
        ends: dict[str, dict[str, Tensor]] = {}
        for block in (self.family.blocks[0], self.family.blocks[-1]):
            ends[block.name] = {}
            for tensor in block.plain:
                made = torch.empty(tensor.shape, dtype=torch.bfloat16, device=device)
                if len(tensor.shape) == 1:
                    ends[block.name][tensor.name] = made.fill_(1)
                else:
                    std = 1.0 if block.kind == "embed" else tensor.shape[1] ** -0.5
                    ends[block.name][tensor.name] = made.normal_(0, std, generator=generator)
        return ends

    def resident(self, device: torch.device, dtype: torch.dtype) -> ResidentSource:
        """All of it decoded by the reference, for small models."""

        def tensors(unit: Unit) -> dict[str, Tensor]:
            return {
                t.name: reference_dequantize(matrix(unit.host, t), dtype).to(device)
                if t.codec == "nf4"
                else plain(unit.host, t).to(device, dtype)
                for t in unit.layout.tensors
            }

        dense = {name: tensors(unit) for name, unit in self.dense.items()}
        for name, ends in self.ends(device).items():
            dense[name] = {key: tensor.to(dtype) for key, tensor in ends.items()}
        experts = {
            name: [
                ExpertWeights(made["gate_up_proj"], made["down_proj"])
                for made in map(tensors, units)
            ]
            for name, units in self.experts.items()
        }
        return ResidentSource(dense, experts)
