"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "Adapter",
    "AsJson",
    "MaxNewTokens",
    "Overrides",
    "Recipe",
    "RunOrModel",
    "Seed",
    "System",
    "Temperature",
    "TopP",
    "TrainingData",
    "complete_names",
]


def complete_names(incomplete: str) -> list[str]:
    """Recipes, for the shell's completion."""
    from lamina.recipe.load import recipe_names

    return [name for name in recipe_names() if name.startswith(incomplete)]


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Recipe = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="A recipe of the library (`lamina recipes ls`), or a YAML file.",
        autocompletion=complete_names,
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Keys of the recipe with other values."),
]
TrainingData = Annotated[
    list[Path] | None,
    typer.Option("--data", metavar="FILE", help="What to train on. May be given again."),
]
RunOrModel = Annotated[
    str, typer.Argument(metavar="RUN", help="The folder of a run, or a model without an adapter.")
]
Adapter = Annotated[
    bool, typer.Option("--adapter/--no-adapter", help="With what was learned, or without.")
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", metavar="N", min=1, help="Where an answer is cut off.")
]
Temperature = Annotated[
    float,
    typer.Option("--temperature", metavar="T", min=0.0, help="0: always the likeliest token."),
]
TopP = Annotated[
    float,
    typer.Option(
        "--top-p",
        metavar="P",
        min=0.0,
        max=1.0,
        help="Draw from the likeliest tokens of this share in all.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", metavar="N", min=0, help="The seed of what is drawn.")]
System = Annotated[str | None, typer.Option("--system", metavar="TEXT", help="A system prompt.")]
