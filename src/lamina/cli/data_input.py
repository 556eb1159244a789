"""What the `lamina data` commands take: files, and how to understand them."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamina.cli.inputs import data_problems
from lamina.cli.options import complete_names
from lamina.cli.terminal import console
from lamina.errors import DataError, UsageError

if TYPE_CHECKING:
    from lamina.data.formats import Input
    from lamina.recipe.schema import Recipe

__all__ = [
    "Columns",
    "Files",
    "Force",
    "Format",
    "MaskPolicy",
    "MaxLength",
    "ModelName",
    "RecipeName",
    "TextRowsName",
    "TooLongPolicy",
    "complete_formats",
    "no_such_choice",
    "open_input",
    "row_progress",
]


def complete_formats(incomplete: str) -> list[str]:
    """For the shell's completion."""
    from lamina.data.shapes import SHAPES

    return [shape.name for shape in SHAPES if shape.name.startswith(incomplete)]


def _complete_masks(incomplete: str) -> list[str]:
    from lamina.data.chat.pieces import MASKS

    return [mask for mask in MASKS if mask.startswith(incomplete)]


Files = Annotated[
    list[str],
    typer.Argument(
        metavar="FILE",
        show_default=False,
        help="Data files, patterns such as 'part-*.jsonl', folders saved with save_to_disk, or "
        "datasets on the hub (owner/name, owner/name:config@split).",
    ),
]
Format = Annotated[
    str | None,
    typer.Option(
        "--format",
        metavar="NAME",
        help="The format of all rows, where it shouldn't be found row by row.",
        autocompletion=complete_formats,
    ),
]
Columns = Annotated[
    list[str] | None,
    typer.Option(
        "--map",
        metavar="NAME=COLUMN,...",
        help="What columns are called here: question=Frage,answer=Antwort. May be given again.",
    ),
]
TextRowsName = Annotated[
    str | None,
    typer.Option(
        "--text-rows",
        metavar="WHAT",
        help="What a row of a plain text file is: document, paragraph or line. Without it, what "
        "a recipe says, or document.",
    ),
]
ModelName = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODEL",
        help="Whose tokenizer and chat template: a recipe, the folder of a store, a checkpoint or "
        "a run, or a name on the hub.",
        autocompletion=complete_names,
    ),
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        "--recipe",
        metavar="NAME",
        help="A recipe, for all it says of data: model, limits, mask, format, columns.",
        autocompletion=complete_names,
    ),
]
MaskPolicy = Annotated[
    str | None,
    typer.Option(
        "--mask",
        metavar="POLICY",
        help="What is learned: assistant, last, flagged or all. Without it, what the recipe says, "
        "or assistant.",
        autocompletion=_complete_masks,
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        "--max-length",
        metavar="N",
        min=2,
        help="The most tokens a row may have, instead of the recipe's.",
    ),
]
TooLongPolicy = Annotated[
    str | None,
    typer.Option(
        "--too-long",
        metavar="POLICY",
        help="What happens to longer rows: drop, truncate or split. Without it, what the recipe "
        "says, or drop.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Write over files that exist.")]


# -- data -----------------------------------------------------------------------------------------


def open_input(
    files: Sequence[str],
    format: str | None = None,
    columns: Sequence[str] | None = None,
    text_rows: str | None = None,
    recipe: Recipe | None = None,
) -> Input:
    """The data that a command was given.

    Args:
        recipe: says what the other options don't.

    Raises:
        UsageError: an option has a value that it can't have.
        DataError: a file isn't there, or can't be data.
    """
    from typing import get_args

    from lamina.data.formats import Input
    from lamina.data.readers import TextRows

    _tell_unprintable_names()
    if text_rows is not None and text_rows not in get_args(TextRows):
        raise no_such_choice("--text-rows", text_rows, get_args(TextRows))
    if format is not None:
        from lamina.data.shapes import SHAPES

        if format not in (names := [shape.name for shape in SHAPES]):
            raise no_such_choice("--format", format, names)
    mapped = parse_columns(columns or ())
    if recipe is not None:
        format, mapped = format or recipe.data_format, mapped or recipe.data_columns or {}
        text_rows = text_rows or recipe.text_rows
    if problems := data_problems(files):
        raise DataError("the data can't be read", problems=problems)
    return Input(files, shape=format, columns=mapped, text_rows=text_rows)  # type: ignore[arg-type]


def parse_columns(given: Sequence[str]) -> dict[str, str]:
    """`question=Frage,answer=Antwort` as a mapping. A comma may be in a column's name, where no
    `name=` follows it.

    Raises:
        UsageError: it doesn't look like that, or says one thing twice.
    """
    from lamina.data.formats import ALIASES

    columns: dict[str, str] = {}
    for text in given:
        for pair in re.split(r",(?=\w+=)", text):
            name, equals, column = pair.partition("=")
            name = ALIASES.get(name.strip(), name.strip())
            if not equals or not name or not column:
                raise UsageError(
                    f"--map {text}: {pair!r} is not NAME=COLUMN",
                    hint="For instance --map question=Frage,answer=Antwort, where 'Frage' and "
                    "'Antwort' are columns of the file.",
                )
            if name in columns:
                raise UsageError(f"--map: two columns are mapped to {name!r}")
            columns[name] = column
    return columns


def _tell_unprintable_names() -> None:
    """Names of files and texts may hold what a terminal's encoding can't: show it escaped."""
    reconfigure: Any = getattr(sys.stdout, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")


def no_such_choice(option: str, value: str, known: Sequence[str]) -> UsageError:
    """The error for a value that isn't one of those known."""
    return UsageError(
        f"{option} {value}: there is no such choice", hint=f"There are: {', '.join(known)}."
    )


@contextmanager
def row_progress(title: str) -> Iterator[Callable[[int], None]]:
    """On a terminal, a line with the rows done so far and their rate; elsewhere nothing. Fewer rows
    than before are the beginning of another pass, with a rate of its own."""
    out = console()
    if not out.is_terminal:
        yield lambda rows: None
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    with Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        TextColumn("{task.fields[rows]}", markup=False),
        TimeElapsedColumn(),
        console=out,
        transient=True,
    ) as bar:
        task = bar.add_task(title, total=None, rows="")

        before, began = 0, 0.0

        def show(rows: int) -> None:
            nonlocal before, began
            now = bar.tasks[0].elapsed or 0.0
            if rows < before:
                began = now
            before, elapsed = rows, now - began
            rate = f", {rows / elapsed:,.0f} a second" if elapsed > 1 else ""
            bar.update(task, rows=f"{rows:,} rows{rate}")

        yield show
