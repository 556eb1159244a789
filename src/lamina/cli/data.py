"""`lamina data`: look into datasets before anything is trained on them.

Commands that write are in `data_write`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lamina.cli.data_input import (
    Columns,
    Files,
    Force,
    Format,
    MaskPolicy,
    MaxLength,
    ModelName,
    RecipeName,
    TextRowsName,
    TooLongPolicy,
    open_input,
    row_progress,
)
from lamina.cli.data_model import choose_mask, choose_too_long, open_recipe, open_renderer
from lamina.cli.data_report import (
    as_plain,
    colours,
    print_detection,
    print_report,
    print_stats,
    report_json,
    stdout,
    title,
)
from lamina.cli.data_write import check_fix, convert, dedup, fix, split
from lamina.cli.options import AsJson
from lamina.cli.terminal import note, print_json
from lamina.errors import DataError, UsageError

if TYPE_CHECKING:
    from lamina.data.check import Report
    from lamina.data.formats import Input
    from lamina.data.preview import PreviewRow

__all__ = ["app"]

app = typer.Typer(
    help="Datasets: what they are, what is wrong with them, what is learned of them.",
    no_args_is_help=True,
)


@app.command()
def detect(
    files: Files,
    format: Format = None,
    columns: Columns = None,
    text_rows: TextRowsName = None,
    as_json: AsJson = False,
) -> None:
    """Say which format each file has, why, and how sure that is.

    The first 1,000 rows of each are looked at. Exits with 1 if one has no known format.
    """
    from lamina.data.detect import detect as run_detect

    found = run_detect(open_input(files, format, columns, text_rows))
    if as_json:
        print_json(as_plain(found))
    else:
        for number, detection in enumerate(found):
            if number:
                sys.stdout.write("\n")
            print_detection(detection)
        if any(detection.ambiguous for detection in found):
            note("hint: --format, --map and --text-rows say what is meant.", style="cyan")
    if any(detection.shape is None for detection in found):
        raise typer.Exit(1)


@app.command()
def check(
    files: Files,
    format: Format = None,
    columns: Columns = None,
    text_rows: TextRowsName = None,
    eval_data: Annotated[
        list[str] | None,
        typer.Option(
            "--eval-data",
            metavar="FILE",
            help="What the model will be measured on: rows of it in FILE are found. May be given "
            "again.",
        ),
    ] = None,
    model: ModelName = None,
    recipe: RecipeName = None,
    mask: MaskPolicy = None,
    max_length: MaxLength = None,
    near: Annotated[
        bool,
        typer.Option(
            "--near/--no-near", help="Look for rows that are nearly the same: takes long."
        ),
    ] = True,
    pii: Annotated[
        bool, typer.Option("--pii", help="Look for personal data (with presidio-analyzer).")
    ] = False,
    mend: Annotated[
        bool, typer.Option("--fix", help="Write a copy with what can be mended without judgement.")
    ] = False,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Where --fix writes its copy.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Find everything that is wrong with data, and say what to do.

    Exits with 1 if there are errors, which stop a training run, and with 0 if there are only
    warnings; with --fix, that is said of the corrected copy. Rows are tokenized only with --model
    or --recipe.
    """
    from lamina.data.check import check as run_check

    loaded = open_recipe(recipe)
    policy = choose_mask(mask, loaded)
    tokenizing = model is not None or loaded is not None
    if max_length is not None and not tokenizing:
        raise UsageError("--max-length counts tokens", hint="Add --model or --recipe.")
    if mend and out is None:
        raise UsageError("--fix writes a copy", hint="Add --out FILE.")
    if out is not None and not mend:
        raise UsageError(
            "--out is for --fix", hint="A report goes to stdout: add --fix, or > FILE."
        )
    data = open_input(files, format, columns, text_rows, loaded)
    if out is not None:
        check_fix(data, out, force=force)
    held = open_input(eval_data, format, columns, text_rows, loaded) if eval_data else None
    renderer = open_renderer(model, loaded, policy) if tokenizing else None
    limit = max_length if max_length is not None or loaded is None else loaded.max_length

    def examine(data: Input, *, near: bool, pii: bool) -> Report:
        with row_progress("checking") as progress:
            return run_check(
                data,
                eval_data=held,
                renderer=renderer,
                max_length=limit,
                near_duplicates=near,
                personal_data=pii,
                progress=progress,
            )

    report = examine(data, near=near, pii=pii)
    if not report.rows:
        raise DataError(f"{title(data)}: there is no row")
    if not mend:
        if as_json:
            print_json(report_json(report))
        else:
            print_report(title(data), report)
        raise typer.Exit(0 if report.ok else 1)
    assert out is not None
    if not as_json:
        print_report(title(data), report)
        sys.stdout.write("\n")
    mended = fix(data, out, force=force, in_words=not as_json)
    if not mended.rows_out:
        raise DataError(f"{out}: not one row could be kept", hint=f"See {mended.rejected_file}.")
    after = examine(open_input([str(out)], format, columns, "line", loaded), near=False, pii=False)
    if as_json:
        print_json(
            {**report_json(report), "fix": as_plain(mended), "after_fix": report_json(after)}
        )
    elif not after.ok:
        sys.stdout.write("\n")
        after.findings = [finding for finding in after.findings if finding.severity == "error"]
        print_report(str(out), after)
    raise typer.Exit(0 if after.ok else 1)


