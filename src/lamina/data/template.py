"""Examples to tokens with a loss mask: what a model reads, and which of it it learns to write.

A conversation is rendered with the tokenizer's own chat template and cut at its assistant turns.
Each part is tokenized by itself and the ids are put end to end, which is how inference sees them:
first the prompt, ending with the header of the assistant's turn, then what the model writes. A
template whose rendering of the beginning of a conversation isn't the beginning of its rendering of
the whole can't be masked this way, and is refused with the reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lamina.data.encoding import PieceEncoder
from lamina.data.foreign import ForeignTemplate
from lamina.data.messages import Conversation, Example, Message, RowError, Text
from lamina.data.shapes import parse_message_list
from lamina.errors import DataError

__all__ = ["Renderer", "Sample"]

#: How many examples are tokenized in one call of the tokenizer, which then works in parallel.
_CHUNK = 256


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence to train on.

    Args:
        input_ids: `[T]` int32.
        loss_mask: `[T]` bool; `loss_mask[t]` means that token t is learned, that is predicted from
            the tokens before it. `loss_mask[0]` is False: nothing comes before the first token.
        row: the number of the row in its dataset, from 0.
    """

    input_ids: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    row: int = 0

    @property
    def num_loss_tokens(self) -> int:
        return int(self.loss_mask.sum())


@dataclass(slots=True)
class _Draft:
    """The pieces of a sample before they are tokenized; `learned` says which the model writes."""

    pieces: list[str]
    learned: list[bool]
    is_text: bool = False


