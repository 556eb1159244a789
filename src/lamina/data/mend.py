"""`check --fix`: a corrected copy, with only mends that need no judgement, and a list of them."""

from __future__ import annotations

import contextlib
import math
from array import array
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lamina.data.codes import CODES
from lamina.data.convert import PROGRESS_EVERY, Rejects, rejected_line
from lamina.data.formats import Input, Row
from lamina.data.groups import find_links
from lamina.data.jsonio import dump_line
from lamina.data.messages import Conversation, Message, RowError
from lamina.data.rules import findings
from lamina.data.writers import check_output, open_writer, rejected_path

__all__ = ["Mended", "mend", "mends_path"]


@dataclass
class Mended:
    """What `mend` did: `rows_in == rows_out + rejected`.

    Args:
        mends: how many rows were changed in each way, by the code of what was wrong.
        reasons: how many rows were left out, as a `duplicate` or for a mistake, by its code.
        mends_file: the list of the mends, if there are any.
    """

    output: Path
    rows_in: int = 0
    rows_out: int = 0
    rejected: int = 0
    mends: Counter[str] = field(default_factory=Counter)
    reasons: Counter[str] = field(default_factory=Counter)
    rejected_file: Path | None = None
    mends_file: Path | None = None


def mends_path(output: Path) -> Path:
    """Where the list of mends goes."""
    return output.with_name(output.name + ".mends.jsonl")


def mend(
    data: Input,
    output: Path,
    *,
    force: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Mended:
    """Write a corrected copy. Changed rows are listed in `OUT.mends.jsonl`, an object a line with
    `file`, `line`, `code` and `mend`; rows that can't be mended are in `OUT.rejected.jsonl`.

    Args:
        progress: called now and then with the number of rows done, from 0 again in each pass.

    Raises:
        DataError: a file can't be read or written.
    """
    rejects_file, list_file = rejected_path(output), mends_path(output)
    for path in (output, rejects_file, list_file):
        check_output(path, data.sources, force=force)
    links = find_links(data, near=False, progress=progress)
    repeats = array("q", [-1]) * len(links.usable)
    for one, other in links.same:
        repeats[other] = one
    result = Mended(output)
    with (
        Rejects(rejects_file) as rejects,
        Rejects(list_file) as listed,
        open_writer(output) as writer,
    ):
        for source in data.sources:
            if source.bom:
                result.mends["bom"] += 1
                listed.add(_line(source.name, 1, "bom"))
        for row in data.rows():
            result.rows_in += 1
            name = data.sources[row.file].name
            try:
                if repeats[row.index] >= 0:
                    place = links.places.name(repeats[row.index])
                    raise RowError("duplicate", f"is the same as {place}")
                value, mends = _mended(row, data.columns)
                writer.write(value)
                result.rows_out += 1
                for code in mends:
                    result.mends[code] += 1
                    listed.add(_line(name, row.raw.line, code))
            except RowError as error:
                result.reasons[error.code] += 1
                rejects.add(rejected_line(name, row.raw, error))
            if progress is not None and result.rows_in % PROGRESS_EVERY == 0:
                progress(result.rows_in)
    result.rejected = rejects.count
    result.rejected_file = rejects.finished()
    result.mends_file = listed.finished()
    return result


def _line(name: str, line: int, code: str) -> bytes:
    return dump_line({"file": name, "line": line, "code": code, "mend": CODES[code].fixed})


def _mended(row: Row, columns: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """The mended row, and the codes of what was wrong.

    Args:
        columns: what the shape's columns are called in the file (see `Input`).

    Raises:
        RowError: it has a mistake that can't be mended.
    """
    example = row.example
    if isinstance(example, RowError):
        raise example
    for code, message in findings(example):
        if CODES[code].severity == "error":
            raise RowError(code, message)
    assert isinstance(row.raw.value, dict)
    assert row.shape is not None
    value, mends = row.raw.value, list(row.raw.notes)
    if isinstance(example, Conversation):
        messages, found = _mended_turns(example.messages)
        if found:
            # A row is left as it is where its format can't hold the mended turns.
            with contextlib.suppress(RowError):
                written = row.shape.write(replace(example, messages=messages))
                value = _as_called(written, columns)
                mends += found
    return (_without_nan(value) if "nan" in mends else value), mends


def _as_called(row: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row of a shape under the file's own names. A mapped column that the shape leaves out, being
    empty, stays, since what is mapped has to be there."""
    named = {columns.get(key, key): value for key, value in row.items()}
    return {**named, **{name: None for name in columns.values() if name not in named}}


def _mended_turns(messages: list[Message]) -> tuple[list[Message], list[str]]:
    found = []
    kept = [m for m in messages if m.role != "system" or m.content.strip()]
    if len(kept) < len(messages):
        found.append("empty-turn")
    last = max(i for i, m in enumerate(kept) if m.role == "assistant")
    if last + 1 < len(kept):
        kept = kept[: last + 1]
        found.append("last-turn")
    for index, message in enumerate(kept[:-1]):
        after = kept[index + 1]
        alone = len(message.tool_calls) == 1 and after.role == "tool"
        if alone and (index + 2 == len(kept) or kept[index + 2].role != "tool"):
            (call,) = message.tool_calls
            if call.id is None or after.tool_call_id is None:
                shared = call.id or after.tool_call_id or f"call{index:05d}"
                kept[index] = replace(message, tool_calls=[replace(call, id=shared)])
                kept[index + 1] = replace(after, tool_call_id=shared)
                found.append("missing-call-id")
    return kept, list(dict.fromkeys(found))


def _without_nan(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return value
