"""`lamina tune`: a recipe and data in, a run's folder with an adapter out."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lamina.cli import options
from lamina.cli.data_report import rows
from lamina.cli.inputs import data_problems, out_problems
from lamina.cli.terminal import duration, note, print_json, size
from lamina.errors import LaminaError, RecipeError, UsageError

if TYPE_CHECKING:
    from lamina.engine.run import RunSummary
    from lamina.recipe.schema import Recipe

__all__ = ["tune"]


def tune(
    recipe: options.Recipe,
    overrides: options.Overrides = None,
    data: options.TrainingData = None,
    eval_data: Annotated[
        list[Path] | None,
        typer.Option(
            "--eval-data",
            metavar="FILE",
            help="What to measure the loss on, before and after. May be given again.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="RUN",
            help="The folder of the run: new or empty. Otherwise one in runs/.",
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Tune a model with LoRA.

    For example: lamina tune mini-mixtral --data chats.jsonl max_steps=50 learning_rate=1e-4
    """
    # 1. Everything that can be known to be wrong before the minutes that loading takes.
    loaded, train_files, eval_files = _inputs(recipe, overrides or [], data, eval_data, out)
    run = out or Path("runs") / f"{Path(recipe).stem}-{datetime.now():%Y%m%d-%H%M%S}"

    # 2. The run, shown as it goes.
    from lamina.cli.display import TuneDisplay
    from lamina.engine.loop import tune as run_tune

    with TuneDisplay(Path(recipe).stem) as display:
        summary = run_tune(
            loaded,
            data=train_files,
            eval_data=eval_files,
            out=run,
            on_event=display,
            progress=display.progress,
        )

    # 3. What came of it.
    if as_json:
        print_json(summary.to_dict())
    else:
        sys.stdout.write(_report(summary))
    for sentence in summary.notes:
        note(sentence)
    if summary.interrupted:
        raise typer.Exit(130)
    note(f"try it: lamina chat {summary.run}")


def _inputs(
    recipe: str,
    overrides: list[str],
    data: list[Path] | None,
    eval_data: list[Path] | None,
    out: Path | None,
) -> tuple[Recipe, list[Path], list[Path] | None]:
    """The recipe, the files to train on and those to measure on.

    Raises:
        LaminaError: anything is wrong with any of them; all of it is named.
    """
    from lamina.recipe.load import load_recipe

    loaded: Recipe | None = None
    recipe_error: RecipeError | None = None
    try:
        loaded = load_recipe(recipe, overrides)
    except RecipeError as error:
        recipe_error = error
    train_files = data or [Path(file) for file in (loaded and loaded.data) or ()]
    eval_files = eval_data or [Path(file) for file in (loaded and loaded.eval_data) or ()]
    problems = data_problems([*train_files, *eval_files]) + (out_problems(out) if out else [])
    for file in eval_files:
        if file.exists() and any(t.exists() and t.samefile(file) for t in train_files):
            problems.append(
                f"{file}: is trained on and measured on too, so its loss would show memory only"
            )

    if loaded is not None and not train_files and not problems:
        raise UsageError(
            "there is nothing to train on",
            hint="Add --data FILE: a JSONL file with chats or texts.",
        )
    if recipe_error is not None and not problems:
        raise recipe_error
    if recipe_error is not None:
        problems = [*(recipe_error.problems or [recipe_error.message]), *problems]
    if loaded is None or problems:
        hint = recipe_error.hint if recipe_error else None
        raise LaminaError("the run can't begin", problems=problems, hint=hint)
    return loaded, train_files, eval_files or None


def _report(summary: RunSummary) -> str:
    """The summary for a person."""
    lines = [("run", str(summary.run))]
    if summary.final_loss is not None:
        lines.append(("loss", f"{summary.final_loss:.4f}"))
    if summary.eval_loss_before is not None and summary.eval_loss_after is not None:
        lines.append(
            ("held-out loss", f"{summary.eval_loss_before:.4f} -> {summary.eval_loss_after:.4f}")
        )
    lines += [
        (
            "steps",
            f"{summary.steps} in {duration(summary.seconds)}"
            + (" (interrupted)" if summary.interrupted else ""),
        ),
        ("tokens", f"{summary.tokens:,} ({summary.tokens_per_second:,.0f} a second)"),
        (
            "peak memory",
            f"{size(summary.peak_memory_bytes)}, planned {size(summary.planned_memory_bytes)}",
        ),
    ]
    if summary.dropped_rows:
        lines.append(("left out", f"{rows(summary.dropped_rows)}, longer than max_length"))
    if summary.shortened_rows:
        lines.append(("shortened", f"{rows(summary.shortened_rows)}, longer than max_length"))
    return "".join(f"{name:<14} {value}\n" for name, value in lines)