class Renderer:
    """Renders examples for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        stop_ids: further ids that end generation, such as a generation config's `eos_token_id`s.

    Attributes:
        stop_ids: the ids at which generation ends: end of text, end of turn, and those given.
        end_of_turn_id: the token that the chat template puts after an assistant turn, or None.

    Raises:
        DataError: the chat template can't be compiled.
    """

    def __init__(self, tokenizer: Any, *, stop_ids: Iterable[int] = ()):
        self.tokenizer = tokenizer
        self._encoder = PieceEncoder(tokenizer)
        self._bos: int | None = tokenizer.bos_token_id
        self._eos: int | None = tokenizer.eos_token_id
        self._adds_bos = self._bos is not None and self._bos in tokenizer.encode("a")[:1]
        source = tokenizer.get_chat_template() if tokenizer.chat_template else None
        self._template = (
            ForeignTemplate(source, dict(tokenizer.special_tokens_map)) if source else None
        )
        self.end_of_turn_id = self._find_end_of_turn()
        found = {self._eos, self.end_of_turn_id, *stop_ids} - {None}
        self.stop_ids: frozenset[int] = frozenset(int(i) for i in found if i is not None)

    # -- training ---------------------------------------------------------------------------------

    def render(self, example: Example, *, row: int = 0) -> list[Sample]:
        """The samples of one example.

        Raises:
            DataError: the example can't be rendered with this template.
        """
        (result,) = self.render_many([example])
        if isinstance(result, RowError):
            raise DataError(f"Row {row + 1} {result.message}.")
        return [Sample(s.input_ids, s.loss_mask, row) for s in result]

    def render_many(self, examples: Iterable[Example]) -> Iterator[list[Sample] | RowError]:
        """For each example its samples, or why it has none. `Sample.row` counts the examples."""
        source = iter(examples)
        row = 0
        while chunk := list(islice(source, _CHUNK)):
            yield from self._render_chunk(chunk, row)
            row += len(chunk)

    def _render_chunk(self, chunk: list[Example], row: int) -> Iterator[list[Sample] | RowError]:
        drafts: list[_Draft | RowError] = []
        for example in chunk:
            try:
                drafts.append(self._draft(example))
            except RowError as error:
                drafts.append(error)
        encoded = self._encode([draft for draft in drafts if isinstance(draft, _Draft)])
        for offset, draft in enumerate(drafts):
            if isinstance(draft, RowError):
                yield draft
                continue
            try:
                yield [self._assemble(draft, next(encoded), row + offset)]
            except RowError as error:
                yield error

    def _draft(self, example: Example) -> _Draft:
        if isinstance(example, Text):
            return _Draft([example.text], [True], is_text=True)
        pieces: list[str] = []
        learned: list[bool] = []
        for text, message in self._require_template().cut(example):
            pieces.append(text)
            learned.append(message is not None and message.train is not False)
        return _Draft(pieces, learned)

    def _encode(self, drafts: list[_Draft]) -> Iterator[list[list[int]]]:
        """The ids of each draft's pieces."""
        first = iter(self._encoder.start([draft.pieces[0] for draft in drafts]))
        rest = iter(self._encoder.follow([piece for draft in drafts for piece in draft.pieces[1:]]))
        for draft in drafts:
            yield [next(first), *(next(rest) for _ in draft.pieces[1:])]

    def _assemble(self, draft: _Draft, pieces: list[list[int]], row: int) -> Sample:
        ids = self._with_bos(pieces[0])
        mask = [draft.is_text] * len(ids)
        if draft.is_text and self._eos is not None and ids[-1:] != [self._eos]:
            ids = [*ids, self._eos]
            mask.append(True)
        for piece, learned in zip(pieces[1:], draft.learned[1:], strict=True):
            end = self._learned_length(piece) if learned else 0
            ids += piece
            mask += [True] * end + [False] * (len(piece) - end)
        # What comes after the last learned token can't influence anything.
        length = max((t for t, flag in enumerate(mask) if flag), default=-1) + 1
        mask_T = np.array(mask[:length], dtype=np.bool_)
        mask_T[:1] = False
        if not mask_T.any():
            raise RowError("nothing-to-learn", "has no token to learn")
        return Sample(np.array(ids[:length], dtype=np.int32), mask_T, row)

    def _with_bos(self, ids: list[int]) -> list[int]:
        if self._bos is None or not ids:
            return list(ids)
        if ids[:2] == [self._bos, self._bos]:
            raise RowError("double-bos", "starts with two beginning-of-text tokens")
        return [self._bos, *ids] if self._adds_bos and ids[0] != self._bos else list(ids)

    def _learned_length(self, piece: list[int]) -> int:
        """How many tokens of an assistant's piece are learned: up to and with its end of turn."""
        for t in range(len(piece) - 1, -1, -1):
            if piece[t] in self.stop_ids:
                return t + 1
        raise RowError(
            "no-end-of-turn",
            "can't be masked: the chat template ends the assistant's turn with none of the "
            "tokens that end generation",
        )

    # -- generation -------------------------------------------------------------------------------

    def prompt(self, messages: Sequence[Message | dict[str, Any]] | Conversation) -> list[int]:
        """The ids after which the model writes the next assistant turn.

        Args:
            messages: `Message`s, or dicts with `role` and `content`; any roles, in order.

        Raises:
            DataError: there is no message, or the template refuses them.
        """
        try:
            conversation = (
                messages if isinstance(messages, Conversation) else parse_message_list(messages)
            )
            pieces = [text for text, _ in self._require_template().cut(conversation, prompt=True)]
            (ids,) = self._encode([_Draft(pieces, [False] * len(pieces))])
            return [*self._with_bos(ids[0]), *(i for piece in ids[1:] for i in piece)]
        except RowError as error:
            raise DataError(f"The conversation {error.message}.") from None

    def _require_template(self) -> ForeignTemplate:
        if self._template is None:
            raise RowError(
                "no-template", "holds messages, but the model's tokenizer has no chat template"
            )
        return self._template

    def _find_end_of_turn(self) -> int | None:
        """The first special token that the template writes after an assistant's text."""
        if self._template is None:
            return None
        tail = self._template.assistant_tail()
        special = {*self.tokenizer.all_special_ids}
        special |= {i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        ids = self._encoder.follow([tail])[0] if tail else []
        return next((i for i in ids if i in special), None)
