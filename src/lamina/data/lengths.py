"""What happens to samples that are longer than a run allows.

The policies are in `POLICIES`. An *exchange* is a user's turn with all that follows it, up to the
next one: calls of tools are never separated from their results. No sample is left without a token
to learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

from lamina.data.messages import (
    Conversation,
    Example,
    Feedback,
    Message,
    Preference,
    RowError,
    Segments,
    Text,
    Tokens,
)
from lamina.data.template import Renderer, Sample, answered

__all__ = ["POLICIES", "TooLong", "fit"]

TooLong = Literal["drop", "truncate", "split"]

POLICIES: dict[TooLong, str] = {
    "drop": "they are left out",
    "truncate": "a conversation loses its last exchanges, down to one that fits; if not even the "
    "first exchange does, its answer is cut; of a text, the beginning is kept",
    "split": "a conversation becomes several, cut between exchanges, each with the system prompt; "
    "a text becomes windows, in which every token is learned once",
}


def fit(
    renderer: Renderer, example: Example, samples: list[Sample], limit: int, policy: TooLong
) -> list[Sample]:
    """The samples of an example, some of which are too long, under a policy; perhaps none.

    Args:
        samples: the example as rendered.
        limit: the most tokens that a sample may have.
    """
    shorter: list[Sample] = []
    if policy == "drop":
        return [sample for sample in samples if len(sample.input_ids) <= limit]
    match example:
        case Preference(prompt, chosen, _, tools):
            return fit(renderer, answered(prompt, chosen, tools), samples, limit, policy)
        case Feedback(prompt, completion, _, tools):
            return fit(renderer, answered(prompt, completion, tools), samples, limit, policy)
        case Conversation():
            shorter = _Turns(renderer, example, limit).fit(policy)
        case Text() if policy == "split":
            shorter = _windows(samples[0], limit)
        case Text() | Segments() | Tokens():
            shorter = _cut(samples[0], limit)
    row = samples[0].row
    return [replace(sample, row=row) for sample in shorter]


def _cut(sample: Sample, limit: int) -> list[Sample]:
    """The beginning of a sample, up to its last learned token; nothing if none is left."""
    mask = sample.loss_mask[:limit]
    if not mask.any():
        return []
    end = int(mask.nonzero()[0][-1]) + 1
    return [replace(sample, input_ids=sample.input_ids[:end], loss_mask=mask[:end])]


def _windows(sample: Sample, limit: int) -> list[Sample]:
    """Consecutive parts. Each begins with the last token of the part before, as its context."""
    parts = []
    start = 0
    while start < len(sample.input_ids) - 1 and limit > 1:
        ids = sample.input_ids[start : start + limit]
        mask = sample.loss_mask[start : start + limit].copy()
        mask[0] = False
        if mask.any():
            parts.append(replace(sample, input_ids=ids, loss_mask=mask))
        start += limit - 1
    return parts


class _Turns:
    """Finds parts of a conversation that fit."""

    def __init__(self, renderer: Renderer, conversation: Conversation, limit: int):
        self._renderer = renderer
        self._limit = limit
        self._whole = conversation
        messages = conversation.messages
        start = next((i for i, m in enumerate(messages) if m.role != "system"), 0)
        self._head = messages[:start]
        self._exchanges = _exchanges(messages[start:])

    def fit(self, policy: TooLong) -> list[Sample]:
        if self._renderer.mask == "last":
            return self._end()
        count = len(self._exchanges)
        samples: list[Sample] = []
        first = 0
        while first < count:
            size = _largest(count - first, partial(self._fits, first))
            if size:
                samples += self._render(first, first + size) or []
            else:
                size = 1
                samples += self._cut_answer(first)
            first += size
            if policy == "truncate":
                break
        return samples

    def _end(self) -> list[Sample]:
        """Only the last turn is learned: leave out the oldest exchanges."""
        count = len(self._exchanges)
        size = _largest(count, lambda n: self._fits(count - n, n))
        return (self._render(count - size, count) or []) if size else self._cut_answer(count - 1)

    def _render(self, first: int, last: int) -> list[Sample] | None:
        """The samples of exchanges `[first, last)`; None if they can't be rendered."""
        turns = [m for exchange in self._exchanges[first:last] for m in exchange]
        (result,) = self._renderer.render_many([replace(self._whole, messages=self._head + turns)])
        return None if isinstance(result, RowError) else result

    def _fits(self, first: int, size: int) -> bool:
        samples = self._render(first, first + size)
        # What has nothing to learn takes no room.
        return samples is None or all(len(s.input_ids) <= self._limit for s in samples)

    def _cut_answer(self, exchange: int) -> list[Sample]:
        """One exchange that is too long, its answer cut; unless it calls tools."""
        if any(m.tool_calls or m.role == "tool" for m in self._exchanges[exchange]):
            return []
        samples = self._render(exchange, exchange + 1) or []
        return [part for sample in samples for part in _cut(sample, self._limit)]


def _exchanges(messages: Sequence[Message]) -> list[list[Message]]:
    exchanges: list[list[Message]] = []
    before = ""
    for message in messages:
        if not exchanges or (message.role == "user" and before != "user"):
            exchanges.append([])
        exchanges[-1].append(message)
        before = message.role
    return exchanges


def _largest(most: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `most` that fits, where more never fits better than less."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
