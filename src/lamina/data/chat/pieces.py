"""What a template makes of a conversation, before it is tokenized."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from lamina.data.messages import Conversation, Message, RowError

__all__ = ["MASKS", "ChatTemplate", "Mask", "Piece", "learned_turns", "tool_function"]

#: What is learned of a conversation: see `MASKS`.
Mask = Literal["assistant", "last", "flagged", "all"]

MASKS: dict[Mask, str] = {
    "assistant": "every assistant turn that isn't flagged `train: false` (or weight 0)",
    "last": "only the last assistant turn",
    "flagged": "only assistant turns flagged `train: true` (or weight 1)",
    "all": "every token, prompts included",
}


@dataclass(slots=True)
class Piece:
    """A part of a sample.

    Args:
        text: text to tokenize.
        ids: tokens as they are, instead of text.
        kind: how the text is tokenized. `rendered` text holds control tokens; the first of a sample
            stands at the beginning, others follow it. `plain` text stands by itself, and control
            tokens written in it are text.
        learn: nothing of it, all of it, or (`turn`) up to its last token that ends generation.
    """

    text: str = ""
    ids: tuple[int, ...] = ()
    kind: Literal["rendered", "plain", "ids"] = "rendered"
    learn: Literal["no", "all", "turn"] = "no"


class ChatTemplate(Protocol):
    """Writes conversations as one model expects them."""

    @property
    def name(self) -> str:
        """`tokenizer`, `llama4` or `mixtral`."""

    def samples(self, conversation: Conversation, mask: Mask) -> list[list[Piece]]:
        """The samples of a conversation, each as its pieces.

        Raises:
            RowError: the template can't write it.
        """

    def prompt(self, conversation: Conversation) -> list[Piece]:
        """The conversation and the header of an assistant turn, which the model then writes.

        Raises:
            RowError: the template can't write it.
        """


def learned_turns(messages: Sequence[Message], mask: Mask) -> list[bool]:
    """Which messages are learned under a mask other than `all`.

    Raises:
        RowError: none is.
    """
    if mask == "last":
        last = max((i for i, m in enumerate(messages) if m.role == "assistant"), default=-1)
        learned = [i == last and m.train is not False for i, m in enumerate(messages)]
    elif mask == "flagged":
        learned = [m.role == "assistant" and m.train is True for m in messages]
    else:
        learned = [m.role == "assistant" and m.train is not False for m in messages]
    if not any(learned):
        reasons = {
            "last": "its last assistant turn is flagged not to be trained",
            "flagged": "no assistant turn is flagged to be trained",
        }
        reason = reasons.get(mask, "every assistant turn is flagged not to be trained")
        if not any(m.role == "assistant" for m in messages):
            reason = "it has no assistant turn"
        raise RowError("nothing-to-learn", f"has nothing to learn from: {reason}")
    return learned


def tool_function(tool: dict[str, Any]) -> dict[str, Any]:
    """The function that a tool describes, whether or not it is wrapped as OpenAI does it."""
    function = tool.get("function", tool)
    return function if isinstance(function, dict) else {}
