"""OpenAI's fine-tuning format: `messages` with roles, tools and weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, ClassVar, cast

from lamina.data.jsonio import json_type, loads
from lamina.data.messages import ROLES, Conversation, Example, Message, Role, RowError, ToolCall
from lamina.data.shapes.base import (
    Shape,
    carried_fields,
    check_answers,
    further_fields,
    list_column,
    others,
    plain_conversation,
    tools_column,
    with_extra,
)

__all__ = ["OpenAI", "parse_call", "parse_message_list", "parse_messages", "write_messages"]

#: The fields of a message that have a meaning.
_FIELDS = frozenset(
    {
        "content",
        "function_call",
        "name",
        "role",
        "tool_call_id",
        "tool_calls",
        "train",
        "weight",
    }
)

#: Other names that this format has, or had, for our roles.
_ROLE_SPELLINGS = {"developer": "system", "function": "tool"}


class OpenAI(Shape):
    name = "messages"
    title = "OpenAI messages"
    about = (
        "Each message has a `role` (`system`, `user`, `assistant` or `tool`; `developer` and "
        "`function` are other spellings) and a `content`: a text, a list of typed text parts, or "
        "null beside `tool_calls`. `weight` 0 or 1 says whether an answer is learned, and so does "
        "`train`. `tools` holds the tools on offer. Images and other parts are refused. Other "
        "fields of a message are not trained, and conversions carry them along."
    )
    columns = frozenset({"messages", "tools", "functions"})
    row: ClassVar[dict[str, Any]] = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "What is 2 + 2?"},
            {"role": "assistant", "content": "4"},
        ]
    }

    def fits(self, row: dict[str, Any]) -> str | None:
        if "messages" not in row:
            return None
        messages = row["messages"]
        first = messages[0] if isinstance(messages, list) and messages else None
        if isinstance(first, dict) and "from" in first and "role" not in first:
            return None
        return "has 'messages'"

    def read(self, row: dict[str, Any]) -> Conversation:
        messages = parse_messages(list_column(row, "messages"), "messages")
        check_answers(messages)
        if len(row) == 1:
            return Conversation(messages)
        tools = tools_column(row)
        if tools:
            return Conversation(messages, tools, others(row, frozenset({"messages", "tools"})))
        # The name and the form before there were tools.
        functions = tools_column({"tools": row.get("functions")})
        tools = [{"type": "function", "function": function} for function in functions]
        return Conversation(messages, tools, others(row, self.columns))

    def write(self, example: Example) -> dict[str, Any]:
        conversation = plain_conversation(example)
        row: dict[str, Any] = {"messages": write_messages(conversation.messages)}
        if conversation.tools:
            row["tools"] = conversation.tools
        return with_extra(self, row, conversation.extra)


# -- reading --------------------------------------------------------------------------------------


def parse_message_list(messages: Sequence[Message | dict[str, Any]]) -> Conversation:
    """A conversation from messages that need not have an assistant turn, such as a prompt.

    Raises:
        RowError: a message is malformed, or there is none.
    """
    if not messages:
        raise RowError("empty-messages", "has no messages")
    return Conversation(parse_messages(messages, "messages"))


def parse_messages(raw: Sequence[object], place: str) -> list[Message]:
    """Messages as OpenAI writes them; `Message`s are passed on.

    Raises:
        RowError: one is malformed.
    """
    return [
        item if isinstance(item, Message) else _message(item, place, index)
        for index, item in enumerate(raw)
    ]


def _message(item: object, where: str, index: int) -> Message:
    if type(item) is not dict:
        kind = json_type(item)
        raise RowError("wrong-type", f"{where}[{index}] is {kind}, not an object")
    role = item.get("role")
    content = item.get("content")
    if len(item) == 2 and type(content) is str and role in ROLES:
        return Message(role, content)
    place = f"{where}[{index}]"
    if role not in ROLES:
        role = _role(item, role, place)
    if not isinstance(content, str):
        content = _content(item, place, bool(item.get("tool_calls") or item.get("function_call")))
    message = Message(cast(Role, role), content)
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
    raise RowError("wrong-type", f"{place}.role is {json_type(role)}, not a string")


def _content(item: dict[str, Any], place: str, has_calls: bool) -> str:
    """Content that isn't a string: typed parts, or null beside tool calls."""
    content = item.get("content")
    if content is None:
        if has_calls:
            return ""
        problem = "is null" if "content" in item else "is missing"
        raise RowError("missing-content", f"{place}.content {problem}")
    if not isinstance(content, list):
        raise RowError("wrong-type", f"{place}.content is {json_type(content)}, not a string")
    texts = []
    for index, part in enumerate(content):
        where = f"{place}.content[{index}]"
        if not isinstance(part, dict):
            raise RowError("wrong-type", f"{where} is {json_type(part)}, not an object")
        kind = part.get("type")
        if kind not in ("text", "refusal"):
            raise RowError("not-text", f"{where} has the type {kind!r}; only text is trained")
        text = part.get(kind)
        if not isinstance(text, str):
            raise RowError("wrong-type", f"{where}.{kind} is {json_type(text)}, not a string")
        texts.append(text)
    return "".join(texts)


