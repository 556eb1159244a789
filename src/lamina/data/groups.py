"""Rows that belong together: the same, nearly the same, or of one value of a column."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import Any

from lamina.data.convert import PROGRESS_EVERY
from lamina.data.fingerprints import HashIndex, content_of, fingerprint
from lamina.data.formats import Input, Places, Row
from lamina.data.jsonio import dump_line
from lamina.data.messages import RowError
from lamina.data.near import NearIndex, sketch
from lamina.data.rules import texts_of
from lamina.errors import DataError

__all__ = ["Groups", "Links", "Pairs", "column_text", "find_links"]


class Groups:
    """Disjoint groups of rows, 8 bytes a row. The first row of a group stands for it.

    Args:
        size: how many rows there are.
    """

    def __init__(self, size: int):
        self._parents = array("q", range(size))

    def first(self, row: int) -> int:
        """The first row of a row's group."""
        parents = self._parents
        root = row
        while parents[root] != root:
            root = parents[root]
        while parents[row] != root:
            parents[row], row = root, parents[row]
        return root

    def join(self, one: int, other: int) -> None:
        a, b = self.first(one), self.first(other)
        self._parents[max(a, b)] = min(a, b)


class Pairs:
    """Pairs of rows, 24 bytes each: the first of its kind, a later one, and their similarity."""

    def __init__(self) -> None:
        self.firsts = array("q")
        self.others = array("q")
        self.similarities = array("d")

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return zip(self.firsts, self.others, strict=True)

    def add(self, first: int, other: int, similarity: float = 1.0) -> None:
        self.firsts.append(first)
        self.others.append(other)
        self.similarities.append(similarity)


class Links:
    """What a pass over a dataset finds out about its rows.

    Args:
        places: where each row stands.
        usable: for each row, whether it can be understood.
        same: rows that say the same.
        near: rows that are nearly the same.
        grouped: rows with the same value of the column that rows are grouped by.
    """

    def __init__(self, places: Places) -> None:
        self.places = places
        self.usable = bytearray()
        self.same = Pairs()
        self.near = Pairs()
        self.grouped = Pairs()


def find_links(
    data: Input,
    *,
    near: bool,
    threshold: float = 0.8,
    group_by: str | None = None,
    each: Callable[[Row], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Links:
    """Find the rows that belong together.

    Args:
        near: also find those that are nearly the same, from that `threshold` on.
        group_by: a column; rows with the same value of it belong together.
        each: called with every row.
        progress: called now and then with the number of rows read.

    Raises:
        DataError: the data can't be read, or no row has the column.
    """
    links = Links(Places(data.sources))
    contents, columns, near_index = HashIndex(), HashIndex(), NearIndex()
    near_rows = array("q")
    texts: list[str] = []
    has_column = False
    try:
        for row in data.rows():
            links.places.add(row.file, [row.raw.line])
            rows = row.index + 1
            if progress is not None and rows % PROGRESS_EVERY == 0:
                progress(rows)
            example = row.example
            links.usable.append(not isinstance(example, RowError))
            if each is not None:
                each(row)
            if isinstance(example, RowError):
                continue
            contents.add(fingerprint(content_of(example)), row.index)
            value = column_text(row.raw.value, group_by)
            if value is not None:
                has_column = True
                columns.add(fingerprint(value), row.index)
            if near:
                texts.append(" ".join(text for _, text in texts_of(example)))
                near_rows.append(row.index)
                if len(texts) == 64:
                    near_index.add(sketch(texts))
                    texts = []
        if group_by is not None and not has_column:
            raise DataError(f"{data.name}: no row has the column {group_by!r}.")
        links.same = _pairs(contents)
        links.grouped = _pairs(columns)
        if near:
            near_index.add(sketch(texts))
            for a, b, similarity in near_index.pairs(threshold):
                links.near.add(near_rows[a], near_rows[b], similarity)
    finally:
        contents.close()
        columns.close()
        near_index.close()
    return links


def _pairs(index: HashIndex) -> Pairs:
    pairs = Pairs()
    for group in index.groups():
        first = int(group[0])
        for other in group[1:]:
            pairs.add(first, int(other))
    return pairs


def column_text(value: dict[str, Any] | RowError, column: str | None) -> str | None:
    """The value of a column: a text as it is, anything else as JSON; None if there is none."""
    if column is None or isinstance(value, RowError) or value.get(column) is None:
        return None
    found = value[column]
    if isinstance(found, str):
        return found
    try:
        # A date of a columnar file is a text in JSON.
        text = dump_line({"": found})[5:-2].decode()
    except RowError:
        return str(found)
    return text.strip('"') if text.startswith('"') else text
