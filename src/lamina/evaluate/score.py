"""The loss of a run over data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lamina.engine.loop import load_samples, mean_loss
from lamina.engine.step import Engine
from lamina.evaluate.source import open_tuned


@dataclass(frozen=True)
class Score:
    """Mean negative log likelihood over the loss-carrying tokens of data, in nats, and its
    exponential."""

    loss: float
    perplexity: float
    tokens: int
    loss_tokens: int
    rows: int


def evaluate(
    run_or_model: str | Path, data: Sequence[str | Path], *, adapter: bool = True
) -> Score:
    """Score a run, a store or a model over data files.

    Args:
        adapter: False for the base model of a run.

    Raises:
        LaminaError: the run or the data can't be used.
    """
    tuned = open_tuned(run_or_model, adapter=adapter)
    model = tuned.model
    samples = load_samples(model, data)
    with model.streamed() as source:
        engine = Engine(
            model.family,
            source,
            tuned.adapter,
            device=model.device,
            group_tokens=model.recipe.group_tokens,
            logits_bytes=model.logits_bytes,
        )
        loss, count = mean_loss(engine, samples, model.recipe.tokens_per_step)
    return Score(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        tokens=samples.num_tokens,
        loss_tokens=count,
        rows=samples.num_rows,
    )
