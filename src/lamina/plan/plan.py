"""`Plan`: what a run takes and how long it takes, from a recipe, a model's shape and a machine.

The plan is the authority on memory: it names every buffer, and says what doesn't fit. It is a plain
value; nothing is allocated, downloaded or imported to make it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from lamina.errors import RecipeError
from lamina.plan.hardware import Budgets, Hardware
from lamina.plan.memory import (
    Adapters,
    Buffer,
    adapters,
    fixed_buffers,
    step_buffers,
    weight_buffers,
)
from lamina.plan.shapes import ModelShape
from lamina.plan.steptime import Sizes, StepTime, Timing
from lamina.plan.work import Setting, trains
from lamina.recipe.schema import Recipe, size_in_bytes

__all__ = ["Memory", "Plan", "Sequences", "make_plan", "memory_of", "timing_of"]


@dataclass(frozen=True, slots=True)
class Sequences:
    """What is known of the data's sequences.

    Args:
        mean, longest: tokens.
        learned: the share of tokens that carry loss.
        equal: all are of one length.
    """

    mean: int
    longest: int
    learned: float = 1.0
    equal: bool = False

    @classmethod
    def unknown(cls, recipe: Recipe) -> Sequences:
        """Without data: as long as the recipe allows, and all of it learned, which takes most."""
        return cls(recipe.max_length, recipe.max_length)


@dataclass(frozen=True)
class Plan:
    """What a run of a recipe takes on a machine.

    Args:
        ring, device_ring, cache: bytes of weights read ahead (on the host; on the device, 0 on
            CPU), and of weights kept for good.
        experts_on_host: adapters, gradients and states of routed experts lie in the host's RAM.
        buffers: all memory that the run holds, by name and place.
        time: of a step, estimated; of a plan that doesn't fit, as if it did.
    """

    recipe: Recipe
    shape: ModelShape
    hardware: Hardware
    budgets: Budgets
    sequences: Sequences
    ring: int
    device_ring: int
    cache: int
    experts_on_host: bool
    trained: Adapters
    buffers: tuple[Buffer, ...]
    time: StepTime

    @property
    def tokens_per_step(self) -> int:
        return self.recipe.tokens_per_step

    @property
    def group_tokens(self) -> int:
        return self.recipe.group_tokens

    @property
    def logits_bytes(self) -> int:
        """What a chunk of the head's logits may take."""
        return size_in_bytes(self.recipe.logits, self.store_bytes)

    @property
    def store_bytes(self) -> int:
        """What reading every weight once reads."""
        return self.shape.store_bytes(self.recipe.codec)

    @property
    def ram(self) -> int:
        """Bytes of the host's memory."""
        return sum(buffer.nbytes for buffer in self.buffers if buffer.place == "ram")

    @property
    def vram(self) -> int:
        """Bytes of the device's memory; 0 on CPU."""
        return sum(buffer.nbytes for buffer in self.buffers if buffer.place == "vram")

    @property
    def fits(self) -> bool:
        return not self.problems

    @property
    def problems(self) -> tuple[str, ...]:
        """Why it doesn't fit, one sentence a kind of memory."""
        found = []
        for name, needed, given in (
            ("RAM", self.ram, self.budgets.ram),
            ("GPU memory", self.vram, self.budgets.vram),
        ):
            if given is not None and needed > given:
                place = "ram" if name == "RAM" else "vram"
                held = [buffer for buffer in self.buffers if buffer.place == place]
                largest = max(held, key=lambda buffer: buffer.nbytes)
                found.append(
                    f"{name}: {needed / 1e9:.1f} GB are needed and {given / 1e9:.1f} GB may be "
                    f"used; the largest part is {largest.name} with {largest.nbytes / 1e9:.1f} GB."
                )
        return tuple(found)

    def buffer(self, name: str) -> Buffer:
        """The buffer of that name.

        Raises:
            KeyError: there is none.
        """
        for buffer in self.buffers:
            if buffer.name == name:
                return buffer
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        time, here = self.time, self.hardware
        return {
            "model": self.recipe.model,
            "parameters": self.shape.parameters,
            "trained_parameters": self.trained.all,
            "device": here.device,
            "hardware": here.name,
            "measured": here.measured,
            "fits": self.fits,
            "problems": list(self.problems),
            "ram_bytes": self.ram,
            "ram_budget_bytes": self.budgets.ram,
            "vram_bytes": self.vram,
            "vram_budget_bytes": self.budgets.vram,
            "buffers": [
                {"name": b.name, "place": b.place, "bytes": b.nbytes, "what": b.what}
                for b in self.buffers
            ],
            "tokens_per_step": self.tokens_per_step,
            "estimated": {
                "tokens_per_second": time.tokens_per_second,
                "step_seconds": time.seconds,
                "busy_seconds": time.busy,
                "waiting_seconds": time.waiting,
                "reads_seconds": time.reads,
                "copies_seconds": time.copies,
                "parts_seconds": {
                    part: getattr(time, part)
                    for part in (
                        *("matrix", "attention", "lora", "elementwise", "decode"),
                        *("calls", "head", "update"),
                    )
                },
                "binds": time.binds,
                "store_bytes_read": time.bytes_read,
            },
            "store_bytes": self.store_bytes,
        }


def _setting(recipe: Recipe, hardware: Hardware, sequences: Sequences) -> Setting:
    targets = recipe.target_modules
    bf16 = recipe.dtype == "bfloat16"
    return Setting(
        targets=(targets,) if isinstance(targets, str) else tuple(targets),
        r=recipe.r,
        train_router=recipe.train_router,
        quantized=recipe.codec != "bf16" or not bf16,
        item=2 if bf16 else 4,
        length=min(sequences.mean, recipe.max_length),
        group_tokens=recipe.group_tokens,
        blocked=hardware.device == "cpu",
        float8=recipe.float8_boundaries,
    )


