"""What is wrong, or odd, about one conversation, beyond what its format asks for."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from lamina.data.chat.pieces import tool_function
from lamina.data.jsonio import dump_line, loads
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
from lamina.errors import DataError

__all__ = ["CONTROL_TOKENS", "conversation_findings", "findings", "texts_of"]

#: Control tokens of common chat formats, wherever a text may hold them.
CONTROL_TOKENS = re.compile(
    r"<\|[a-z][a-z0-9_]*\|>"
    r"|\[/?(?:INST|TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS|SYSTEM_PROMPT)\]"
    r"|</?s>|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>"
)


def findings(
    example: Example, control: re.Pattern[str] = CONTROL_TOKENS
) -> Iterator[tuple[str, str]]:
    """The mistakes in an example: a code and what is wrong, without the place.

    Args:
        control: what a control token looks like.
    """
    match example:
        case Conversation():
            yield from conversation_findings(example, control)
        case Preference(prompt, chosen, rejected, tools):
            for answer in (chosen, rejected):
                if not isinstance(prompt, str) and not isinstance(answer, str):
                    shown = Conversation([*prompt, *answer], tools)
                    yield from conversation_findings(shown, control)
            if chosen == rejected:
                yield "same-answers", "has a 'chosen' and a 'rejected' that don't differ"
        case Feedback(prompt, completion, _, tools):
            if not isinstance(prompt, str) and not isinstance(completion, str):
                shown = Conversation([*prompt, *completion], tools)
                yield from conversation_findings(shown, control)
        case Segments() | Text() | Tokens():
            pass


def texts_of(example: Example) -> Iterator[tuple[str, str]]:
    """The texts of an example, each with its place."""
    match example:
        case Conversation(messages):
            yield from _message_texts(messages, "messages")
        case Text(text):
            yield "text", text
        case Segments(segments):
            for index, segment in enumerate(segments):
                yield f"segments[{index}]", segment.text
        case Preference(prompt, chosen, rejected):
            for name, part in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
                yield from _part_texts(part, name)
        case Feedback(prompt, completion):
            for name, part in (("prompt", prompt), ("completion", completion)):
                yield from _part_texts(part, name)
        case Tokens():
            pass


def _part_texts(part: list[Message] | str, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(part, str):
        yield place, part
    else:
        yield from _message_texts(part, place)


def _message_texts(messages: list[Message], place: str) -> Iterator[tuple[str, str]]:
    for index, message in enumerate(messages):
        yield f"{place}[{index}]", message.content


def conversation_findings(
    conversation: Conversation, control: re.Pattern[str] = CONTROL_TOKENS
) -> Iterator[tuple[str, str]]:
    """The mistakes in a conversation."""
    messages = conversation.messages
    before = None
    has_tools = bool(conversation.tools)
    extra: set[str] = set()
    for index, message in enumerate(messages):
        role = message.role
        content = message.content
        if not content or content.isspace():
            if not message.tool_calls:
                yield "empty-turn", f"has an empty {role} turn, messages[{index}]"
        elif ("<" in content or "[" in content) and (found := control.search(content)):
            yield "control-tokens", f"has {found[0]!r} in the text of messages[{index}]"
        if role in (before, "system") or before is None:
            odd = _odd_order(index, role, before)
            if odd:
                yield "role-order", odd
        if role == "tool" or message.tool_calls:
            has_tools = True
        if message.extra:
            extra.update(message.extra)
        before = role
    if before != "assistant":
        yield "last-turn", f"ends with a {before} turn"
    if extra:
        names = ", ".join(map(repr, sorted(extra)))
        yield "unknown-columns", f"has fields in its messages that are not trained: {names}"
    if has_tools:
        yield from _tool_findings(conversation)


def _odd_order(index: int, role: str, before: str | None) -> str | None:
    if role == "system":
        return f"has a system turn at messages[{index}], not at its beginning" if index else None
    if before is None:
        return None if role == "user" else f"begins with a {role} turn"
    if role == before and role != "tool":
        return f"has two {role} turns in a row, the second messages[{index}]"
    return None


# -- tools ----------------------------------------------------------------------------------------


def _tool_findings(conversation: Conversation) -> Iterator[tuple[str, str]]:
    functions = {}
    for index, tool in enumerate(conversation.tools):
        function = tool_function(tool)
        name = function.get("name")
        if not isinstance(name, str):
            yield "tool-schema", f"offers a tool without a name, tools[{index}]"
            continue
        functions[name] = schema = function.get("parameters") or {}
        problem = _schema_problem(_schema_text(schema))
        if problem:
            yield "tool-schema", f"offers the tool {name!r} with an invalid schema: {problem}"
            functions[name] = {}
    yield from _pairing_findings(conversation.messages)
    for index, message in enumerate(conversation.messages):
        for call in message.tool_calls:
            place = f"messages[{index}]"
            if functions and call.name not in functions:
                yield "unknown-tool", f"calls {call.name!r} in {place}, which isn't on offer"
            if isinstance(call.arguments, str):
                yield (
                    "tool-arguments",
                    f"calls {call.name!r} in {place} with arguments that aren't a JSON object",
                )
            elif functions.get(call.name):
                problem = _argument_problem(_schema_text(functions[call.name]), call.arguments)
                if problem:
                    yield "tool-arguments", f"calls {call.name!r} in {place}: {problem}"


def _pairing_findings(messages: list[Message]) -> Iterator[tuple[str, str]]:
    """Whether each result answers a call, and each call has a result before the next turn."""
    written = any(message.tool_calls for message in messages)
    seen: set[str] = set()
    open_ids: list[str | None] = []
    for index, message in enumerate(messages):
        place = f"messages[{index}]"
        if message.role == "tool":
            answered = message.tool_call_id
            if answered in open_ids:
                open_ids.remove(answered)
            elif open_ids and (answered is None or None in open_ids):
                yield "missing-call-id", f"has a tool result matched by its order, {place}"
                open_ids.pop(open_ids.index(None) if None in open_ids else 0)
            elif answered is None and not written:
                yield "loose-result", f"has a tool result, {place}, but no tool call"
            else:
                yield "orphan-result", f"has a tool result that answers no call, {place}"
            continue
        if open_ids:
            yield "unanswered-call", f"goes on at {place} before a tool call has its result"
            open_ids = []
        for call in message.tool_calls:
            if call.id is not None and call.id in seen:
                yield "duplicate-call-id", f"has the tool-call id {call.id!r} twice, in {place}"
            seen.add(call.id or "")
            open_ids.append(call.id)


def _schema_text(schema: Any) -> str:
    return dump_line({"": schema})[5:-2].decode()


def _jsonschema() -> tuple[Any, Any]:
    """The modules of `jsonschema`, which takes long to load and is only needed for tools.

    Raises:
        DataError: it isn't installed.
    """
    try:
        return (
            importlib.import_module("jsonschema.validators"),
            importlib.import_module("jsonschema.exceptions"),
        )
    except ImportError as error:
        raise DataError(
            "The data has tools, and checking their arguments needs the package jsonschema, which "
            "is not installed.",
            hint="pip install jsonschema",
        ) from error


@lru_cache(maxsize=1024)
def _schema_problem(schema: str) -> str | None:
    """Why a tool's JSON schema is invalid, or None."""
    validators, exceptions = _jsonschema()
    value = loads(schema)
    try:
        validators.validator_for(value).check_schema(value)
    except exceptions.SchemaError as error:
        return _first_line(error.message)
    except Exception as error:  # schemas are data: they can break a validator in any way
        return f"{type(error).__name__}: {_first_line(str(error))}"
    return None


@lru_cache(maxsize=1024)
def _validator(schema: str) -> Any:
    validators, _ = _jsonschema()
    registry = importlib.import_module("referencing").Registry()
    value = loads(schema)
    # With a registry of its own, a `$ref` to elsewhere is never fetched.
    return validators.validator_for(value)(value, registry=registry)


def _argument_problem(schema: str, arguments: dict[str, Any]) -> str | None:
    """Why arguments don't fit a valid schema, or None."""
    try:
        error = next(_validator(schema).iter_errors(arguments), None)
    except Exception as error:  # a reference that leads nowhere, a regular expression, ...
        return f"its schema can't be used: {_first_line(str(error))}"
    return None if error is None else _first_line(error.message)


def _first_line(text: str) -> str:
    line = text.partition("\n")[0].rstrip(".")
    return line if len(line) <= 120 else line[:117] + "..."
