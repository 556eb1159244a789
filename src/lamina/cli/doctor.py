"""`lamina doctor`: how fast this machine is, and what it can tune."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.cli.options import AsJson
from lamina.cli.terminal import note, print_json, print_table, size

if TYPE_CHECKING:
    from lamina.plan.hardware import Hardware
    from lamina.plan.plan import Plan

__all__ = ["doctor"]


def doctor(as_json: AsJson = False) -> None:
    """Measure this machine in under a minute, and say which recipes it can tune.

    Plans for this machine go by what is measured, until it is measured again.
    """
    from lamina.plan.hardware import load_measured, save_measured
    from lamina.plan.measure import measure_machine

    note("measuring; anything else that runs makes it slower")
    path = save_measured(measure_machine(lambda what: note(f"  {what}")))
    hardware = load_measured()
    assert hardware is not None, "what was just written can be read"
    plans = _plans(hardware)
    if as_json:
        print_json(_to_dict(hardware, plans, path))
        return
    sys.stdout.write(_measured(hardware))
    sys.stdout.write("\nWhat it can tune, with each recipe as it is (estimates):\n\n")
    print_table(("RECIPE", "FITS", "RAM", "GPU", "TOKENS/S"), [_row(n, p) for n, p in plans])
    sys.stdout.write("\n`lamina plan RECIPE` says more, and what would fit.\n")
    note(f"remembered in {path}")


def _plans(hardware: Hardware) -> list[tuple[str, Plan]]:
    from lamina.plan.plan import make_plan
    from lamina.plan.shapes import model_shape
    from lamina.recipe.load import load_recipe, recipe_names

    recipes = [(name, load_recipe(name)) for name in recipe_names()]
    return [(name, make_plan(recipe, model_shape(recipe), hardware)) for name, recipe in recipes]


def _row(name: str, plan: Plan) -> tuple[str, ...]:
    cuda = plan.hardware.device == "cuda"
    return (
        name,
        "yes" if plan.fits else "no",
        size(plan.ram),
        size(plan.vram) if cuda else "-",
        f"{plan.time.tokens_per_second:,.0f}" if plan.fits else "-",
    )


def _measured(here: Hardware) -> str:
    cuda = here.device == "cuda"
    lines = [
        ("machine", here.name),
        ("memory", size(here.ram) + (f", {size(here.vram)} on the GPU" if cuda else "")),
        ("disk, direct reads", f"{size(here.disk)}/s"),
        ("copies to the GPU", f"{size(here.bus)}/s" if cuda else "not measured: there is no CUDA"),
        ("matrices, bf16", f"{here.bf16 / 1e9:,.0f} GFLOP/s"),
        ("matrices, fp32", f"{here.fp32 / 1e9:,.0f} GFLOP/s"),
        ("adapters, rank 16", f"{here.lora / 1e9:,.0f} GFLOP/s"),
        ("elementwise", f"{size(here.elementwise)}/s"),
        ("NF4 decoding", f"{here.decode / 1e9:.2f} G weights/s"),
        ("adapter updates", f"{size(here.host)}/s"),
        ("measured", here.measured or ""),
    ]
    return "".join(f"{name:<20} {value}\n" for name, value in lines)


def _to_dict(hardware: Hardware, plans: list[tuple[str, Plan]], path: Path) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "hardware": asdict(hardware),
        "file": str(path),
        "recipes": [
            {
                "recipe": name,
                "fits": plan.fits,
                "ram_bytes": plan.ram,
                "vram_bytes": plan.vram,
                "estimated_tokens_per_second": plan.time.tokens_per_second,
                "problems": list(plan.problems),
            }
            for name, plan in plans
        ],
    }
