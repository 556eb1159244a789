"""How much data there is, from a sample of it: enough to say how many steps and hours a run takes.

All rows are counted; the first couple of thousand are tokenized, where the model's tokenizer is on
this machine, and stand for the rest.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lamina.data.formats import Input, Row
from lamina.data.messages import RowError
from lamina.data.template import Renderer
from lamina.errors import DataError
from lamina.plan.plan import Sequences
from lamina.recipe.schema import Recipe

__all__ = ["DataSize", "measure_data"]

#: Rows that are looked at.
_SAMPLE = 2000
#: Characters of a row, its quotes and keys included, that make up a token without a tokenizer.
_CHARACTERS = 4


@dataclass(frozen=True, slots=True)
class DataSize:
    """A dataset's size, as training would see it.

    Args:
        rows: of the files.
        tokens: of all that is trained on, estimated from `sampled` rows.
        tokenized: whether these were tokenized; otherwise characters were counted.
        too_long: the share of samples over `max_length`.
    """

    rows: int
    sampled: int
    tokens: int
    tokenized: bool
    too_long: float
    sequences: Sequences

    def steps(self, tokens_per_step: int) -> int:
        """Steps of an epoch: a step is filled with whole sequences, so half of one is left free."""
        filled = max(1, tokens_per_step - self.sequences.mean // 2)
        return max(1, -(-self.tokens // filled))


def measure_data(
    files: Sequence[Path | str], recipe: Recipe, renderer: Renderer | None
) -> DataSize:
    """The size of data files.

    Args:
        renderer: what tokenizes rows; None if the model's tokenizer isn't at hand.

    Raises:
        DataError: a file can't be read, or no row of it can be used.
    """
    data = Input(
        map(str, files),
        shape=recipe.data_format,
        columns=recipe.data_columns,
        text_rows=recipe.text_rows,
    )
    rows, sample = 0, []
    for row in data.rows():
        if rows < _SAMPLE:
            sample.append(row)
        rows += 1
    lengths, learned = _lengths(sample, renderer)
    if not len(lengths):
        reasons = [
            f"{data.place(row)} {row.example.message}."
            for row in sample
            if isinstance(row.example, RowError)
        ]
        raise DataError(
            f"{data.name}: no row can be used",
            problems=reasons[:5],
            hint="`lamina data check` says what is wrong with each.",
        )
    long = lengths > recipe.max_length
    kept = lengths[~long] if recipe.too_long == "drop" else lengths
    if recipe.too_long == "truncate":
        kept = np.minimum(kept, recipe.max_length)
    total = float(kept.sum())
    if not total:
        raise DataError(
            f"{data.name}: every sample has more tokens than max_length={recipe.max_length}",
            hint=f"The shortest has {int(lengths.min())} tokens: raise max_length.",
        )
    # What a token of attention sees grows with its sequence: long ones count by their tokens.
    seen = np.minimum(kept, recipe.max_length)
    mean = int((seen * seen).sum() / seen.sum())
    return DataSize(
        rows=rows,
        sampled=len(sample),
        tokens=int(total * rows / len(sample)),
        tokenized=renderer is not None,
        too_long=float(long.mean()),
        sequences=Sequences(max(1, mean), int(seen.max()), learned),
    )


def _lengths(sample: Sequence[Row], renderer: Renderer | None) -> tuple[np.ndarray, float]:
    """The tokens of each sample, and the share of them that is learned."""
    usable = [row for row in sample if not isinstance(row.example, RowError)]
    if renderer is None:
        sizes = [len(json.dumps(row.raw.value, default=str)) // _CHARACTERS for row in usable]
        return np.maximum(np.array(sizes, dtype=np.int64), 1), 1.0
    found = [
        one
        for result in renderer.render_many([row.example for row in usable])
        if not isinstance(result, RowError)
        for one in result
    ]
    lengths = np.array([len(one.input_ids) for one in found], dtype=np.int64)
    learned = sum(one.num_loss_tokens for one in found)
    return lengths, learned / max(1, int(lengths.sum()))
