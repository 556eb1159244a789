"""Raw rows to the canonical form. A *shape* is a way to lay out an example in a row's fields."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, cast

from lamina.data.containers import json_type
from lamina.data.messages import (
    ROLES,
    Conversation,
    Example,
    Message,
    Role,
    RowError,
    Text,
    ToolCall,
)

__all__ = ["parse_message_list", "parse_row"]

#: Other names that the OpenAI format has, or had, for our roles.
_ROLE_SPELLINGS = {"developer": "system", "function": "tool"}


def parse_row(row: dict[str, Any]) -> Example:
    """The example in a row: chat `messages`, or a `text`.

    Raises:
        RowError: the row holds neither, or holds it wrongly.
    """
    if "messages" in row:
        return parse_messages(row)
    if "text" in row:
        return parse_text(row)
    fields = ", ".join(repr(key) for key in list(row)[:6]) or "no fields"
    raise RowError("unknown-shape", f"has neither 'messages' nor 'text' (it has {fields})")


def parse_text(row: dict[str, Any]) -> Text:
    text = row["text"]
    if not isinstance(text, str):
        raise RowError("wrong-type", f"'text' is a {json_type(text)}, not a string")
    if not text.strip():
        raise RowError("empty-text", "'text' is empty")
    return Text(text, _others(row, {"text"}))


def parse_messages(row: dict[str, Any]) -> Conversation:
    """OpenAI's fine-tuning format."""
    raw = row["messages"]
    if not isinstance(raw, list):
        raise RowError("wrong-type", f"'messages' is a {json_type(raw)}, not an array")
    if not raw:
        raise RowError("empty-messages", "'messages' is empty")
    conversation = Conversation(
        _messages(raw), _tools(row.get("tools")), _others(row, {"messages", "tools"})
    )
    check_learnable(conversation)
    return conversation


def parse_message_list(messages: Sequence[Message | dict[str, Any]]) -> Conversation:
    """A conversation from messages that need not have an assistant turn, such as a prompt.

    Raises:
        RowError: a message is malformed, or there is none.
    """
    if not messages:
        raise RowError("empty-messages", "has no messages")
    return Conversation(_messages(messages))


def _messages(raw: Sequence[object]) -> list[Message]:
    return [
        item if isinstance(item, Message) else _message(item, f"messages[{index}]")
        for index, item in enumerate(raw)
    ]


def check_learnable(conversation: Conversation) -> None:
    """
    Raises:
        RowError: an assistant turn is empty, or no turn is learned.
    """
    learned = 0
    for index, message in enumerate(conversation.messages):
        if message.role != "assistant":
            continue
        if not message.tool_calls and not message.content.strip():
            raise RowError("empty-assistant", f"messages[{index}] is an empty assistant turn")
        learned += message.train is not False
    if not learned:
        raise RowError(
            "nothing-to-learn",
            "has no assistant turn to learn from"
            if all(m.role != "assistant" for m in conversation.messages)
            else "has nothing to learn from: every assistant turn has weight 0",
        )


def _message(item: object, place: str) -> Message:
    if not isinstance(item, dict):
        raise RowError("wrong-type", f"{place} is a {json_type(item)}, not an object")
    role = item.get("role")
    if role not in ROLES:
        role = _role(item, role, place)
    calls = item.get("tool_calls")
    content = item.get("content")
    if not isinstance(content, str):
        content = _content(item, place, bool(calls))
    message = Message(cast(Role, role), content)
    if len(item) > 2:
        _extras(message, item, place)
    return message


def _role(item: dict[str, Any], role: object, place: str) -> str:
    if role is None:
        raise RowError("missing-role", f"{place} has no 'role'")
    if isinstance(role, str):
        spelling = _ROLE_SPELLINGS.get(role)
        if spelling:
            return spelling
        raise RowError("unknown-role", f"{place} has the role {role!r}; known: {', '.join(ROLES)}")
    raise RowError("wrong-type", f"{place}.role is a {json_type(role)}, not a string")


def _content(item: dict[str, Any], place: str, has_calls: bool) -> str:
    """Content that isn't a string: typed parts, or null beside tool calls."""
    content = item.get("content")
    if content is None:
        if has_calls:
            return ""
        problem = "is null" if "content" in item else "is missing"
        raise RowError("missing-content", f"{place}.content {problem}")
    if not isinstance(content, list):
        raise RowError("wrong-type", f"{place}.content is a {json_type(content)}, not a string")
    texts = []
    for index, part in enumerate(content):
        where = f"{place}.content[{index}]"
        if not isinstance(part, dict):
            raise RowError("wrong-type", f"{where} is a {json_type(part)}, not an object")
        kind = part.get("type")
        text = part.get("refusal" if kind == "refusal" else "text")
        if kind not in ("text", "refusal"):
            raise RowError("not-text", f"{where} has the type {kind!r}; only text is trained")
        if not isinstance(text, str):
            raise RowError("wrong-type", f"{where}.text is a {json_type(text)}, not a string")
        texts.append(text)
    return "".join(texts)


def _extras(message: Message, item: dict[str, Any], place: str) -> None:
    """The fields of a message besides role and content."""
    for key in ("name", "tool_call_id"):
        value = item.get(key)
        if value is not None:
            if not isinstance(value, str):
                raise RowError("wrong-type", f"{place}.{key} is a {json_type(value)}, not a string")
            setattr(message, key, value)
    calls = item.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list):
            raise RowError(
                "wrong-type", f"{place}.tool_calls is a {json_type(calls)}, not an array"
            )
        if calls and message.role != "assistant":
            raise RowError("tool-calls", f"{place} has tool calls, but its role is {message.role}")
        message.tool_calls = [
            _tool_call(call, f"{place}.tool_calls[{index}]") for index, call in enumerate(calls)
        ]
    message.train = _train_flag(item, place)


def _train_flag(item: dict[str, Any], place: str) -> bool | None:
    train = item.get("train")
    if train is not None:
        if not isinstance(train, bool):
            raise RowError("wrong-type", f"{place}.train is a {json_type(train)}, not a boolean")
        return train
    weight = item.get("weight")
    if weight is None:
        return None
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError("weight", f"{place}.weight is {json.dumps(weight)}; it can be 0 or 1")
    return bool(weight)


def _tool_call(call: object, place: str) -> ToolCall:
    if not isinstance(call, dict):
        raise RowError("wrong-type", f"{place} is a {json_type(call)}, not an object")
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise RowError("wrong-type", f"{place}.function is a {json_type(function)}, not an object")
    name, arguments, call_id = function.get("name"), function.get("arguments"), call.get("id")
    if not isinstance(name, str) or not name:
        raise RowError("tool-calls", f"{place} names no function")
    if call_id is not None and not isinstance(call_id, str):
        raise RowError("wrong-type", f"{place}.id is a {json_type(call_id)}, not a string")
    return ToolCall(name, _arguments(arguments, place), call_id)


def _arguments(arguments: object, place: str) -> dict[str, Any] | str:
    if arguments is None:
        return {}
    if isinstance(arguments, dict):
        return arguments
    if not isinstance(arguments, str):
        kind = json_type(arguments)
        raise RowError("wrong-type", f"{place}.arguments is a {kind}, not an object or a string")
    try:
        parsed = json.loads(arguments)
    except ValueError:
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


def _tools(tools: object) -> list[dict[str, Any]]:
    if tools is None:
        return []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("wrong-type", "'tools' is not an array of objects")
    return tools


def _others(row: dict[str, Any], known: set[str]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in known}