def timing_of(plan: Plan) -> Timing:
    """The time of a plan's steps with other sizes."""
    return _timing(
        plan.recipe,
        plan.shape,
        plan.hardware,
        plan.sequences,
        plan.experts_on_host,
    )


def _timing(
    recipe: Recipe,
    shape: ModelShape,
    hardware: Hardware,
    sequences: Sequences,
    experts_on_host: bool,
) -> Timing:
    return Timing(
        shape,
        _setting(recipe, hardware, sequences),
        hardware,
        codec=recipe.codec,
        optim=recipe.optim,
        dtype=recipe.dtype,
        learned=sequences.learned,
        experts_on_host=experts_on_host,
    )


@dataclass(frozen=True)
class Memory:
    """The memory of a recipe on a machine: a plan without its time."""

    buffers: tuple[Buffer, ...]
    ring: int
    device_ring: int
    cache: int
    experts_on_host: bool

    def fits(self, budgets: Budgets) -> bool:
        ram = sum(buffer.nbytes for buffer in self.buffers if buffer.place == "ram")
        vram = sum(buffer.nbytes for buffer in self.buffers if buffer.place == "vram")
        return ram <= budgets.ram and (budgets.vram is None or vram <= budgets.vram)


def memory_of(
    recipe: Recipe,
    shape: ModelShape,
    hardware: Hardware,
    budgets: Budgets,
    sequences: Sequences,
) -> Memory:
    """Every buffer. On CUDA, adapters of experts go to the host where the card has no room for
    them, and the device's ring takes what is left, up to the host's ring."""
    setting, cuda = _setting(recipe, hardware, sequences), hardware.device == "cuda"
    store = shape.store_bytes(recipe.codec)
    ring, cache = size_in_bytes(recipe.ring, store), size_in_bytes(recipe.cache, store)
    largest = shape.largest_unit(recipe.codec)
    cache = min(cache, store)
    both = [
        *fixed_buffers(shape, cuda=cuda, item=setting.item),
        *step_buffers(
            shape,
            setting,
            tokens=recipe.tokens_per_step,
            longest=min(sequences.longest, recipe.max_length),
            equal_lengths=sequences.equal,
            logits_bytes=size_in_bytes(recipe.logits, store),
            cuda=cuda,
        ),
        Buffer("ring", "ram", max(ring, largest), "weights read ahead"),
        Buffer("cache", "ram", cache, "weights kept from one use to the next"),
    ]

    def with_adapters(experts_on_host: bool) -> list[Buffer]:
        added = weight_buffers(
            shape, setting, optim=recipe.optim, cuda=cuda, experts_on_host=experts_on_host
        )
        return [*both, *added]

    def left(buffers: Sequence[Buffer]) -> int:
        assert budgets.vram is not None
        return budgets.vram - sum(b.nbytes for b in buffers if b.place == "vram")

    buffers, on_host, device_ring = with_adapters(False), False, 0
    if cuda:
        least = 2 * largest
        if adapters(shape, setting).experts and left(buffers) < least:
            buffers, on_host = with_adapters(True), True
        device_ring = max(least, min(ring, left(buffers)))
        what = "weights on their way to be decoded"
        buffers.append(Buffer("device ring", "vram", device_ring, what))
    return Memory(tuple(buffers), ring, device_ring, cache, on_host)


def make_plan(
    recipe: Recipe,
    shape: ModelShape,
    hardware: Hardware,
    budgets: Budgets | None = None,
    sequences: Sequences | None = None,
) -> Plan:
    """Plan a run.

    Args:
        budgets: what it may take; None for what the machine has, but for its system.
        sequences: what is known of the data; None for the most that the recipe allows.

    Raises:
        RecipeError: `target_modules` names nothing in the model.
    """
    budgets = budgets or Budgets.of(hardware)
    sequences = sequences or Sequences.unknown(recipe)
    setting = _setting(recipe, hardware, sequences)
    _check_targets(shape, setting)
    memory = memory_of(recipe, shape, hardware, budgets, sequences)
    timing = _timing(recipe, shape, hardware, sequences, memory.experts_on_host)
    sizes = Sizes(recipe.tokens_per_step, memory.ring, memory.cache, memory.device_ring)
    return Plan(
        recipe=recipe,
        shape=shape,
        hardware=hardware,
        budgets=budgets,
        sequences=sequences,
        ring=memory.ring,
        device_ring=memory.device_ring,
        cache=memory.cache,
        experts_on_host=memory.experts_on_host,
        trained=adapters(shape, setting),
        buffers=memory.buffers,
        time=timing.steps([sizes])[0],
    )


def _check_targets(shape: ModelShape, setting: Setting) -> None:
    def hits(target: str) -> bool:
        alone = replace(setting, targets=(target,), train_router=False)
        return any(trains(block, alone) for block in shape.blocks)

    problems = [
        f"target_modules: {target!r} matches nothing in this model"
        for target in setting.targets
        if not hits(target)
    ]
    if problems:
        names = sorted(
            {m.module.rpartition(".")[2] for block in shape.blocks for m in block.matrices}
        )
        raise RecipeError(
            "target_modules names what the model doesn't have",
            problems=problems,
            hint=f"This model knows {', '.join(names)}, experts.gate_up_proj, experts.down_proj, "
            "experts, all-linear.",
        )
