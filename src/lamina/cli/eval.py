"""`lamina eval`: the loss of a run over data."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lamina.cli.inputs import data_problems, require, run_or_model
from lamina.cli.options import Adapter, AsJson, RunOrModel
from lamina.cli.terminal import print_json

__all__ = ["evaluate"]


def evaluate(
    run: RunOrModel,
    data: Annotated[
        list[Path],
        typer.Option("--data", metavar="FILE", help="What to measure on. May be given again."),
    ],
    adapter: Adapter = True,
    as_json: AsJson = False,
) -> None:
    """Measure the loss and the perplexity of a run over data."""
    source = run_or_model(run)
    require(data_problems(data), "the evaluation")

    from lamina.evaluate.score import evaluate as score

    result = score(source, data, adapter=adapter)
    if as_json:
        print_json(asdict(result))
        return
    rows = (
        ("loss", f"{result.loss:.4f}"),
        ("perplexity", f"{result.perplexity:.3f}"),
        ("rows", f"{result.rows:,}"),
        ("tokens", f"{result.tokens:,}, {result.loss_tokens:,} of them carry loss"),
    )
    sys.stdout.write("".join(f"{name:<12} {value}\n" for name, value in rows))
