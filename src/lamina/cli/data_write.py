"""`lamina data convert`, `split` and `dedup`, and the copy that `check --fix` writes.

Every row that comes in goes out or is rejected: each command says how many did, and rejected rows
lie beside the output with their line and the reason.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lamina.cli.data_input import (
    Columns,
    Files,
    Force,
    Format,
    TextRowsName,
    complete_formats,
    no_such_choice,
    open_input,
    row_progress,
)
from lamina.cli.data_report import account, as_plain, rows, title
from lamina.cli.options import AsJson, Seed
from lamina.cli.terminal import print_json
from lamina.errors import UsageError

if TYPE_CHECKING:
    from lamina.data.formats import Input
    from lamina.data.mend import Mended

__all__ = ["check_fix", "convert", "dedup", "fix", "split"]

Out = Annotated[
    Path,
    typer.Option(
        "--out",
        metavar="FILE",
        show_default=False,
        help="The file to write. Its name tells how: .jsonl, .json, .csv, .tsv, .parquet, .arrow "
        "or .txt; .gz or .zst after it compresses.",
    ),
]


def convert(
    files: Files,
    out: Out,
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="NAME",
            help="The format to write.",
            autocompletion=complete_formats,
        ),
    ] = "messages",
    format: Format = None,
    columns: Columns = None,
    text_rows: TextRowsName = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write data in another format, another container, or both.

    Rows that the format can't carry are in OUT.rejected.jsonl, each with the reason.
    """
    from lamina.data.convert import convert as run_convert
    from lamina.data.shapes import SHAPES

    if to not in (names := [shape.name for shape in SHAPES]):
        raise no_such_choice("--to", to, names)
    data = open_input(files, format, columns, text_rows)
    with row_progress("converting") as progress:
        done = run_convert(data, out, to=to, force=force, progress=progress)
    lines = [(done.rows_in, f"read from {title(data)}"), (done.rows_out, f"written to {out}")]
    _finish(done, lines, as_json)


def split(
    files: Files,
    out: Out,
    held_out: Annotated[
        Path,
        typer.Option(
            "--held-out",
            metavar="FILE",
            show_default=False,
            help="The file for the rows that are split off.",
        ),
    ],
    fraction: Annotated[
        float | None,
        typer.Option("--fraction", metavar="F", help="Split off this share of the rows: 0.1."),
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", metavar="N", help="Split off so many rows.")
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(
            "--group-by",
            metavar="COLUMN",
            help="Keep rows with the same value of it on one side, such as a conversation's id.",
        ),
    ] = None,
    stratify_by: Annotated[
        str | None,
        typer.Option(
            "--stratify-by",
            metavar="COLUMN",
            help="Split off the same share of each of its values.",
        ),
    ] = None,
    near: Annotated[
        bool,
        typer.Option("--near/--no-near", help="Keep rows that are nearly the same on one side."),
    ] = True,
    seed: Seed = 0,
    format: Format = None,
    columns: Columns = None,
    text_rows: TextRowsName = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Split off rows, such as held-out ones, that repeat no others.

    Rows stay as they are, in their order. The same seed gives the same split.
    """
    from lamina.data.split import split as run_split

    if (fraction is None) == (count is None):
        raise UsageError("say how much to split off: either --fraction or --count")
    if fraction is not None and not 0 < fraction < 1:
        raise UsageError(f"--fraction {fraction}: it must be between 0 and 1")
    if count is not None and count < 1:
        raise UsageError(f"--count {count}: it must be at least 1")
    data = open_input(files, format, columns, text_rows)
    with row_progress("splitting") as progress:
        done = run_split(
            data,
            out,
            held_out,
            fraction=fraction,
            count=count,
            seed=seed,
            group_by=group_by,
            stratify_by=stratify_by,
            near_duplicates=near,
            force=force,
            progress=progress,
        )
    if as_json:
        print_json(as_plain(done))
        return
    lines = [
        (done.rows_in, f"read from {title(data)}"),
        (done.rows_first, f"written to {out}"),
        (done.rows_second, f"written to {held_out}"),
    ]
    sys.stdout.write(account(lines, done.rejected, done.rejected_file, done.reasons))
    if done.groups < done.rows_first + done.rows_second:
        sys.stdout.write(f"Rows that belong together stayed together: {done.groups:,} groups.\n")
    for value, (first, second) in sorted(done.strata.items()):
        name = value if value.isprintable() else repr(value)
        sys.stdout.write(f"  {stratify_by} {name or '(none)'}: {first:,} and {second:,}\n")


def dedup(
    files: Files,
    out: Out,
    near: Annotated[
        bool, typer.Option("--near", help="Leave out rows that are nearly the same, too.")
    ] = False,
    threshold: Annotated[
        float,
        typer.Option(
            "--threshold",
            metavar="T",
            min=0.5,
            max=1.0,
            help="How much of two rows must be the same for --near.",
        ),
    ] = 0.8,
    format: Format = None,
    columns: Columns = None,
    text_rows: TextRowsName = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Leave out rows that repeat others.

    They are in OUT.rejected.jsonl, each with the place of the row that it repeats.
    """
    from lamina.data.dedup import dedup as run_dedup

    data = open_input(files, format, columns, text_rows)
    with row_progress("comparing") as progress:
        done = run_dedup(data, out, near=near, threshold=threshold, force=force, progress=progress)
    lines = [(done.rows_in, f"read from {title(data)}"), (done.rows_out, f"written to {out}")]
    _finish(done, lines, as_json)


def check_fix(data: Input, out: Path, *, force: bool) -> None:
    """
    Raises:
        DataError: `fix` couldn't write its files. Better known before the check than after it.
    """
    from lamina.data.mend import mends_path
    from lamina.data.writers import check_output, rejected_path

    for path in (out, rejected_path(out), mends_path(out)):
        check_output(path, data.sources, force=force)


def fix(data: Input, out: Path, *, force: bool, in_words: bool) -> Mended:
    """The copy of `check --fix`."""
    from lamina.data.codes import CODES
    from lamina.data.mend import mend

    with row_progress("mending") as progress:
        done = mend(data, out, force=force, progress=progress)
    if in_words:
        lines = [(done.rows_in, f"read from {title(data)}"), (done.rows_out, f"written to {out}")]
        sys.stdout.write(account(lines, done.rejected, done.rejected_file, done.reasons))
        for code, number in done.mends.most_common():
            sys.stdout.write(f"mended {code} in {rows(number)}: {CODES[code].fixed}\n")
        if done.mends_file is not None:
            sys.stdout.write(f"Every mend is in {done.mends_file}.\n")
    return done


def _finish(done: Any, lines: list[tuple[int, str]], as_json: bool) -> None:
    """Say what became of the rows. Exits with 1 if there is nothing left of them."""
    if as_json:
        print_json(as_plain(done))
    else:
        sys.stdout.write(account(lines, done.rejected, done.rejected_file, done.reasons))
    if not done.rows_out:
        raise typer.Exit(1)
