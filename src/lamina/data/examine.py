"""What there is to say about rows one by one, gathered over a block of them.

A block's result is small and the same whether it was examined here or in another process; `check`
puts the results together.
"""

from __future__ import annotations

import io
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from lamina.data.codes import CODES
from lamina.data.fingerprints import answer_of, content_of, fingerprint, prompt_of
from lamina.data.formats import understand
from lamina.data.messages import Example, RowError
from lamina.data.near import Sketch, sketch
from lamina.data.parallel import Message
from lamina.data.pii import PersonalData
from lamina.data.readers import RawRow, parse_lines
from lamina.data.rules import CONTROL_TOKENS, findings, texts_of
from lamina.data.shapes import Shape, ShapeFinder, candidates, present, shadowed, shape_named

__all__ = ["SHOWN", "Examiner", "Result", "examine_block"]

#: Places that a finding names.
SHOWN = 5

#: Answers of a block that are passed on: those it has at least so often, if it is a large one.
_OFTEN, _LARGE_BLOCK = 2, 100


@dataclass
class Result:
    """What was found in a block of rows, which are numbered from 0.

    Args:
        lines: the line of each row.
        bad: the rows that have an error.
        shapes: how many rows have each shape.
        counts: how many times each code was found.
        first: for each code, the first rows that have it, with what is wrong.
        usable: the rows that could be understood; `contents` and `prompts` have their hashes.
        answers: answers that several rows share: how many, and one of them.
        sketches: of the usable rows, for finding near duplicates.
    """

    lines: array[int] = field(default_factory=lambda: array("q"))
    bad: set[int] = field(default_factory=set)
    shapes: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, list[tuple[int, str]]] = field(default_factory=dict)
    usable: array[int] = field(default_factory=lambda: array("Q"))
    contents: array[int] = field(default_factory=lambda: array("Q"))
    prompts: array[int] = field(default_factory=lambda: array("Q"))
    answers: dict[str, tuple[int, int]] = field(default_factory=dict)
    sketches: Sketch | None = None

    def add(self, code: str, row: int, message: str) -> None:
        self.counts[code] += 1
        if CODES[code].severity == "error":
            self.bad.add(row)
        shown = self.first.setdefault(code, [])
        if len(shown) < SHOWN:
            shown.append((row, message))

    def to_message(self) -> Message:
        values = {
            "bad": sorted(self.bad),
            "shapes": self.shapes,
            "counts": self.counts,
            "first": self.first,
            "answers": self.answers,
        }
        arrays = (self.lines, self.usable, self.contents, self.prompts)
        sketches = self.sketches.to_blobs() if self.sketches else []
        return Message(values, [*(a.tobytes() for a in arrays), *sketches])

    @staticmethod
    def from_message(message: Message) -> Result:
        values, blobs = message.values, message.blobs
        result = Result(
            bad=set(values["bad"]),
            shapes=Counter(values["shapes"]),
            counts=Counter(values["counts"]),
            first={code: [(r, text) for r, text in rows] for code, rows in values["first"].items()},
            answers={answer: (n, row) for answer, (n, row) in values["answers"].items()},
            sketches=Sketch.from_blobs(blobs[4:]) if len(blobs) > 4 else None,
        )
        arrays = (result.lines, result.usable, result.contents, result.prompts)
        for target, blob in zip(arrays, blobs, strict=False):
            target.frombytes(blob)
        return result


