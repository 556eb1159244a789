"""Which format is this? The answer has its reasons, how sure it is, and what is ambiguous."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

from lamina.data.containers import Compression, Container, Source, read_source
from lamina.data.formats import Input, Problems, count_rows, understand
from lamina.data.jsonio import json_type
from lamina.data.messages import RowError
from lamina.data.readers import RawRow
from lamina.data.shapes import SHAPES, ShapeFinder, candidates, shadowed

__all__ = ["Column", "Detection", "detect"]

#: Rows of a file that are looked at.
SAMPLE = 1000

#: Columns that often hold a question and its answer.
_QUESTIONS = ("question", "query", "prompt", "input", "instruction", "problem", "user")
_ANSWERS = ("answer", "response", "output", "completion", "reply", "solution", "assistant")

Confidence = Literal["certain", "likely", "unsure", "unknown"]


@dataclass
class Column:
    """A column.

    Args:
        types: what its values are ("a string", ...), each with how many rows have it.
        used: whether the shape gives it a meaning; it is carried along and not trained if not.
    """

    name: str
    types: Counter[str] = field(default_factory=Counter)
    used: bool = False


@dataclass
class Detection:
    """What a file was found to be.

    Args:
        rows: how many of its rows were looked at.
        shapes: how many of these have each shape.
        shape: the shape of most of them, or None if no row has a known one.
        title: that shape in words.
        confidence: `certain` if every row looked at can be read and nothing is ambiguous, `likely`
            if 95% can, `unsure` if fewer can, `unknown` if none can.
        reasons: why.
        ambiguous: what could have been meant otherwise, with how to say so.
        problems: the first rows that can't be read.
    """

    name: str
    container: Container
    compression: Compression
    rows: int = 0
    shapes: Counter[str] = field(default_factory=Counter)
    shape: str | None = None
    title: str | None = None
    confidence: Confidence = "unknown"
    reasons: list[str] = field(default_factory=list)
    ambiguous: list[str] = field(default_factory=list)
    columns: list[Column] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def detect(data: Input | Path | str | Iterable[Path | str]) -> list[Detection]:
    """Look at the beginning of each file.

    Raises:
        DataError: a file is missing or can't be read.
    """
    data = data if isinstance(data, Input) else Input(data)
    return [_detect(data, source) for source in data.sources]


def _detect(data: Input, source: Source) -> Detection:
    result = Detection(source.name, source.container, source.compression)
    columns: dict[str, Column] = {}
    reasons: Counter[str] = Counter()
    problems = Problems()
    notes: Counter[str] = Counter()
    readable = 0
    for raw, shape_name, reason, error, remarks in _look(data, source):
        result.rows += 1
        if isinstance(raw.value, dict):
            for key, value in raw.value.items():
                column = columns.setdefault(key, Column(key))
                column.types[json_type(value)] += 1
        if shape_name is not None:
            result.shapes[shape_name] += 1
        if reason is not None:
            reasons[reason] += 1
        readable += error is None
        notes.update(remarks)
        if error is not None:
            problems.add(f"{source.name}:{raw.line}", error.message)
    result.columns = list(columns.values())
    result.problems = problems.listed()
    if result.container == "text" and not data.names_text_rows:
        result.ambiguous.append(
            "A text file can be one document, paragraphs, or a document a line: say which with "
            "text_rows (document, paragraph or line)."
        )
    _conclude(result, readable, reasons, notes)
    hidden = {name for name, _ in shadowed(columns, data.columns)}
    for column in result.columns:
        column.used |= column.name in data.columns.values()
        column.used &= column.name not in hidden
    return result


def _look(
    data: Input, source: Source
) -> Iterator[tuple[RawRow, str | None, str | None, RowError | None, list[str]]]:
    """For the first rows: the row, its shape, the reason for it, why it can't be read, and what is
    ambiguous about it."""
    finder = ShapeFinder(data.shape, data.columns)
    for raw in islice(read_source(source, text_rows=data.text_rows), SAMPLE):
        if isinstance(raw.value, RowError):
            yield raw, None, None, raw.value, []
            continue
        shape, example = understand(finder, raw.value)
        error = example if isinstance(example, RowError) else None
        if shape is None:
            yield raw, None, None, error, []
            continue
        row = finder.view(raw.value)
        reason = "has the format that was named" if data.shape is not None else shape.fits(row)
        remarks = [
            f"it also {why} ({other.title}), and is read as {shape.title}: name the shape "
            f"'{other.name}' for the other reading"
            for other, why in candidates(row)
            if data.shape is None and other.name not in (shape.name, *shape.includes)
        ]
        remarks += [
            f"its column {name!r} is not read, for {source!r} is mapped to that name"
            for name, source in shadowed(raw.value, data.columns)
        ]
        if shape.name in ("prompt-completion", "feedback") and isinstance(row.get("prompt"), str):
            remarks.append(
                "its prompts are plain text, and are trained without a chat template: map the "
                "columns (user=prompt,assistant=completion) if they are questions for a chat model"
            )
        yield raw, shape.name, reason, error, remarks


def _conclude(result: Detection, readable: int, reasons: Counter[str], notes: Counter[str]) -> None:
    result.reasons = [
        f"{count_rows(count, 'has', 'have')} {reason.removeprefix('has ')}"
        for reason, count in reasons.most_common()
    ]
    result.ambiguous += [f"{count_rows(count)}: {note}." for note, count in notes.most_common()]
    if len(result.shapes) > 1:
        parts = ", ".join(f"{count_rows(n)} as {name}" for name, n in result.shapes.most_common())
        result.ambiguous.append(f"The file mixes formats: {parts}.")
    if result.shapes:
        result.shape = result.shapes.most_common(1)[0][0]
        shape = next(shape for shape in SHAPES if shape.name == result.shape)
        result.title = shape.title
        for column in result.columns:
            column.used = column.name in shape.columns
    elif result.rows and (suggestion := _suggest(result.columns)):
        result.ambiguous.append(suggestion)
    if not readable:
        result.confidence = "unknown" if not result.shapes else "unsure"
    elif readable < 0.95 * result.rows:
        result.confidence = "unsure"
    elif readable < result.rows or result.ambiguous:
        result.confidence = "likely"
    else:
        result.confidence = "certain"


def _suggest(columns: list[Column]) -> str | None:
    """A mapping to propose for columns that no shape knows."""
    texts = [c.name for c in columns if c.types.most_common(1)[0][0] == "a string"]
    question = next((name for q in _QUESTIONS for name in texts if q in name.lower()), None)
    answer = next(
        (name for a in _ANSWERS for name in texts if a in name.lower() and name != question), None
    )
    if question and answer:
        return (
            f"No known format has these columns. If {question!r} holds questions and {answer!r} "
            f"their answers, map them: user={question},assistant={answer}."
        )
    if len(texts) == 1:
        only = texts[0]
        return f"No known format has these columns. If {only!r} is text, map it: text={only}."
    return "No known format has these columns: map them, e.g. user=COLUMN,assistant=COLUMN."
