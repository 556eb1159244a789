"""ShareGPT: `conversations` of turns with `from` and `value`, in the spellings in use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar

from lamina.data.jsonio import json_type, loads
from lamina.data.messages import Conversation, Example, Message, Role, RowError, ToolCall
from lamina.data.shapes.base import (
    Shape,
    carried_fields,
    check_answers,
    further_fields,
    list_column,
    others,
    plain_conversation,
    system_column,
    tools_column,
    uncarried,
    with_extra,
)
from lamina.data.shapes.openai import parse_call, train_flag

__all__ = ["ShareGPT", "parse_turns", "write_turns"]

#: What the speaker of a turn is called; `function_call` is the assistant, calling tools.
SPEAKERS: dict[str, Role] = {
    "system": "system",
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "tool_response": "tool",
    "function_response": "tool",
    "function": "tool",
}
_CALLS = ("function_call", "tool_call")
#: The fields of a turn that have a meaning.
_FIELDS = frozenset({"content", "from", "name", "role", "tool_call_id", "train", "value", "weight"})
_WRITTEN: dict[Role, str] = {
    "system": "system",
    "user": "human",
    "assistant": "gpt",
    "tool": "observation",
}


class ShareGPT(Shape):
    name = "sharegpt"
    title = "ShareGPT conversations"
    about = (
        "Each turn has `from` and `value`. The user is `human`, `user` or `prompter`; the "
        "assistant `gpt`, `assistant`, `chatgpt`, `model` or `bot`; a tool's result "
        "`observation`, `tool`, `tool_response`, `function_response` or `function`. A turn from "
        "`function_call` or `tool_call` holds a call as JSON, or a list of calls. A `system` "
        "column is the system prompt; a `tools` column holds tools as JSON. The column may also be "
        "called `conversation` or `messages`."
    )
    columns = frozenset({"conversations", "conversation", "messages", "system", "tools"})
    row: ClassVar[dict[str, Any]] = {
        "conversations": [
            {"from": "human", "value": "What is 2 + 2?"},
            {"from": "gpt", "value": "4"},
        ]
    }

    def fits(self, row: dict[str, Any]) -> str | None:
        column = _column(row)
        if column is None:
            return None
        turns = row[column]
        first = turns[0] if isinstance(turns, list) and turns else None
        if column == "messages" and not (isinstance(first, dict) and "from" in first):
            return None
        return f"has '{column}'"

    def read(self, row: dict[str, Any]) -> Conversation:
        column = _column(row) or "conversations"
        turns = parse_turns(list_column(row, column), column)
        check_answers(turns, column)
        extra = others(row, frozenset({column, "system", "tools"}))
        return Conversation([*system_column(row), *turns], tools_column(row), extra)

    def write(self, example: Example) -> dict[str, Any]:
        conversation = plain_conversation(example)
        row: dict[str, Any] = {"conversations": write_turns(conversation.messages)}
        if conversation.tools:
            row["tools"] = json.dumps(conversation.tools, ensure_ascii=False)
        return with_extra(self, row, conversation.extra)


def _column(row: dict[str, Any]) -> str | None:
    names = ("conversations", "conversation", "messages")
    return next((name for name in names if name in row), None)


def parse_turns(turns: Sequence[object], place: str) -> list[Message]:
    """
    Raises:
        RowError: a turn is malformed.
    """
    return [_turn(turn, f"{place}[{index}]") for index, turn in enumerate(turns)]


def _turn(turn: object, place: str) -> Message:
    if not isinstance(turn, dict):
        raise RowError("wrong-type", f"{place} is {json_type(turn)}, not an object")
    speaker = turn.get("from", turn.get("role"))
    value = turn.get("value", turn.get("content"))
    if speaker is None:
        raise RowError("missing-role", f"{place} has no 'from'")
    role = SPEAKERS.get(speaker.lower()) if isinstance(speaker, str) else None
    if role is None:
        known = ", ".join(SPEAKERS)
        raise RowError("unknown-role", f"{place} is from {speaker!r}; known: {known}")
    if value is None:
        raise RowError("missing-content", f"{place}.value is missing")
    calls = []
    if speaker.lower() in _CALLS:
        calls, value = _parse_calls(value, place), ""
    if not isinstance(value, str):
        raise RowError("wrong-type", f"{place}.value is {json_type(value)}, not a string")
    message = Message(role, value, calls)
    if len(turn) > 2:
        for key in ("name", "tool_call_id"):
            if isinstance(turn.get(key), str):
                setattr(message, key, turn[key])
        message.train = train_flag(turn, place)
        message.extra = further_fields(turn, _FIELDS)
    return message


def _parse_calls(value: object, place: str) -> list[ToolCall]:
    if isinstance(value, str):
        try:
            value = loads(value)
        except ValueError:
            raise RowError("tool-calls", f"{place}.value is a tool call that isn't JSON") from None
    calls = value if isinstance(value, list) else [value]
    if not calls:
        raise RowError("tool-calls", f"{place}.value calls no tool")
    return [parse_call(call, f"{place}.value") for call in calls]


def write_turns(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """
    Raises:
        RowError: a turn has text beside tool calls, or a field that would get a meaning.
    """
    turns = []
    for message in messages:
        turn: dict[str, Any] = {"from": _WRITTEN[message.role], "value": message.content}
        if message.tool_calls:
            if message.content:
                raise uncarried("an assistant turn has text beside its tool calls")
            turn = {"from": "function_call", "value": _write_calls(message.tool_calls)}
        if message.tool_call_id is not None:
            turn["tool_call_id"] = message.tool_call_id
        if message.name is not None:
            turn["name"] = message.name
        if message.train is not None:
            turn["train"] = message.train
        if message.extra:
            turn.update(carried_fields(message, _FIELDS))
        turns.append(turn)
    return turns


def _write_calls(calls: Sequence[ToolCall]) -> str:
    written = [
        {
            "name": call.name,
            "arguments": call.arguments,
            **({} if call.id is None else {"id": call.id}),
        }
        for call in calls
    ]
    return json.dumps(written[0] if len(written) == 1 else written, ensure_ascii=False)
