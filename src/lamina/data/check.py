"""All that is wrong with a dataset, in one pass: mistakes in rows, duplicates, leakage.

Each finding has a code (see `codes`), how many rows have it, the first of them, and what to do.
"""

from __future__ import annotations

import re
import time
from array import array
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from lamina.data.codes import CODES, Severity
from lamina.data.examine import SHOWN, Examiner, Result, examine_block
from lamina.data.fingerprints import FrequentAnswers, HashIndex
from lamina.data.formats import Input, Places, Row
from lamina.data.messages import RowError
from lamina.data.near import NearIndex
from lamina.data.parallel import line_blocks, map_blocks
from lamina.data.pii import PersonalData
from lamina.data.rules import CONTROL_TOKENS, texts_of

if TYPE_CHECKING:
    from lamina.data.template import Renderer

__all__ = ["Finding", "Report", "check"]

#: Rows that are tokenized at a time.
_BATCH = 1024

#: An answer is suspicious if this share of the rows, and at least so many, have it.
_CONSTANT_SHARE, _CONSTANT_ROWS = 0.2, 20


@dataclass
class Finding:
    """Rows that have one thing wrong with them.

    Args:
        count: how many rows (or files, if the mistake is a file's).
        first: the first of them, each as a sentence with its place.
    """

    code: str
    severity: Severity
    title: str
    advice: str
    count: int = 0
    first: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What `check` found.

    Args:
        rows: rows read.
        bad_rows: rows with at least one error.
        shapes: how many rows have each shape.
        findings: errors first, then warnings, then notes; each by how many rows have it.
        seconds: time spent, in all and on near duplicates (`near`) and tokens (`tokens`).
    """

    rows: int
    bad_rows: int
    shapes: Counter[str]
    findings: list[Finding]
    seconds: dict[str, float]

    @property
    def ok(self) -> bool:
        """Whether there is no error."""
        return not any(finding.severity == "error" for finding in self.findings)


class _Findings:
    def __init__(self) -> None:
        self.by_code: dict[str, Finding] = {}

    def add(self, code: str, count: int, sentences: Iterable[str]) -> None:
        """Add so many findings, of which the sentences tell the first."""
        if code not in self.by_code:
            known = CODES[code]
            self.by_code[code] = Finding(code, known.severity, known.title, known.advice)
        finding = self.by_code[code]
        finding.count += count
        finding.first += islice(sentences, SHOWN - len(finding.first))

    def sorted(self) -> list[Finding]:
        order = {"error": 0, "warning": 1, "note": 2}
        return sorted(self.by_code.values(), key=lambda f: (order[f.severity], -f.count, f.code))


def check(
    data: Input,
    *,
    eval_data: Input | None = None,
    renderer: Renderer | None = None,
    max_length: int | None = None,
    near_duplicates: bool = True,
    personal_data: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Report:
    """Look for everything that can be wrong with a dataset.

    Args:
        eval_data: the data that the model will be evaluated on, to be looked for in `data`.
        renderer: with it, rows are tokenized: what the template refuses and what is too long is
            found, and the tokenizer's own control tokens in texts.
        max_length: the most tokens a row may have; needs a `renderer`.
        near_duplicates: also look for rows that are nearly the same, which takes longest.
        personal_data: also look for personal data (needs the package presidio-analyzer).
        progress: called with the number of rows read, now and then.

    Raises:
        DataError: the data can't be read at all.
    """
    begin = time.perf_counter()
    checker = _Checker(data, eval_data, near=near_duplicates)
    pii = PersonalData() if personal_data else None
    options = _Options(renderer, max_length, near_duplicates, pii, eval_data is not None, checker)
    try:
        for source, result in _results(data, options):
            checker.add(source, result)
            if progress is not None:
                progress(checker.rows)
        # Of the evaluation data only its rows are wanted, not its mistakes.
        plain = replace(options, renderer=None, personal_data=None)
        for source, result in _results(eval_data, plain) if eval_data else ():
            checker.add_eval(source, result)
        report = checker.finish()
    finally:
        checker.close()
    report.seconds["all"] = time.perf_counter() - begin
    return report


@dataclass(frozen=True)
class _Options:
    renderer: Renderer | None
    max_length: int | None
    near: bool
    personal_data: PersonalData | None
    prompts: bool
    checker: _Checker


def _results(data: Input, options: _Options) -> Iterator[tuple[int, Result]]:
    """The results of blocks of rows, each with the index of its source."""
    alone = options.renderer is None and options.personal_data is None
    for index, source in enumerate(data.sources):
        if alone and source.container == "jsonl":
            given = {
                "shape": data.shape and data.shape.name,
                "columns": data.columns,
                "prompts": options.prompts,
                "near": options.near,
            }
            blocks = line_blocks(index, source)
            size = source.path.stat().st_size
            for block, message in map_blocks("check", examine_block, given, blocks, size):
                yield block.source, Result.from_message(message)
        else:
            yield from ((index, result) for result in _examined(data, index, options))


def _examined(data: Input, index: int, options: _Options) -> Iterator[Result]:
    """The results of one source, examined in this process."""
    renderer = options.renderer
    examiner = Examiner(
        shape=data.shape,
        columns=data.columns,
        prompts=options.prompts,
        near=options.near,
        personal_data=options.personal_data,
        control=_control_tokens(renderer),
    )
    lossy = renderer is not None and not renderer.is_lossless()
    rows = data.rows_of(index)
    while batch := list(islice(rows, _BATCH)):
        result = examiner.examine((row.raw, row.shape, row.example) for row in batch)
        if renderer is not None:
            begin = time.perf_counter()
            _examine_tokens(result, batch, renderer, options.max_length, lossy)
            options.checker.seconds["tokens"] += time.perf_counter() - begin
        yield result


def _examine_tokens(
    result: Result, batch: list[Row], renderer: Renderer, max_length: int | None, lossy: bool
) -> None:
    """Add what is only seen when rows are tokenized."""
    numbers = [k for k, row in enumerate(batch) if not isinstance(row.example, RowError)]
    examples = [row.example for row in batch if not isinstance(row.example, RowError)]
    for number, rendered in zip(numbers, renderer.render_many(examples), strict=True):
        if isinstance(rendered, RowError):
            result.add(rendered.code, number, rendered.message)
            continue
        longest = max((len(sample.input_ids) for sample in rendered), default=0)
        if max_length is not None and longest > max_length:
            result.add("too-long", number, f"has {longest} tokens")
    for number, example in zip(numbers, examples, strict=True) if lossy else ():
        for place, text in texts_of(example):
            if not text.isascii() and not renderer.keeps(text):
                result.add("unencodable", number, f"loses characters of {place}")
                break


class _Checker:
    """Puts the results of blocks together. Rows are numbered through; evaluation rows, from the
    number of training rows on."""

    def __init__(self, data: Input, eval_data: Input | None, *, near: bool):
        self.data, self.eval_data = data, eval_data
        self.findings = _Findings()
        self.places = Places(data.sources)
        self.eval_places = Places(eval_data.sources if eval_data else [])
        self.contents = HashIndex()
        self.prompts = HashIndex()
        self.near = NearIndex() if near else None
        self.near_rows = array("Q")
        self.answers = FrequentAnswers()
        self.shapes: Counter[str] = Counter()
        self.rows = self.bad_rows = 0
        self.seconds = {"all": 0.0, "near": 0.0, "tokens": 0.0}

    def close(self) -> None:
        self.contents.close()
        self.prompts.close()
        if self.near is not None:
            self.near.close()

    def add(self, source: int, result: Result) -> None:
        """Add the rows of a block."""
        start = self.rows
        self.places.add(source, result.lines)
        self.rows += len(result.lines)
        self.bad_rows += len(result.bad)
        self.shapes.update(result.shapes)
        for code, count in result.counts.items():
            first = result.first[code]
            sentences = (f"{self._name(start + row)} {message}." for row, message in first)
            self.findings.add(code, count, sentences)
        for answer, (count, row) in result.answers.items():
            self.answers.add(answer, start + row, count)
        self.answers.rows += len(result.usable)
        self._index(result, start)

    def add_eval(self, source: int, result: Result) -> None:
        """Add evaluation rows, after all training rows."""
        start = self.rows + len(self.eval_places.lines)
        self.eval_places.add(source, result.lines)
        self._index(result, start)

    def _index(self, result: Result, start: int) -> None:
        rows = np.frombuffer(result.usable, dtype=np.uint64) + np.uint64(start)
        self.contents.extend(np.frombuffer(result.contents, dtype=np.uint64), rows)
        if result.prompts:
            self.prompts.extend(np.frombuffer(result.prompts, dtype=np.uint64), rows)
        if self.near is not None and result.sketches is not None:
            begin = time.perf_counter()
            self.near.add(result.sketches)
            self.near_rows.frombytes(rows.tobytes())
            self.seconds["near"] += time.perf_counter() - begin

    def finish(self) -> Report:
        for source in self.data.sources:
            if source.bom:
                self.findings.add("bom", 1, [f"{source.name} starts with a byte order mark."])
        self._repeated()
        self._nearly_repeated()
        self._constant_answers()
        if len(self.shapes) > 1:
            parts = ", ".join(f"{n} {name}" for name, n in self.shapes.most_common())
            self.findings.add("mixed-shapes", 1, [f"{self.data.name} mixes formats: {parts}."])
        found = self.findings.sorted()
        return Report(self.rows, self.bad_rows, self.shapes, found, self.seconds)

    def _name(self, index: int) -> str:
        if index < self.rows:
            return self.places.name(index)
        return self.eval_places.name(index - self.rows)

    def _repeated(self) -> None:
        """Rows that are the same, and rows with the same question as an evaluation row."""
        offset = self.rows
        #: Rows that are found to be the same as another: they aren't nearly so.
        self._same = bytearray(offset // 8 + 1)
        self._tell(self._equal_rows(offset), "is the same as")
        self._tell(self._equal_prompts(offset), "has the question of")

    def _equal_rows(self, offset: int) -> Iterator[tuple[str, int, int]]:
        self._leaked = bytearray(offset // 8 + 1)
        for group in self.contents.groups():
            places = group.tolist()
            train = [place for place in places if place < offset]
            others = [place for place in places if place >= offset]
            for place in train[0 if others else 1 :]:
                self._same[place // 8] |= 1 << place % 8
                if others:
                    self._leaked[place // 8] |= 1 << place % 8
                    yield "leakage", place, others[0]
                if place != train[0]:
                    yield "duplicate", place, train[0]

    def _equal_prompts(self, offset: int) -> Iterator[tuple[str, int, int]]:
        for group in self.prompts.groups():
            places = group.tolist()
            other = next((place for place in places if place >= offset), None)
            if other is None:
                continue
            for place in places:
                if place < offset and not self._leaked[place // 8] >> place % 8 & 1:
                    yield "prompt-leakage", place, other

    def _nearly_repeated(self) -> None:
        if self.near is None:
            return
        start = time.perf_counter()
        offset = self.rows
        others = np.full(offset, -1, dtype=np.int64)
        similarities = np.zeros(offset, dtype=np.float32)
        for first, second, similarity in self.near.pairs():
            one, two = self.near_rows[first], self.near_rows[second]
            if one >= offset:
                continue
            place, other = (one, two) if two >= offset else (two, one)
            if self._same[place // 8] >> place % 8 & 1:
                continue
            # Likeness to an evaluation row is worse than to another training row.
            if other >= offset or others[place] < 0:
                others[place], similarities[place] = other, similarity
        for code, found in (
            ("near-leakage", np.flatnonzero(others >= offset)),
            ("near-duplicate", np.flatnonzero((others >= 0) & (others < offset))),
        ):
            sentences = (
                f"{self._name(place)} is {similarities[place]:.0%} the same as "
                f"{self._name(int(others[place]))}."
                for place in found[:SHOWN].tolist()
            )
            if len(found):
                self.findings.add(code, len(found), sentences)
        self.seconds["near"] += time.perf_counter() - start

    def _tell(self, found: Iterable[tuple[str, int, int]], what: str) -> None:
        """Add findings: a code, a row, and another that it is like."""
        counts: Counter[str] = Counter()
        first: defaultdict[str, list[tuple[int, int]]] = defaultdict(list)
        for code, place, other in found:
            counts[code] += 1
            insort(first[code], (place, other))
            del first[code][SHOWN:]
        for code, count in counts.items():
            sentences = (f"{self._name(a)} {what} {self._name(b)}." for a, b in first[code])
            self.findings.add(code, count, sentences)

    def _constant_answers(self) -> None:
        for answer, count, place in self.answers.above(_CONSTANT_SHARE, _CONSTANT_ROWS):
            message = f"{self._name(place)} and others share the answer {answer!r}."
            self.findings.add("constant-answers", count, [message])


def _control_tokens(renderer: Renderer | None) -> re.Pattern[str]:
    """What a control token written in a text looks like."""
    if renderer is None:
        return CONTROL_TOKENS
    own = sorted(renderer.special_tokens(), key=len, reverse=True)
    return re.compile("|".join([*map(re.escape, own), CONTROL_TOKENS.pattern]))