def _extras(message: Message, item: dict[str, Any], place: str) -> None:
    """The fields of a message besides role and content."""
    for key in ("name", "tool_call_id"):
        value = item.get(key)
        if value is not None:
            if not isinstance(value, str):
                raise RowError("wrong-type", f"{place}.{key} is {json_type(value)}, not a string")
            setattr(message, key, value)
    calls = item.get("tool_calls")
    if calls is None and item.get("function_call") is not None:  # the older name, for one call
        calls = [item["function_call"]]
    if calls is not None:
        if not isinstance(calls, list):
            kind = json_type(calls)
            raise RowError("wrong-type", f"{place}.tool_calls is {kind}, not an array")
        if calls and message.role != "assistant":
            raise RowError("tool-calls", f"{place} has tool calls, but its role is {message.role}")
        message.tool_calls = [
            parse_call(call, f"{place}.tool_calls[{index}]") for index, call in enumerate(calls)
        ]
    message.train = train_flag(item, place)
    message.extra = further_fields(item, _FIELDS)


def train_flag(item: dict[str, Any], place: str) -> bool | None:
    """Whether a message is learned, by its `train` (ours) or `weight` (OpenAI's).

    Raises:
        RowError: it is neither yes nor no.
    """
    train = item.get("train")
    if train is not None:
        if not isinstance(train, bool):
            raise RowError("wrong-type", f"{place}.train is {json_type(train)}, not a boolean")
        return train
    weight = item.get("weight")
    if weight is None:
        return None
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError("weight", f"{place}.weight is {json.dumps(weight)}; it can be 0 or 1")
    return bool(weight)


def parse_call(call: object, place: str) -> ToolCall:
    """A tool call: OpenAI's, or just its function.

    Raises:
        RowError: it is malformed.
    """
    if not isinstance(call, dict):
        raise RowError("wrong-type", f"{place} is {json_type(call)}, not an object")
    function = call.get("function", call)
    if not isinstance(function, dict):
        raise RowError("wrong-type", f"{place}.function is {json_type(function)}, not an object")
    name, call_id = function.get("name"), call.get("id")
    if not isinstance(name, str) or not name:
        raise RowError("tool-calls", f"{place} names no function")
    if call_id is not None and not isinstance(call_id, str):
        raise RowError("wrong-type", f"{place}.id is {json_type(call_id)}, not a string")
    arguments = function.get("arguments", function.get("parameters"))
    return ToolCall(name, _arguments(arguments, place), call_id)


def _arguments(arguments: object, place: str) -> dict[str, Any] | str:
    if arguments is None:
        return {}
    if isinstance(arguments, dict):
        return arguments
    if not isinstance(arguments, str):
        kind = json_type(arguments)
        raise RowError("wrong-type", f"{place}.arguments is {kind}, not an object or a string")
    try:
        parsed = loads(arguments)
    except ValueError:
        return arguments
    return parsed if isinstance(parsed, dict) else arguments


# -- writing --------------------------------------------------------------------------------------


def write_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as OpenAI writes them.

    Raises:
        RowError: a further field of one has a meaning here.
    """
    return [_write(message) for message in messages]


def _write(message: Message) -> dict[str, Any]:
    item: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        if not message.content:
            item["content"] = None
        item["tool_calls"] = [write_call(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        item["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        item["name"] = message.name
    if message.train is not None:
        if message.role == "assistant":
            item["weight"] = int(message.train)
        else:
            item["train"] = message.train
    if message.extra:
        item.update(carried_fields(message, _FIELDS))
    return item


def write_call(call: ToolCall) -> dict[str, Any]:
    """A call as OpenAI writes it, its arguments as JSON text."""
    arguments = call.arguments
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    item: dict[str, Any] = {} if call.id is None else {"id": call.id}
    return {**item, "type": "function", "function": {"name": call.name, "arguments": arguments}}
