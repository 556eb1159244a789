"""A dataset in two parts, such as training and held-out rows, that have nothing in common."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

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
    rejects_file = rejected_path(first)
    if second.resolve() in (first.resolve(), rejects_file.resolve()):
        raise DataError(
            f"Two things would be written to {second}.", hint="Give each part a name of its own."
        )
    for path in (first, second, rejects_file):
        check_output(path, data.sources, force=force)
    strata = _Strata(stratify_by)
    each = strata.add if strata.given else None
    links = find_links(data, near=near_duplicates, group_by=group_by, each=each, progress=progress)
    if strata.given and not strata.has_column:
        raise DataError(f"{data.name}: no row has the column {stratify_by!r}.")
    result = Split(first, second)
    chosen = _choose(links, strata, fraction, count, seed, result)
    _write(data, chosen, result, rejects_file, progress)
    return result


class _Strata:
    """For each row its value of a column, as a number; 8 bytes a row.

    Args:
        column: or None, for which all rows are alike.
    """

    def __init__(self, column: str | None):
        self.given = column is not None
        self.has_column = False
        self._column = column
        self._numbers: dict[str, int] = {} if self.given else {"": 0}
        self._of = array("q")

    @property
    def values(self) -> list[str]:
        """The values, in the order of their numbers."""
        return [*self._numbers]

    def add(self, row: Row) -> None:
        value = column_text(row.raw.value, self._column)
        self.has_column |= value is not None
        self._of.append(self._numbers.setdefault(value or "", len(self._numbers)))

    def of(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """The numbers of the values of these rows."""
        if not self.given:
            return np.zeros(len(rows), dtype=np.int64)
        return np.frombuffer(self._of, dtype=np.int64)[rows]


def _choose(
    links: Links,
    strata: _Strata,
    fraction: float | None,
    count: int | None,
    seed: int,
    result: Split,
) -> NDArray[np.bool_]:
    """For each row, whether it goes to the second part."""
    size = len(links.usable)
    groups = Groups(size)
    for pairs in (links.same, links.grouped, links.near):
        for one, other in pairs:
            groups.join(one, other)
    # A group is called by its first row.
    group_of = np.fromiter(map(groups.first, range(size)), dtype=np.int64, count=size)
    members = np.bincount(group_of[np.frombuffer(links.usable, dtype=np.bool_)], minlength=size)
    known = np.flatnonzero(members)
    result.groups = len(known)
    usable = int(members.sum())
    if count is not None and count >= usable:
        raise DataError(f"{count} rows can't be split off: there are {usable} usable rows.")
    share = fraction if fraction is not None else (count or 0) / usable
    keys = mixed(np.arange(size, dtype=np.uint64) ^ mixed(np.array([seed % 2**64], np.uint64)))
    known = known[np.argsort(keys[known], kind="stable")]
    taken = np.zeros(size, dtype=np.bool_)
    for number, value in enumerate(strata.values):
        own = known[strata.of(known) == number]
        # As many whole groups as fit, in a random order.
        room = wanted = round(share * int(members[own].sum()))
        for group in own.tolist():
            if members[group] <= room:
                taken[group] = True
                room -= int(members[group])
        if strata.given:
            result.strata[value] = (int(members[own].sum()) - wanted + room, wanted - room)
    if not taken.any():
        raise DataError(
            f"Nothing can be split off: of {usable} rows in {len(known)} groups that stay "
            f"together, no group is small enough.",
            hint="Ask for more, or group by another column.",
        )
    return taken[group_of]


def _write(
    data: Input,
    chosen: NDArray[np.bool_],
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
