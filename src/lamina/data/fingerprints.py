"""Finding rows that are the same, in memory that doesn't grow with their number.

A row's content becomes a 64-bit hash (two different rows of a million share one with a probability
of 3e-8). Hashes wait in memory, 16 bytes a row with its place; past a limit they go to temporary
files, split by their first bits, so that each part can be sorted by itself.
"""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Iterable, Iterator
from typing import IO

import numpy as np
import xxhash
from numpy.typing import NDArray

from lamina.data.messages import (
    Conversation,
    Example,
    Feedback,
    Message,
    Preference,
    Segments,
    Text,
    Tokens,
)

__all__ = ["FrequentAnswers", "HashIndex", "answer_of", "content_of", "fingerprint", "prompt_of"]

_PARTS = 64


def fingerprint(content: str) -> int:
    """A 64-bit hash of a content."""
    return xxhash.xxh3_64_intdigest(content.encode("utf-8", "surrogatepass"))


def content_of(example: Example) -> str:
    """All that an example says, as one string that no other example has."""
    match example:
        case Conversation(messages, tools):
            return _messages(messages) + (f"\x1d{tools}" if tools else "")
        case Text(text):
            return f"text\x1d{text}"
        case Segments(segments, closed):
            return "\x1d".join([str(closed), *(f"{s.train}\x1e{s.text}" for s in segments)])
        case Tokens(input_ids, labels):
            return f"{input_ids}\x1d{labels}"
        case Preference(prompt, chosen, rejected, tools):
            parts = (_part(prompt), _part(chosen), _part(rejected), str(tools))
            return "\x1c".join(("preference", *parts))
        case Feedback(prompt, completion, label, tools):
            return "\x1c".join((str(label), _part(prompt), _part(completion), str(tools)))


def prompt_of(example: Example) -> str:
    """What an example asks: all that stands before its last answer; empty if that is nothing."""
    match example:
        case Conversation(messages):
            last = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=0)
            return _messages(messages[:last])
        case Segments(segments):
            return "".join(s.text for s in segments if not s.train)
        case Preference(prompt) | Feedback(prompt):
            return _part(prompt)
        case _:
            return ""


def answer_of(example: Example) -> str:
    """The last answer of an example; empty if it has none."""
    match example:
        case Conversation(messages):
            last = messages[-1]
            return last.content if last.role == "assistant" else ""
        case Segments(segments):
            return segments[-1].text
        case Preference(_, chosen):
            return _part(chosen)
        case Feedback(_, completion):
            return _part(completion)
        case _:
            return ""


def _part(part: list[Message] | str) -> str:
    return part if isinstance(part, str) else _messages(part)


def _messages(messages: list[Message]) -> str:
    parts: list[str] = []
    for m in messages:
        parts.append(m.role)
        parts.append(m.content)
        if m.tool_calls or m.train is not None or m.name or m.tool_call_id:
            parts.append(f"\x1e{m.tool_calls}\x1e{m.train}\x1e{m.name}\x1e{m.tool_call_id}")
    return "\x1d".join(parts)


class HashIndex:
    """Hashes with a number each (a place), and the groups that share a hash.

    Args:
        limit: entries kept in memory before they go to temporary files.
    """

    def __init__(self, limit: int = 2_000_000):
        self._limit = limit
        self._hashes = array("Q")
        self._places = array("Q")
        self._files: list[IO[bytes]] = []

    def add(self, value: int, place: int) -> None:
        self._hashes.append(value)
        self._places.append(place)
        if len(self._hashes) >= self._limit:
            self._spill()

    def extend(self, values: NDArray[np.uint64], places: NDArray[np.uint64]) -> None:
        self._hashes.frombytes(values.tobytes())
        self._places.frombytes(places.tobytes())
        if len(self._hashes) >= self._limit:
            self._spill()

    def close(self) -> None:
        for file in self._files:
            file.close()
        self._files = []

    def groups(self) -> Iterator[NDArray[np.uint64]]:
        """The places of each hash that was added more than once, in the order they were added; the
        index is empty afterwards."""
        try:
            if self._files:
                self._spill()
                for file in self._files:
                    file.seek(0)
                    pairs = np.frombuffer(file.read(), dtype=np.uint64).reshape(-1, 2)
                    yield from _groups(pairs[:, 0], pairs[:, 1])
            elif self._hashes:
                hashes = np.frombuffer(self._hashes, dtype=np.uint64)
                yield from _groups(hashes, np.frombuffer(self._places, dtype=np.uint64))
        finally:
            self.close()
            self._hashes, self._places = array("Q"), array("Q")

    def _spill(self) -> None:
        if not self._files:
            self._files = [tempfile.TemporaryFile() for _ in range(_PARTS)]  # noqa: SIM115
        hashes = np.frombuffer(self._hashes, dtype=np.uint64)
        pairs = np.stack([hashes, np.frombuffer(self._places, dtype=np.uint64)], axis=1)
        parts = (hashes >> np.uint64(58)).astype(np.uint8)
        order = np.argsort(parts, kind="stable")
        ends = np.searchsorted(parts[order], np.arange(_PARTS + 1))
        for part, file in enumerate(self._files):
            file.write(pairs[order[ends[part] : ends[part + 1]]].tobytes())
        self._hashes, self._places = array("Q"), array("Q")


def _groups(hashes: NDArray[np.uint64], places: NDArray[np.uint64]) -> Iterator[NDArray[np.uint64]]:
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1], True])
    sizes = np.diff(starts)
    for k in np.flatnonzero(sizes > 1):
        yield places[order[starts[k] : starts[k + 1]]]


class FrequentAnswers:
    """Answers that many rows share, in constant memory (the Misra-Gries sketch): every answer that
    more than one row in `slots` has is found, with a lower bound of its count.

    Args:
        slots: how many answers are followed at a time.
    """

    def __init__(self, slots: int = 256):
        self._slots = slots
        self._counts: dict[str, int] = {}
        self._places: dict[str, int] = {}
        self.rows = 0

    def add(self, answer: str, place: int, count: int = 1) -> None:
        """Add an answer that `count` rows have. The caller adds the rows to `rows`."""
        counts = self._counts
        if answer in counts:
            counts[answer] += count
            return
        if len(counts) >= self._slots:
            # Make room: take as much from all as from the rarest, or as this one has.
            least = min(count, *counts.values())
            count -= least
            for other in list(counts):
                counts[other] -= least
                if not counts[other]:
                    del counts[other], self._places[other]
        if count:
            counts[answer] = count
            self._places[answer] = place

    def above(self, share: float, at_least: int) -> Iterable[tuple[str, int, int]]:
        """The beginnings of answers that at least that share of all rows have, with their count
        (a lower bound) and the place of one."""
        for answer, count in sorted(self._counts.items(), key=lambda item: -item[1]):
            if count >= max(share * self.rows, at_least):
                yield answer[:60], count, self._places[answer]
