"""Raw rows to the canonical form and back. A *shape* is a way to lay out an example in columns."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from lamina.data.messages import RowError
from lamina.data.shapes.alpaca import Alpaca, Table
from lamina.data.shapes.base import Shape
from lamina.data.shapes.openai import OpenAI, parse_message_list
from lamina.data.shapes.plain import InputOutput, PromptCompletion, RawText, Tokenized
from lamina.data.shapes.preference import KTO, OpenAIPreference, PreferencePairs, Ranking
from lamina.data.shapes.sharegpt import ShareGPT
from lamina.errors import DataError

__all__ = [
    "SHAPES",
    "Shape",
    "ShapeFinder",
    "candidates",
    "parse_message_list",
    "present",
    "shadowed",
    "shape_named",
]

#: All shapes, the more specific before the more general: the first that fits a row is taken.
SHAPES: tuple[Shape, ...] = (
    Tokenized(),
    OpenAIPreference(),
    Ranking(),
    PreferencePairs(),
    KTO(),
    OpenAI(),
    ShareGPT(),
    InputOutput(),
    Alpaca(),
    PromptCompletion(),
    Table(),
    RawText(),
)


def shape_named(name: str) -> Shape:
    """
    Raises:
        DataError: there is no such shape.
    """
    for shape in SHAPES:
        if shape.name == name:
            return shape
    known = ", ".join(shape.name for shape in SHAPES)
    raise DataError(f"There is no data format {name!r}.", hint=f"Known formats: {known}.")


def candidates(row: dict[str, Any]) -> list[tuple[Shape, str]]:
    """The shapes that a row could have, the best first, each with the reason."""
    found = []
    for shape in SHAPES:
        reason = shape.fits(row)
        if reason is not None:
            found.append((shape, reason))
    return found


def shadowed(row: Mapping[str, Any], columns: Mapping[str, str]) -> list[tuple[str, str]]:
    """The columns of a row that aren't read because another one is mapped to their name, each with
    that other one.

    Args:
        columns: what each column of a shape is called in the row, e.g. `{"user": "question"}`.
    """
    sources = {*columns.values()}
    return [(name, source) for name, source in columns.items() if name in row.keys() - sources]


def present(row: dict[str, Any]) -> dict[str, Any]:
    """The columns of a row that hold something."""
    return {name: value for name, value in row.items() if value is not None}


class ShapeFinder:
    """Finds the shape of rows, looking at each combination of columns only once.

    Args:
        shape: the shape that all rows have, if that is known.
        columns: what each column of a shape is called in the rows, e.g. `{"user": "question"}`.
    """

    def __init__(self, shape: Shape | None = None, columns: dict[str, str] | None = None):
        self._shape = shape
        self._mapped = columns or {}
        self._columns = {source: target for target, source in self._mapped.items()}
        self._known: dict[tuple[str, ...], Shape] = {}

    def renamed(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row with its columns called as shapes call them. A mapped column goes before one
        that is called so already.

        Raises:
            RowError: a column that was mapped is missing.
        """
        if not self._columns:
            return row
        missing = [source for source in self._columns if source not in row]
        if missing:
            raise RowError("missing-column", f"has no column {missing[0]!r}, which was mapped")
        hidden = {name for name, _ in shadowed(row, self._mapped)}
        return {self._columns.get(key, key): row[key] for key in row if key not in hidden}

    def view(self, row: dict[str, Any]) -> dict[str, Any]:
        """The row as shapes are to see it: renamed, and without nulls if it has a known shape then.
        Files with columns hold null where a row has none.

        Raises:
            RowError: a column that was mapped is missing.
        """
        named = self.renamed(row)
        if self._shape is None and None in named.values():
            held = present(named)
            with suppress(RowError):
                self.find(held)
                return held
        return named

    def unseen(self, row: dict[str, Any], shape: Shape) -> dict[str, Any]:
        """The columns of a row that are carried along although `view` leaves them out."""
        if not self._columns and None not in row.values():
            return {}
        left = {name: row[name] for name, _ in shadowed(row, self._mapped)}
        for name, value in row.items():
            if value is None and name not in shape.columns and name not in self._columns:
                left[name] = None
        return left

    def find(self, row: dict[str, Any]) -> Shape:
        """The shape of a row whose columns are called as shapes call them.

        Raises:
            RowError: it has none that is known.
        """
        if self._shape is not None:
            return self._shape
        key = tuple(row)
        shape = self._known.get(key)
        # Some columns hold one thing or another, so the shape must fit this row too.
        if shape is None or shape.fits(row) is None:
            shape = next((s for s in SHAPES if s.fits(row) is not None), None)
            if shape is None:
                raise _unknown(row)
            self._known[key] = shape
        return shape


def _unknown(row: dict[str, Any]) -> RowError:
    columns = ", ".join(repr(key) for key in list(row)[:6]) or "none"
    return RowError("unknown-shape", f"has no columns that a known format has (it has {columns})")