@app.command()
def preview(
    files: Files,
    model: ModelName = None,
    recipe: RecipeName = None,
    format: Format = None,
    columns: Columns = None,
    text_rows: TextRowsName = None,
    mask: MaskPolicy = None,
    start: Annotated[
        int, typer.Option("--start", metavar="N", min=1, help="The first row to show.")
    ] = 1,
    count: Annotated[
        int, typer.Option("--rows", metavar="N", min=0, help="How many rows to show; 0: all.")
    ] = 3,
    ids: Annotated[bool, typer.Option("--ids", help="Show each token's id too.")] = False,
    html: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write a page to share instead."),
    ] = None,
    force: Force = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print a line a row, with its input_ids and labels."),
    ] = False,
) -> None:
    """Show what the model reads of each row, and what it learns.

    Learned text is green, or stands between ⟦ and ⟧ where there is no colour. In JSON, a label is
    -100 where nothing is learned.
    """
    from lamina.data.preview import preview as run_preview
    from lamina.data.preview import to_html, to_json, to_text
    from lamina.data.writers import check_output, new_file

    loaded = open_recipe(recipe)
    policy = choose_mask(mask, loaded)
    if html is not None and as_json:
        raise UsageError("--html and --json are two ways to show rows: choose one")
    data = open_input(files, format, columns, text_rows, loaded)
    if html is not None:
        check_output(html, data.sources, force=force)
    renderer = open_renderer(model, loaded, policy)
    shown = run_preview(data, renderer, start=start - 1, count=count or sys.maxsize - start)
    some = _some(shown, title(data), start)
    if html is not None:
        with new_file(html) as file:
            file.write(to_html(some, title=title(data)).encode("utf-8", "backslashreplace"))
        note(f"{html}: written")
    elif as_json:
        for line in to_json(some):
            sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
    else:
        color = colours(stdout())
        for number, row in enumerate(some):
            sys.stdout.write(("\n" if number else "") + to_text([row], color=color, ids=ids))


def _some(rows: Iterable[PreviewRow], name: str, start: int) -> Iterable[PreviewRow]:
    """
    Raises:
        DataError: there is no row.
    """
    iterator = iter(rows)
    first = list(islice(iterator, 1))
    if not first:
        where = f" from row {start} on" if start > 1 else ""
        raise DataError(f"{name}: there is no row{where}")
    return chain(first, iterator)


@app.command()
def stats(
    files: Files,
    model: ModelName = None,
    recipe: RecipeName = None,
    format: Format = None,
    columns: Columns = None,
    text_rows: TextRowsName = None,
    mask: MaskPolicy = None,
    max_length: MaxLength = None,
    too_long: TooLongPolicy = None,
    as_json: AsJson = False,
) -> None:
    """Count rows and tokens, and say what a recipe makes of them.

    With --recipe: how many rows it would drop or shorten, and its steps an epoch.
    """
    from lamina.data.stats import stats as run_stats

    loaded = open_recipe(recipe)
    policy = choose_mask(mask, loaded)
    length_policy = choose_too_long(too_long, loaded)
    data = open_input(files, format, columns, text_rows, loaded)
    renderer = open_renderer(model, loaded, policy)
    limit = max_length if max_length is not None or loaded is None else loaded.max_length
    tokens_per_step = loaded.tokens_per_step if loaded else None
    with row_progress("counting") as progress:
        found = run_stats(
            data,
            renderer,
            max_length=limit,
            too_long=length_policy,
            tokens_per_step=tokens_per_step,
            seed=loaded.seed if loaded else 0,
            progress=progress,
        )
    if as_json:
        settings = {
            "max_length": limit,
            "too_long": length_policy,
            "tokens_per_step": tokens_per_step,
            "mask": policy,
        }
        print_json({**as_plain(found), "loss_share": found.loss_share, "settings": settings})
        return
    print_stats(
        title(data), found, max_length=limit, policy=length_policy, tokens_per_step=tokens_per_step
    )


for command in (convert, split, dedup):
    app.command()(command)
