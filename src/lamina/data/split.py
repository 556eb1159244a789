"""A dataset in two parts, such as training and held-out rows, that have nothing in common."""

from __future__ import annotations

import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lamina.data.convert import PROGRESS_EVERY, Rejects, rejected_line
from lamina.data.formats import Input, Row
from lamina.data.groups import Groups, Links, column_text, find_links
from lamina.data.messages import RowError
from lamina.data.order import mixed
from lamina.data.writers import check_output, open_writer, rejected_path
from lamina.errors import DataError

__all__ = ["Split", "split"]


@dataclass
class Split:
    """What `split` did: `rows_in == rows_first + rows_second + rejected`.

    Args:
        groups: how many groups of rows were kept together.
        strata: for each value of the column that was stratified by, the rows of either side. Rows
            without a value are under the empty text.
        reasons: how many rows were rejected for each kind of mistake, by its code.
    """

    first: Path
    second: Path
    rows_in: int = 0
    rows_first: int = 0
    rows_second: int = 0
    rejected: int = 0
    groups: int = 0
    strata: dict[str, tuple[int, int]] = field(default_factory=dict)
    reasons: Counter[str] = field(default_factory=Counter)
    rejected_file: Path | None = None


def split(
    data: Input,
    first: Path,
    second: Path,
    *,
    fraction: float | None = None,
    count: int | None = None,
    seed: int = 0,
    group_by: str | None = None,
    stratify_by: str | None = None,
    near_duplicates: bool = True,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Split:
    """Write some rows to `second`, the others to `first`, each in the order they stand.

    Rows that are the same, nearly the same (unless `near_duplicates` is False), or have the same
    value in `group_by` go to one side together. So `second` may get a little less than asked for.

    Args:
        fraction, count: how many rows `second` gets, as a share of all or as a number.
        stratify_by: a column: of each of its values, `second` gets the same share.
        progress: called now and then with the number of rows done, from 0 again in each pass.

    Raises:
        DataError: the request makes no sense, or a file can't be read or written.
    """
    if (fraction is None) == (count is None):
        raise DataError("Say how much to split off: either a fraction or a count of rows.")
    if fraction is not None and not 0 < fraction < 1:
        raise DataError(f"The fraction to split off is {fraction}; it must be between 0 and 1.")
    if count is not None and count < 1:
        raise DataError(f"The count of rows to split off is {count}; it must be at least 1.")
    if first.absolute() == second.absolute():
        raise DataError(f"Both parts would be written to {first}.", hint="Give them two names.")
    rejects_file = rejected_path(first)
    for path in (first, second, rejects_file):
        check_output(path, data.sources, force=force)
    strata: list[str] = []
    has_column = False

    def stratum(row: Row) -> None:
        nonlocal has_column
        value = column_text(row.raw.value, stratify_by)
        has_column |= value is not None
        # Interned, so that each value is held only once.
        strata.append(sys.intern(value or ""))

    each = stratum if stratify_by is not None else None
    links = find_links(data, near=near_duplicates, group_by=group_by, each=each, progress=progress)
    if stratify_by is not None and not has_column:
        raise DataError(f"{data.name}: no row has the column {stratify_by!r}.")
    result = Split(first, second)
    chosen = _choose(links, strata, fraction, count, seed, result)
    _write(data, chosen, result, rejects_file, progress)
    return result


def _choose(
    links: Links,
    strata: list[str],
    fraction: float | None,
    count: int | None,
    seed: int,
    result: Split,
) -> bytearray:
    """For each row, whether it goes to the second part."""
    size = len(links.usable)
    groups = Groups(size)
    for one, other in [*links.same, *links.grouped, *((a, b) for a, b, _ in links.near)]:
        groups.join(one, other)
    members: defaultdict[int, int] = defaultdict(int)
    for row in range(size):
        if links.usable[row]:
            members[groups.first(row)] += 1
    result.groups = len(members)
    usable = sum(members.values())
    if count is not None and count >= usable:
        raise DataError(f"{count} rows can't be split off: there are {usable} usable rows.")
    share = fraction if fraction is not None else (count or 0) / usable
    keys = mixed(np.arange(size, dtype=np.uint64) ^ mixed(np.array([seed % 2**64], np.uint64)))
    by_stratum: defaultdict[str, list[int]] = defaultdict(list)
    for group in members:
        by_stratum[strata[group] if strata else ""].append(group)
    taken: set[int] = set()
    for rows in by_stratum.values():
        # As many whole groups as fit, in a random order.
        room = round(share * sum(members[group] for group in rows))
        for group in sorted(rows, key=lambda group: int(keys[group])):
            if members[group] <= room:
                taken.add(group)
                room -= members[group]
    if not taken:
        raise DataError(
            f"Nothing can be split off: of {usable} rows in {len(members)} groups that stay "
            f"together, no group is small enough.",
            hint="Ask for more, or group by another column.",
        )
    chosen = bytearray(groups.first(row) in taken for row in range(size))
    for value, rows in by_stratum.items() if strata else ():
        second = sum(members[group] for group in rows if group in taken)
        result.strata[value] = (sum(members[group] for group in rows) - second, second)
    return chosen


def _write(
    data: Input,
    chosen: bytearray,
    result: Split,
    rejects_file: Path,
    progress: Callable[[int], None] | None,
) -> None:
    with (
        Rejects(rejects_file) as rejects,
        open_writer(result.first) as first,
        open_writer(result.second) as second,
    ):
        for row in data.rows():
            result.rows_in += 1
            name = data.sources[row.file].name
            try:
                if isinstance(row.example, RowError):
                    raise row.example
                assert isinstance(row.raw.value, dict)
                if chosen[row.index]:
                    second.write(row.raw.value)
                    result.rows_second += 1
                else:
                    first.write(row.raw.value)
                    result.rows_first += 1
            except RowError as error:
                result.reasons[error.code] += 1
                rejects.add(rejected_line(name, row.raw, error))
            if progress is not None and result.rows_in % PROGRESS_EVERY == 0:
                progress(result.rows_in)
    result.rejected = rejects.count
    result.rejected_file = rejects.finished()
