"""`lamina recipes`: the recipes that come along."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lamina.cli.options import AsJson, complete_names
from lamina.cli.terminal import note, print_json, print_table

__all__ = ["app"]

app = typer.Typer(help="The recipes that come along: list, explain, copy.", no_args_is_help=True)


Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="A recipe of the library, or a file.", autocompletion=complete_names
    ),
]


@app.command("ls")
def ls(as_json: AsJson = False) -> None:
    """List the recipes."""
    from lamina.recipe.load import list_recipes

    recipes = list_recipes()
    if as_json:
        print_json([asdict(recipe) for recipe in recipes])
    else:
        rows = [(recipe.name, recipe.status, recipe.description) for recipe in recipes]
        print_table(("RECIPE", "STATUS", "DESCRIPTION"), rows)


@app.command()
def show(name: Name, as_json: AsJson = False) -> None:
    """Print every key of a recipe, with its value and what it means."""
    from lamina.recipe.load import explain_recipe, load_recipe

    recipe = load_recipe(name)
    if as_json:
        print_json(recipe.model_dump())
    else:
        sys.stdout.write(explain_recipe(recipe))


@app.command()
def copy(
    name: Name, file: Annotated[Path, typer.Argument(metavar="FILE", help="Must not exist.")]
) -> None:
    """Copy a recipe to a file of your own, to change it."""
    from lamina.recipe.load import copy_recipe

    copy_recipe(name, file)
    note(f"{file}: written; `lamina tune {file} --data FILE` uses it")
