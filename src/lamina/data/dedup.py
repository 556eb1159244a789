"""A dataset without rows that repeat others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lamina.data.convert import PROGRESS_EVERY, Rejects, rejected_line
from lamina.data.formats import Input
from lamina.data.groups import find_links
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
    repeats: dict[int, RowError] = {}
    for one, other, similarity in sorted(links.near, key=lambda pair: pair[1]):
        # What is like a row that is left out itself is not left out because of it.
        if one not in repeats:
            like = f"is {similarity:.0%} the same as {links.places.name(one)}"
            repeats[other] = RowError("near-duplicate", like)
    for one, other in links.same:
        repeats[other] = RowError("duplicate", f"is the same as {links.places.name(one)}")
    result = Dedup(output)
    with Rejects(rejects_file) as rejects, open_writer(output) as writer:
        for row in data.rows():
            result.rows_in += 1
            try:
                if isinstance(row.example, RowError):
                    raise row.example
                if row.index in repeats:
                    raise repeats[row.index]
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