class Examiner:
    """Examines rows.

    Args:
        shape, columns: how rows are understood (see `Input`).
        prompts: also hash what each row asks.
        near: also make sketches for finding near duplicates.
        personal_data: finds personal data, or None not to look for it.
        control: what a control token looks like.
    """

    def __init__(
        self,
        *,
        shape: Shape | None = None,
        columns: dict[str, str] | None = None,
        prompts: bool = False,
        near: bool = False,
        personal_data: PersonalData | None = None,
        control: re.Pattern[str] = CONTROL_TOKENS,
    ):
        self.finder = ShapeFinder(shape, columns)
        self._shape = shape
        self._columns = columns or {}
        self._prompts = prompts
        self._near = near
        self._personal_data = personal_data
        self._control = control
        self._known: dict[tuple[str, ...], list[tuple[str, str]]] = {}

    def examine(self, rows: Iterable[tuple[RawRow, Shape | None, Example | RowError]]) -> Result:
        """What there is to say about these rows."""
        result = Result()
        answers: Counter[str] = Counter()
        where: dict[str, int] = {}
        texts: list[str] = []
        for number, (raw, shape, example) in enumerate(rows):
            result.lines.append(raw.line)
            for code, message in self._findings(raw, shape, example):
                result.add(code, number, message)
            if shape is not None:
                result.shapes[shape.name] += 1
            if isinstance(example, RowError):
                continue
            result.usable.append(number)
            result.contents.append(fingerprint(content_of(example)))
            if self._prompts:
                result.prompts.append(fingerprint(prompt_of(example)))
            if answer := answer_of(example):
                answers[answer] += 1
                where.setdefault(answer, number)
            if self._near:
                texts.append(" ".join(text for _, text in texts_of(example)))
        often = _OFTEN if len(result.lines) >= _LARGE_BLOCK else 1
        result.answers = {a: (n, where[a]) for a, n in answers.items() if n >= often}
        if self._near:
            result.sketches = sketch(texts)
        return result

    def _findings(
        self, raw: RawRow, shape: Shape | None, example: Example | RowError
    ) -> Iterator[tuple[str, str]]:
        for note in raw.notes:
            yield note, "has NaN or Infinity, which JSON doesn't know"
        if isinstance(example, RowError):
            yield example.code, example.message
            return
        yield from findings(example, self._control)
        if isinstance(raw.value, dict) and len(raw.value) > 1:
            yield from self._column_findings(raw.value, shape)
        if self._personal_data is not None:
            for place, text in texts_of(example):
                for kind in self._personal_data.kinds(text):
                    yield "pii", f"has {kind} in {place}"

    def _column_findings(self, value: dict[str, Any], shape: Shape | None) -> list[tuple[str, str]]:
        """What its columns say, looked at once for each combination of them."""
        key = tuple(present(value))
        known = self._known.get(key)
        if known is None:
            known = []
            assert shape is not None
            hidden = shadowed(value, self._columns)
            read = {*shape.columns, *self._columns.values()} - {name for name, _ in hidden}
            if unknown := [repr(k) for k in key if k not in read]:
                message = f"has columns that are not trained: {', '.join(unknown)}"
                known.append(("unknown-columns", message + _why_hidden(hidden)))
            for other, why in candidates(self.finder.view(value)) if self._shape is None else ():
                if other.name not in (shape.name, *shape.includes):
                    known.append(("ambiguous", f"is read as {shape.title}, but also {why}"))
            self._known[key] = known
        return known


def _why_hidden(hidden: list[tuple[str, str]]) -> str:
    whys = [f"{source!r} is read as {name!r}, as mapped" for name, source in hidden]
    return f" ({', '.join(whys)})" if whys else ""


_EXAMINERS: dict[str, Examiner] = {}


def examine_block(options: dict[str, Any], first: int, data: bytes) -> Message:
    """`parallel`'s task: examine the rows in lines of JSON.

    Args:
        options: `shape`, `columns`, `prompts` and `near` of an `Examiner`.
        first: the number of the first line.
    """
    key = str(options)
    examiner = _EXAMINERS.get(key)
    if examiner is None:
        shape = options["shape"]
        examiner = _EXAMINERS[key] = Examiner(
            shape=shape and shape_named(shape),
            columns=options["columns"],
            prompts=options["prompts"],
            near=options["near"],
        )
    finder = examiner.finder
    rows = (
        (raw, None, raw.value)
        if isinstance(raw.value, RowError)
        else (raw, *understand(finder, raw.value))
        for raw in parse_lines(io.BytesIO(data), first)
    )
    return examiner.examine(rows).to_message()
