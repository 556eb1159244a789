"""`lamina plan`: what a run takes and how long, before anything is downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lamina.cli import options
from lamina.cli.inputs import data_problems, require
from lamina.cli.terminal import print_json
from lamina.errors import LaminaError, UsageError

if TYPE_CHECKING:
    from lamina.data.template import Renderer
    from lamina.plan.hardware import Hardware
    from lamina.plan.sample import DataSize
    from lamina.recipe.schema import Recipe

__all__ = ["plan"]


def plan(
    recipe: options.Recipe,
    overrides: options.Overrides = None,
    data: options.TrainingData = None,
    gpu: Annotated[
        str | None,
        typer.Option("--gpu", metavar="NAME", help="A card, e.g. 'RTX 4090'; or cpu."),
    ] = None,
    vram: Annotated[
        str | None, typer.Option("--vram", metavar="SIZE", help="Its memory: 24, or 24GiB.")
    ] = None,
    ram: Annotated[
        str | None, typer.Option("--ram", metavar="SIZE", help="The machine's: 128, or 128GiB.")
    ] = None,
    disk_gbps: Annotated[
        float | None,
        typer.Option("--disk-gbps", metavar="N", min=0.01, help="Direct reads, GB a second."),
    ] = None,
    price_kwh: Annotated[
        float, typer.Option("--price-kwh", metavar="P", min=0.0, help="Of electricity.")
    ] = 0.30,
    price_hour: Annotated[
        float | None,
        typer.Option("--price-hour", metavar="P", min=0.0, help="Of the machine, if rented."),
    ] = None,
    watts: Annotated[
        float | None,
        typer.Option("--watts", metavar="N", min=1.0, help="What the machine draws at work."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Say what a run will take: memory by buffer, time, cost. Downloads nothing.

    For this machine, as `lamina doctor` measured it, or for one described by --gpu, --vram, --ram
    and --disk-gbps. Every time is an estimate. Exits with 1 if the run doesn't fit.

    For example: lamina plan maverick-24gb --gpu 'RTX 4090' --ram 128 --disk-gbps 7
    """
    from lamina.plan.plan import make_plan
    from lamina.plan.run import Prices, estimate_run
    from lamina.plan.shapes import model_shape
    from lamina.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    shape = model_shape(loaded)
    machine = _machine(gpu, vram, ram, disk_gbps)
    size = _data(data or [Path(file) for file in loaded.data or ()], loaded)
    made = make_plan(loaded, shape, machine, sequences=size.sequences if size else None)
    prices = Prices(price_kwh, price_hour, watts or machine.watts)
    run = estimate_run(made, size, prices) if size else None

    from lamina.cli.plan_report import as_dict, report

    here = gpu is None and vram is None
    if as_json:
        print_json(as_dict(made, run))
    else:
        report(Path(recipe).stem, made, run, prices, here=here)
    if not made.fits:
        raise typer.Exit(1)


def _machine(gpu: str | None, vram: str | None, ram: str | None, disk: float | None) -> Hardware:
    """The machine that the options describe; this one where they say nothing.

    Raises:
        UsageError: a size is none, the card isn't known, or memory is given for no card.
    """
    from dataclasses import replace

    from lamina.plan.cards import find_card
    from lamina.plan.hardware import described_machine, memory_of_this_machine, this_machine

    vram_bytes, ram_bytes = _size("--vram", vram), _size("--ram", ram)
    if gpu is not None:
        card = None if gpu.lower() == "cpu" else find_card(gpu)
        machine = described_machine(card, ram=ram_bytes or memory_of_this_machine())
    else:
        machine = this_machine()
        machine = replace(machine, ram=ram_bytes or machine.ram)
    if vram_bytes is not None:
        if machine.device == "cpu":
            raise UsageError(
                f"--vram {vram}: there is no card to have that memory",
                hint="Add --gpu NAME: rates depend on the card, e.g. --gpu 'RTX 4090'.",
            )
        machine = replace(machine, vram=vram_bytes)
    if disk is not None:
        machine = replace(machine, disk=disk * 1e9, disk_measured=True)
    return machine


def _size(option: str, text: str | None) -> int | None:
    """Bytes; a number alone is GiB, as memory is sold.

    Raises:
        UsageError: it is no size.
    """
    from lamina.recipe.schema import size_in_bytes

    if text is None:
        return None
    try:
        bare = text.replace(".", "", 1).isdigit()
        nbytes = size_in_bytes(f"{text}GiB" if bare else text)
    except ValueError:
        nbytes = 0
    if nbytes <= 0:
        raise UsageError(f"{option} {text}: must be a size such as 24, 24GiB or 800MB")
    return nbytes


def _data(files: list[Path], recipe: Recipe) -> DataSize | None:
    """The size of the data, with the model's tokenizer if it is on this machine.

    Raises:
        DataError: a file can't be read, or no row of it can be used.
    """
    if not files:
        return None
    require(data_problems(files), "the plan")
    # A plan downloads nothing, not even a tokenizer. Read when the hub's library is imported.
    os.environ["HF_HUB_OFFLINE"] = "1"
    from lamina.plan.sample import measure_data

    return measure_data(files, recipe, _renderer(recipe))


def _renderer(recipe: Recipe) -> Renderer | None:
    """What tokenizes the recipe's data, if that is on this machine."""
    from lamina.engine.renderer import load_renderer
    from lamina.recipe.places import home, store_folder

    folders = [
        store_folder(recipe.model, recipe.codec, recipe.store),
        Path(recipe.model).expanduser(),
        home() / "models" / recipe.model,
    ]
    files = ("tokenizer.json", "tokenizer_config.json")
    there = [folder for folder in folders if any((folder / file).is_file() for file in files)]
    try:
        return load_renderer(there[0] if there else recipe.model, mask=recipe.mask)
    except LaminaError:
        return None
