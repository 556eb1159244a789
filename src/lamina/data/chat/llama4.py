"""Llama 4's chat format, token for token as Meta's own encoder writes it.

    <|begin_of_text|><|header_start|>user<|header_end|>\\n\\nHi<|eot|>
    <|header_start|>assistant<|header_end|>\\n\\nHello!<|eot|>

(without the line break). An assistant turn with tool calls ends with `<|eom|>`, and so does a
tool's result, whose role is written `ipython`. Each call is a JSON object
`{"type": "function", "name": ..., "parameters": ...}`; several follow each other without a
separator.

Meta's encoder leaves it to its caller to describe the tools on offer. Here they are appended to the
system prompt, one JSON object a line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, Literal

from lamina.data.chat.pieces import Mask, Piece, learned_turns, tool_function
from lamina.data.messages import Conversation, Message, RowError, ToolCall

__all__ = ["CONTROL_TOKENS", "Llama4Template"]

CONTROL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|header_start|>",
    "<|header_end|>",
    "<|eot|>",
    "<|eom|>",
)

#: Tools with a syntax of their own: the pattern of a call, and the argument it holds.
_BUILTIN_CALLS = {
    "brave_search": ('brave_search.call(query="{}")', "query"),
    "wolfram_alpha": ('wolfram_alpha.call(query="{}")', "query"),
    "photogen": ('photogen.call(query="{}")', "query"),
    "code_interpreter": ("{}", "code"),
}

_TOOLS_INTRODUCTION = (
    "You can call the functions below. To call one, answer with a JSON object that has the keys "
    '"type" (always "function"), "name" and "parameters".'
)


class Llama4Template:
    """Writes conversations for Llama 4.

    Args:
        ids: the id of each of `CONTROL_TOKENS`.
        encode: the ids of a text in which no control token is recognized.
    """

    name = "llama4"

    def __init__(self, ids: dict[str, int], encode: Callable[[str], list[int]]):
        self._bos = Piece(ids=(ids["<|begin_of_text|>"],), kind="ids")
        self._eot, self._eom = ids["<|eot|>"], ids["<|eom|>"]
        self.stop_ids = (ids["<|end_of_text|>"], self._eom, self._eot)
        start, end = ids["<|header_start|>"], ids["<|header_end|>"]
        self._headers = {
            role: (start, *encode("ipython" if role == "tool" else role), end, *encode("\n\n"))
            for role in ("system", "user", "assistant", "tool")
        }

    def samples(self, conversation: Conversation, mask: Mask) -> list[list[Piece]]:
        messages = with_tools_in_system(conversation)
        everything = mask == "all"
        flags = [True] * len(messages) if everything else learned_turns(messages, mask)
        pieces = [self._bos]
        for message, learned in zip(messages, flags, strict=True):
            pieces += self._message(message, learned, everything)
        return [pieces]

    def prompt(self, conversation: Conversation) -> list[Piece]:
        pieces = [self._bos]
        for message in with_tools_in_system(conversation):
            pieces += self._message(message, False, False)
        return [*pieces, Piece(ids=self._headers["assistant"], kind="ids")]

    def _message(self, message: Message, learned: bool, header_too: bool) -> list[Piece]:
        learn: Literal["no", "all"] = "all" if learned else "no"
        texts = [message.content, *(_call_text(call) for call in message.tool_calls)]
        end = self._eom if message.tool_calls or message.role == "tool" else self._eot
        return [
            Piece(ids=self._headers[message.role], kind="ids", learn="all" if header_too else "no"),
            *(Piece(text, kind="plain", learn=learn) for text in texts if text),
            Piece(ids=(end,), kind="ids", learn=learn),
        ]


def with_tools_in_system(conversation: Conversation) -> Sequence[Message]:
    """The messages, with the tools on offer described at the end of the system prompt."""
    if not conversation.tools:
        return conversation.messages
    functions = [
        {"type": "function", "function": tool_function(tool)} for tool in conversation.tools
    ]
    lines = "\n".join(json.dumps(function, ensure_ascii=False) for function in functions)
    described = f"{_TOOLS_INTRODUCTION}\n\n{lines}"
    first, *rest = conversation.messages
    if first.role != "system":
        return [Message("system", described), first, *rest]
    joined = f"{first.content}\n\n{described}" if first.content else described
    return [Message("system", joined), *rest]


def _call_text(call: ToolCall) -> str:
    builtin = _BUILTIN_CALLS.get(call.name)
    if builtin is not None:
        pattern, key = builtin
        arguments: dict[str, Any] = call.arguments if isinstance(call.arguments, dict) else {}
        if key not in arguments:
            raise RowError(
                "tool-arguments", f"calls {call.name} without {key!r}, which Llama 4 writes"
            )
        return pattern.replace("{}", str(arguments[key]), 1)
    return json.dumps({"type": "function", "name": call.name, "parameters": call.arguments})
