"""The plan of a run: made before anything expensive starts, and refused where it doesn't fit."""

from __future__ import annotations

from dataclasses import replace

import torch

from lamina.data.dataset import Dataset
from lamina.engine.model import Model
from lamina.errors import RecipeError
from lamina.plan.hardware import Budgets, this_machine
from lamina.plan.plan import Plan, Sequences, make_plan
from lamina.plan.search import nearest
from lamina.plan.shapes import shape_from_config
from lamina.recipe.schema import size_in_bytes


def limit_device_memory(device: torch.device, nbytes: int | None) -> None:
    """Hold this process to so much of a GPU's memory: beyond it, allocations fail."""
    if device.type == "cuda" and nbytes is not None:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / total), device)


def plan_run(model: Model, samples: Dataset) -> Plan:
    """What a run over these samples holds in memory, within what the recipe or the machine gives.

    Raises:
        RecipeError: it doesn't fit; the nearest plans that do are named.
    """
    recipe, lengths = model.recipe, samples.lengths
    on_gpu = model.device.type == "cuda"
    hardware = replace(this_machine(), device="cuda" if on_gpu else "cpu")
    budgets = Budgets.of(hardware)
    if recipe.ram is not None:
        budgets = replace(budgets, ram=size_in_bytes(recipe.ram, hardware.ram))
    if recipe.vram is not None and on_gpu:
        budgets = replace(budgets, vram=size_in_bytes(recipe.vram, hardware.vram))
    plan = make_plan(
        recipe,
        shape_from_config(recipe.model, model.store.config),
        hardware,
        budgets,
        Sequences(
            mean=round(float(lengths.mean())),
            longest=int(lengths.max()),
            learned=samples.num_loss_tokens / max(1, samples.num_tokens),
            equal=bool((lengths == lengths[0]).all()),
        ),
    )
    if not plan.fits:
        others = [variant.overrides for variant in nearest(plan)]
        raise RecipeError(
            "this run doesn't fit the memory that it may use",
            problems=plan.problems,
            hint=f"What would fit: {'; or '.join(others)}."
            if others
            else "Nothing near it would fit; `lamina plan` shows every buffer.",
        )
    return plan
