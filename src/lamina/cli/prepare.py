"""`lamina prepare`: a checkpoint in, a store of quantized weights out."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lamina.cli.terminal import byte_progress
from lamina.errors import UsageError

__all__ = ["prepare"]


def prepare(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder with a checkpoint, a name on the hub, or the name of a recipe.",
        ),
    ],
    codec: Annotated[
        str | None,
        typer.Option("--codec", metavar="CODEC", help="nf4, int8 or bf16. As in recipes, nf4."),
    ] = None,
    store: Annotated[
        Path | None,
        typer.Option(
            "--store",
            metavar="FOLDER",
            help="Where to put it. Otherwise in $LAMINA_HOME or ~/.cache/lamina.",
        ),
    ] = None,
    discard_source: Annotated[
        bool,
        typer.Option(
            "--discard-source",
            help="Delete each file downloaded from the hub as soon as it is in the store: the disk "
            "holds the store and one file.",
        ),
    ] = False,
) -> None:
    """Turn a checkpoint into a store that tuning streams from. Goes on where it was interrupted.

    A model on the hub is downloaded and converted one file at a time. Weights may be bf16, fp16,
    fp32, FP8 with scales, or NF4 by bitsandbytes, whose codes are kept.

    Prints the store's folder.
    """
    from lamina.recipe.load import load_recipe, recipe_names
    from lamina.recipe.schema import Recipe, choices

    if model in recipe_names():
        recipe = load_recipe(model)
        model = recipe.model
        codec = codec or recipe.codec
        store = store or (Path(recipe.store) if recipe.store else None)
    codec = codec or Recipe.model_fields["codec"].default
    if codec not in choices("codec"):
        raise UsageError(
            f"--codec {codec}: there is no such codec",
            hint=f"There are: {', '.join(choices('codec'))}.",
        )
    from lamina.engine.prepare import prepare as run_prepare

    with byte_progress(f"preparing {model}") as progress:
        prepared = run_prepare(
            model, codec=codec, store=store, discard_source=discard_source, progress=progress
        )
    sys.stdout.write(f"{prepared.path}\n")
