"""A dataset without rows that repeat others."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lamina.data.convert import PROGRESS_EVERY, Rejects, rejected_line
from lamina.data.formats import Input
from lamina.data.groups import Links, find_links
from lamina.data.messages import RowError
from lamina.data.writers import check_output, open_writer, rejected_path

__all__ = ["Dedup", "dedup"]


@dataclass
class Dedup:
    """What `dedup` did: `rows_in == rows_out + rejected`.

    Args:
        reasons: how many rows were left out as a `duplicate`, as a `near-duplicate`, or for a
            mistake, by its code.
    """

    output: Path
    rows_in: int = 0
    rows_out: int = 0
    rejected: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    rejected_file: Path | None = None


def dedup(
    data: Input,
    output: Path,
    *,
    near: bool = False,
    threshold: float = 0.8,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Dedup:
    """Write each row that says something new. What is left out is in `OUT.rejected.jsonl`, with the
    row that it repeats.

    Args:
        near: also leave out rows that are nearly the same as an earlier one.
        threshold: from which similarity (Jaccard index of 8-grams) on.
        progress: called now and then with the number of rows done, from 0 again in each pass.

    Raises:
        DataError: a file can't be read or written.
    """
    rejects_file = rejected_path(output)
    for path in (output, rejects_file):
        check_output(path, data.sources, force=force)
    links = find_links(data, near=near, threshold=threshold, progress=progress)
    repeats, similarities = _repeats(links)
    result = Dedup(output)
    with Rejects(rejects_file) as rejects, open_writer(output) as writer:
        for row in data.rows():
            result.rows_in += 1
            try:
                if isinstance(row.example, RowError):
                    raise row.example
                if repeats[row.index] >= 0:
                    place = links.places.name(repeats[row.index])
                    similarity = similarities[row.index]
                    if similarity < 1:
                        like = f"is {similarity:.0%} the same as {place}"
                        raise RowError("near-duplicate", like)
                    raise RowError("duplicate", f"is the same as {place}")
                assert isinstance(row.raw.value, dict)
                writer.write(row.raw.value)
                result.rows_out += 1
            except RowError as error:
                result.reasons[error.code] += 1
                rejects.add(rejected_line(data.sources[row.file].name, row.raw, error))
            if progress is not None and result.rows_in % PROGRESS_EVERY == 0:
                progress(result.rows_in)
    result.rejected = rejects.count
    result.rejected_file = rejects.finished()
    return result


def _repeats(links: Links) -> tuple[array[int], array[float]]:
    """For each row the earlier one that it repeats, or -1; and how alike they are, 1 if they are
    the same."""
    rows = len(links.usable)
    repeats, similarities = array("q", [-1]) * rows, array("f", [0]) * rows
    near = links.near
    for k in np.argsort(np.frombuffer(near.others, dtype=np.int64), kind="stable"):
        one, other = near.firsts[k], near.others[k]
        # What is like a row that is left out itself is not left out because of it.
        if repeats[one] < 0:
            # The estimate can be 1 for rows that differ a little.
            repeats[other], similarities[other] = one, min(near.similarities[k], 0.999)
    for one, other in links.same:
        repeats[other], similarities[other] = one, 1
    return repeats, similarities
