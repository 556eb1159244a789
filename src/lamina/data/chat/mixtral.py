"""Mixtral 8x22B's chat format (Mistral's v3), token for token as Mistral's encoder writes it.

    <s>[INST] Hi[/INST] Hello!</s>[INST] Be brief.\\n\\nBye[/INST] See you</s>

The system prompt and the tools on offer stand in the *last* user turn, so the rendering of a
conversation's beginning isn't the beginning of its rendering. A conversation that has either is
therefore learned as several samples, one for each user turn with a trained answer: each is what the
model reads when it writes that answer.

Consecutive turns of one role are joined; a tool-call id has nine letters or digits, and others are
replaced by such, the same in the call and in its result.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any, Literal

import xxhash

from lamina.data.chat.pieces import Mask, Piece, learned_turns, tool_function
from lamina.data.messages import Conversation, Message, Role, RowError, ToolCall

__all__ = ["CONTROL_TOKENS", "MixtralTemplate"]

CONTROL_TOKENS = (
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[TOOL_CALLS]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
)

_CALL_ID = re.compile(r"[a-zA-Z0-9]{9}")
_DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


@dataclass(slots=True)
class _Turn:
    """One or more consecutive messages of one role, as they are written."""

    role: Role
    content: str
    calls: list[dict[str, Any]] = field(default_factory=list)
    call_id: str = ""
    learned: bool = False
    #: Consecutive answers are only joined if both are to be trained or both aren't.
    flag: bool = True


class MixtralTemplate:
    """Writes conversations for Mixtral 8x22B.

    Args:
        ids: the id of each of `CONTROL_TOKENS`.
    """

    name = "mixtral"

    def __init__(self, ids: dict[str, int]):
        self._ids = ids
        self.stop_ids = (ids["</s>"],)

    def samples(self, conversation: Conversation, mask: Mask) -> list[list[Piece]]:
        system, turns = self._turns(conversation, mask)
        if mask == "all" or not (system or conversation.tools):
            return [self._write(turns, system, conversation.tools, everything=mask == "all")]
        users = [i for i, turn in enumerate(turns) if turn.role == "user"]
        samples = []
        for user, after in zip(users, [*users[1:], len(turns)], strict=True):
            learned = [i for i in range(user, after) if turns[i].learned]
            if learned:
                shown = turns[: learned[-1] + 1]
                samples.append(self._write(shown, system, conversation.tools, learn_from=user))
        return samples

    def prompt(self, conversation: Conversation) -> list[Piece]:
        system, turns = self._turns(conversation, None)
        return self._write(turns, system, conversation.tools)

    def _turns(self, conversation: Conversation, mask: Mask | None) -> tuple[str, list[_Turn]]:
        """The system prompt, and the other turns with their neighbours of one role joined."""
        messages = conversation.messages
        if mask is None or mask == "all":
            learned = [mask == "all"] * len(messages)
        else:
            learned = learned_turns(messages, mask)
        system = "\n\n".join(m.content for m in messages if m.role == "system" and m.content)
        ids = _CallIds()
        turns: list[_Turn] = []
        previous: Role | None = None
        for index, message in enumerate(messages):
            role, before = message.role, previous
            previous = role
            if role == "system":
                continue
            turn = _Turn(role, message.content, learned=learned[index])
            turn.flag = message.train is not False
            if role == "assistant":
                turn.calls = [_call(call, ids.of_call(call)) for call in message.tool_calls]
            elif role == "tool":
                turn.call_id = ids.of_result(message)
            if before == role and role != "tool" and turns[-1].flag == turn.flag:
                _join(turns[-1], turn)
            else:
                turns.append(turn)
        if not turns or turns[0].role != "user":
            turns.insert(0, _Turn("user", "", learned=mask == "all"))
        for turn in turns:
            if turn.calls and turn.content:
                raise RowError(
                    "content-beside-calls",
                    "has text beside tool calls in one assistant turn, which Mixtral can't write",
                )
        return system, turns

    def _write(
        self,
        turns: list[_Turn],
        system: str,
        tools: list[dict[str, Any]],
        *,
        learn_from: int = 0,
        everything: bool = False,
    ) -> list[Piece]:
        """The pieces of these turns, with the system prompt and the tools in their last user turn.

        Args:
            learn_from: the first turn that may be learned.
            everything: learn all tokens.
        """
        last_user = max(i for i, turn in enumerate(turns) if turn.role == "user")
        rest: Literal["no", "all"] = "all" if everything else "no"
        pieces = [self._control("<s>", rest)]
        for index, turn in enumerate(turns):
            learn: Literal["no", "all"] = (
                "all" if everything or (turn.learned and index >= learn_from) else "no"
            )
            if turn.role == "user":
                text = turn.content
                if index == last_user and system:
                    text = f"{system}\n\n{text}"
                if index == last_user and tools:
                    pieces += self._wrapped("AVAILABLE_TOOLS", _dumps(_tools(tools)), learn)
                pieces += self._wrapped("INST", text, learn)
            elif turn.role == "tool":
                result = {"content": _parsed(turn.content or "{}"), "call_id": turn.call_id}
                pieces += self._wrapped("TOOL_RESULTS", _dumps(result), learn)
            elif turn.calls:
                pieces += [
                    self._control("[TOOL_CALLS]", learn),
                    Piece(_dumps(turn.calls), kind="plain", learn=learn),
                    self._control("</s>", learn),
                ]
            else:
                text = turn.content.rstrip(" ")
                pieces += [
                    Piece(text, kind="plain", learn=learn),
                    self._control("</s>", learn),
                ]
        return pieces

    def _wrapped(self, tag: str, text: str, learn: Literal["no", "all"]) -> list[Piece]:
        return [
            self._control(f"[{tag}]", learn),
            Piece(text, kind="plain", learn=learn),
            self._control(f"[/{tag}]", learn),
        ]

    def _control(self, token: str, learn: Literal["no", "all"]) -> Piece:
        return Piece(ids=(self._ids[token],), kind="ids", learn=learn)


class _CallIds:
    """Ids of calls as Mistral wants them. A result without one answers the first open call."""

    def __init__(self) -> None:
        self._open: list[str] = []
        self._count = 0

    def of_call(self, call: ToolCall) -> str:
        self._count += 1
        written = _nine(call.id or f"{self._count} {call.name} {call.arguments}")
        self._open.append(written)
        return written

    def of_result(self, message: Message) -> str:
        if message.tool_call_id:
            written = _nine(message.tool_call_id)
            if written in self._open:
                self._open.remove(written)
            return written
        if not self._open:
            raise RowError("orphan-result", "has a tool result that answers no tool call")
        return self._open.pop(0)


def _nine(call_id: str) -> str:
    if _CALL_ID.fullmatch(call_id):
        return call_id
    number = xxhash.xxh3_64_intdigest(call_id.encode("utf-8", "surrogatepass"))
    written = ""
    for _ in range(9):
        number, digit = divmod(number, len(_DIGITS))
        written += _DIGITS[digit]
    return written


def _join(turn: _Turn, other: _Turn) -> None:
    turn.content = "\n\n".join(text for text in (turn.content, other.content) if text)
    turn.calls += other.calls
    turn.learned |= other.learned


def _call(call: ToolCall, call_id: str) -> dict[str, Any]:
    arguments = call.arguments
    return {
        "name": call.name,
        "arguments": _parsed(arguments or "{}") if isinstance(arguments, str) else arguments,
        "id": call_id,
    }


def _tools(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    functions = [tool_function(tool) for tool in tools]
    return [
        {
            "type": "function",
            "function": {
                "name": function.get("name"),
                "description": function.get("description") or "",
                "parameters": function.get("parameters") or {},
            },
        }
        for function in functions
    ]


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _dumps(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
