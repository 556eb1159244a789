"""Examples to tokens with a loss mask: what a model reads, and which of it it learns to write.

A conversation is written by a chat template in pieces: Llama 4's and Mixtral 8x22B's own, or the
template that comes with the tokenizer, cut at its assistant turns. Each piece is tokenized by
itself and the ids are put end to end, which is how inference sees them: first the prompt, ending
with the header of the assistant's turn, then what the model writes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lamina.data.chat import llama4, mixtral
from lamina.data.chat.foreign import ForeignTemplate
from lamina.data.chat.pieces import ChatTemplate, Mask, Piece
from lamina.data.encoding import PieceEncoder
from lamina.data.messages import (
    Conversation,
    Example,
    Feedback,
    Message,
    Preference,
    RowError,
    Segment,
    Segments,
    Text,
    Tokens,
)
from lamina.data.shapes import parse_message_list
from lamina.errors import DataError

__all__ = ["Renderer", "Sample", "TemplateName", "answered"]

TemplateName = Literal["auto", "tokenizer", "llama4", "mixtral"]

#: How many examples go to the tokenizer at once, and how many characters at least end that.
_CHUNK, _CHUNK_CHARS = 128, 1 << 20


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

    @property
    def labels(self) -> NDArray[np.int32]:
        """`[T]`: the token itself where it is learned, else -100."""
        return np.where(self.loss_mask, self.input_ids, np.int32(-100))


@dataclass(slots=True)
class _Draft:
    """A sample before it is tokenized.

    Args:
        end: whether an end of text is to follow, and to be learned.
        begin: whether the tokenizer's beginning of text is to stand first, if it has one.
    """

    pieces: list[Piece]
    end: Literal["no", "read", "learn"] = "no"
    begin: bool = True


class Renderer:
    """Renders examples for one tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        stop_ids: further ids that end generation, such as a generation config's `eos_token_id`s.
        mask: what is learned of a conversation; `all` also learns the prompts of plain text.
        template: whose chat template; `auto` takes ours for Llama 4 and Mixtral 8x22B, known by
            their control tokens, and else the tokenizer's.

    Attributes:
        stop_ids: the ids at which generation ends: end of text, end of turn, and those given.
        end_of_turn_id: the token that the chat template puts after an assistant turn, or None.
        template_name: the template in use: `llama4`, `mixtral`, `tokenizer`, or None.

    Raises:
        DataError: the chat template can't be compiled, or isn't for this tokenizer.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        stop_ids: Iterable[int] = (),
        mask: Mask = "assistant",
        template: TemplateName = "auto",
    ):
        self.tokenizer = tokenizer
        self.mask: Mask = mask
        self._encoder = PieceEncoder(tokenizer)
        self._bos: int | None = tokenizer.bos_token_id
        self._eos: int | None = tokenizer.eos_token_id
        self._adds_bos = self._bos is not None and self._bos in tokenizer.encode("a")[:1]
        self._template: ChatTemplate | None = None
        found = {self._eos, *stop_ids}
        own = self._own_template(template)
        if own is not None:
            self._template = own
            self.end_of_turn_id: int | None = own.stop_ids[-1]
            found |= {*own.stop_ids}
        else:
            foreign = self._foreign_template()
            self._template = foreign
            self.end_of_turn_id = self._find_end_of_turn(foreign) if foreign else None
            found.add(self.end_of_turn_id)
        self.template_name: str | None = self._template.name if self._template else None
        self.stop_ids: frozenset[int] = frozenset(int(i) for i in found if i is not None)

    # -- training ---------------------------------------------------------------------------------

    def render(self, example: Example, *, row: int = 0) -> list[Sample]:
        """The samples of one example: one, but none of an answer that somebody disliked, and
        several where Mixtral's template needs them.

        Raises:
            DataError: the example can't be rendered with this template.
        """
        (result,) = self.render_many([example])
        if isinstance(result, RowError):
            raise DataError(f"Row {row + 1} {result.message}.")
        return [replace(sample, row=row) for sample in result]

    def render_many(
        self, examples: Iterable[Example | RowError]
    ) -> Iterator[list[Sample] | RowError]:
        """For each example its samples, or why it has none; a `RowError` is passed on. `Sample.row`
        counts the examples. Some are taken before the results of those ahead of them are given."""
        row = 0
        for groups, encoded in self._encoder.encode_all(self._chunks(iter(examples))):
            rest = iter(encoded)
            for group in groups:
                yield self._assembled(group, rest, row)
                row += 1

    def _chunks(
        self, source: Iterator[Example | RowError]
    ) -> Iterator[tuple[list[list[_Draft] | RowError], list[list[Piece]]]]:
        """Drafts of the examples, some at a time, and the pieces of all these drafts."""
        groups: list[list[_Draft] | RowError] = []
        samples: list[list[Piece]] = []
        size = 0
        for example in source:
            try:
                drafts = self._drafts(example)
                groups.append(drafts)
            except RowError as error:
                drafts = []
                groups.append(error)
            for draft in drafts:
                samples.append(draft.pieces)
                size += sum(len(piece.text) for piece in draft.pieces)
            if len(groups) == _CHUNK or size >= _CHUNK_CHARS:
                yield groups, samples
                groups, samples, size = [], [], 0
        if groups:
            yield groups, samples

    def _assembled(
        self, group: list[_Draft] | RowError, encoded: Iterator[list[list[int]]], row: int
    ) -> list[Sample] | RowError:
        if isinstance(group, RowError):
            return group
        ids = list(islice(encoded, len(group)))
        try:
            return [
                self._assemble(draft, pieces, row) for draft, pieces in zip(group, ids, strict=True)
            ]
        except RowError as error:
            return error

    def _drafts(self, example: Example | RowError) -> list[_Draft]:
        match example:
            case RowError():
                raise example
            case Preference(prompt, chosen, _, tools):
                shown: Example = answered(prompt, chosen, tools)
            case Feedback(prompt, completion, label, tools):
                if not label:
                    return []
                shown = answered(prompt, completion, tools)
            case _:
                shown = example
        match shown:
            case Conversation():
                samples = self._require_template().samples(shown, self.mask)
                drafts = [_Draft(pieces) for pieces in samples]
            case Segments():
                drafts = [self._segments(shown)]
            case Tokens():
                drafts = [self._tokens(shown)]
            case Text(text):
                drafts = [_Draft([Piece(text, learn="all")], end="learn")]
        return drafts

    def _segments(self, example: Segments) -> _Draft:
        everything = self.mask == "all"
        pieces = [
            Piece(segment.text, learn="all" if everything or segment.train else "no")
            for segment in example.segments
        ]
        if not example.closed:
            return _Draft(pieces)
        return _Draft(pieces, end="learn" if pieces[-1].learn == "all" else "read")

    def _tokens(self, example: Tokens) -> _Draft:
        size = len(self.tokenizer)
        outside = next((i for i in example.input_ids if not 0 <= i < size), None)
        if outside is not None:
            raise RowError(
                "unknown-token", f"holds the token {outside}, but the vocabulary has {size} tokens"
            )
        everything = self.mask == "all"
        pieces: list[Piece] = []
        start = 0
        flags = [everything or label != -100 for label in example.labels]
        for t in range(1, len(flags) + 1):
            if t == len(flags) or flags[t] != flags[start]:
                ids = tuple(example.input_ids[start:t])
                pieces.append(Piece(ids=ids, kind="ids", learn="all" if flags[start] else "no"))
                start = t
        return _Draft(pieces, begin=False)

    def _assemble(self, draft: _Draft, pieces: list[list[int]], row: int) -> Sample:
        ids: list[int] = []
        learned: list[slice] = []
        for piece, piece_ids in zip(draft.pieces, pieces, strict=True):
            start = len(ids)
            ids += piece_ids
            if piece.learn == "all" and piece_ids:
                learned.append(slice(start, len(ids)))
            elif piece.learn == "turn":
                learned.append(slice(start, start + self._learned_length(piece_ids)))
        if draft.end != "no" and self._eos is not None and ids[-1:] != [self._eos]:
            ids.append(self._eos)
            if draft.end == "learn":
                learned.append(slice(len(ids) - 1, len(ids)))
        # What comes after the last learned token can't influence anything.
        length = learned[-1].stop if learned else 0
        mask_T = np.zeros(length, dtype=np.bool_)
        for span in learned:
            mask_T[span] = True
        ids_T = np.array(ids[:length], dtype=np.int32)
        if draft.begin and self._needs_bos(ids):
            ids_T = np.concatenate([np.array([self._bos], dtype=np.int32), ids_T])
            mask_T = np.concatenate([np.zeros(1, dtype=np.bool_), mask_T])
        mask_T[:1] = False
        if not mask_T.any():
            raise RowError("nothing-to-learn", "has no token to learn")
        return Sample(ids_T, mask_T, row)

    def _needs_bos(self, ids: list[int]) -> bool:
        if self._bos is None or not ids:
            return False
        if ids[:2] == [self._bos, self._bos]:
            raise RowError("double-bos", "starts with two beginning-of-text tokens")
        return self._adds_bos and ids[0] != self._bos

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
            pieces = self._require_template().prompt(conversation)
            (encoded,) = self._encoder.encode([pieces])
            ids = [i for piece in encoded for i in piece]
            return [self._bos or 0, *ids] if self._needs_bos(ids) else ids
        except RowError as error:
            raise DataError(f"The conversation {error.message}.") from None

    # -- the tokenizer ----------------------------------------------------------------------------

    def special_tokens(self) -> list[str]:
        """The tokenizer's control tokens, as they would be written in a text."""
        return [t.content for t in self.tokenizer.added_tokens_decoder.values() if t.special]

    def keeps(self, text: str) -> bool:
        """Whether a text comes back from its tokens unchanged."""
        (ids,) = self._encoder.plain([text])
        return text.strip() in self.tokenizer.decode(ids)

    def is_lossless(self) -> bool:
        """Whether every character has tokens: the vocabulary holds all bytes that UTF-8 uses."""
        two_bytes = "".join(map(chr, range(0x80, 0x800)))
        three_bytes = "".join(chr(k << 12 | 0xABC) for k in range(1, 16) if k != 13)
        four_bytes = "".join(chr(k << 18 | 0x12345 & 0xFFFF) for k in range(1, 5))
        return self.keeps(two_bytes + three_bytes + four_bytes)

    # -- templates --------------------------------------------------------------------------------

    def _require_template(self) -> ChatTemplate:
        if self._template is None:
            raise RowError(
                "no-template", "holds messages, but the model's tokenizer has no chat template"
            )
        return self._template

    def _own_template(
        self, wanted: TemplateName
    ) -> llama4.Llama4Template | mixtral.MixtralTemplate | None:
        for module, name in ((llama4, "llama4"), (mixtral, "mixtral")):
            if wanted not in ("auto", name):
                continue
            ids = self._control_ids(module.CONTROL_TOKENS)
            if ids is None and wanted == name:
                raise DataError(
                    f"The {name} template was asked for, but the tokenizer lacks its control "
                    f"tokens ({', '.join(module.CONTROL_TOKENS)}).",
                    hint="Use the model's own template: leave the choice to 'auto'.",
                )
            if ids is None:
                continue
            if name == "mixtral":
                # Later Mistral formats have this token, and put the system prompt elsewhere.
                if wanted == "auto" and self._control_ids(("[SYSTEM_PROMPT]",)):
                    continue
                return mixtral.MixtralTemplate(ids)
            return llama4.Llama4Template(ids, lambda text: self._encoder.plain([text])[0])
        return None

    def _control_ids(self, tokens: Sequence[str]) -> dict[str, int] | None:
        """The ids of special tokens, or None if the tokenizer lacks one of them."""
        special = {
            t.content: i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special
        }
        return {t: special[t] for t in tokens} if all(t in special for t in tokens) else None

    def _foreign_template(self) -> ForeignTemplate | None:
        if not self.tokenizer.chat_template:
            return None
        source = self.tokenizer.get_chat_template()
        return ForeignTemplate(source, dict(self.tokenizer.special_tokens_map))

    def _find_end_of_turn(self, template: ForeignTemplate) -> int | None:
        """The first special token that the template writes after an assistant's text."""
        tail = template.assistant_tail()
        special = {*self.tokenizer.all_special_ids}
        special |= {i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        ids = self._encoder.follow([tail])[0] if tail else []
        return next((i for i in ids if i in special), None)


def answered(
    prompt: list[Message] | str, answer: list[Message] | str, tools: list[dict[str, Any]]
) -> Conversation | Segments:
    """A prompt and an answer, of which only the answer is learned."""
    if isinstance(prompt, str) or isinstance(answer, str):
        return Segments([Segment(str(prompt), False), Segment(str(answer), True)])
    given = [replace(m, train=False) if m.role == "assistant" else m for m in prompt]
    return Conversation([*given, *answer], tools)
