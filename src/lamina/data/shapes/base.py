"""What a shape is, and the checks that shapes share."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from lamina.data.jsonio import json_type, loads
from lamina.data.messages import Conversation, Example, Message, RowError

__all__ = [
    "Shape",
    "carried_fields",
    "check_answers",
    "further_fields",
    "list_column",
    "others",
    "string_column",
    "system_column",
    "tools_column",
    "uncarried",
    "with_extra",
]


class Shape(ABC):
    """A way to lay out an example in a row's columns.

    Class attributes:
        name: as a user writes it.
        title: what it is, in a few words.
        about: how it is understood, in a few sentences.
        columns: the columns that it gives a meaning.
        includes: other shapes that also fit its rows, being a part of them.
        row: a minimal row, for the documentation and its test.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    about: ClassVar[str]
    columns: ClassVar[frozenset[str]]
    includes: ClassVar[tuple[str, ...]] = ()
    row: ClassVar[dict[str, Any]]

    @abstractmethod
    def fits(self, row: dict[str, Any]) -> str | None:
        """Why a row seems to have this shape, or None if it doesn't."""

    @abstractmethod
    def read(self, row: dict[str, Any]) -> Example:
        """
        Raises:
            RowError: the row has this shape wrongly, or nothing to learn from.
        """

    @abstractmethod
    def write(self, example: Example) -> dict[str, Any]:
        """
        Raises:
            RowError: this shape can't carry the example.
        """


def others(row: dict[str, Any], columns: frozenset[str]) -> dict[str, Any]:
    """The columns that a shape gives no meaning."""
    return {key: value for key, value in row.items() if key not in columns}


def carried_fields(message: Message, known: frozenset[str]) -> dict[str, Any]:
    """The further fields of a message, to be written in a format that knows these fields.

    Raises:
        RowError: the format gives one of them a meaning.
    """
    for key in message.extra:
        if key in known:
            raise uncarried(f"a turn's further field {key!r} has a meaning in this format")
    return message.extra


def further_fields(item: dict[str, Any], known: frozenset[str]) -> dict[str, Any]:
    """The fields of a message that its format doesn't know and that hold something."""
    return {key: item[key] for key in item if key not in known and item[key] is not None}


def list_column(row: dict[str, Any], column: str) -> list[Any]:
    """A column that holds a list; in tables, as JSON text.

    Raises:
        RowError: it holds something else, or is empty.
    """
    value = row.get(column)
    if isinstance(value, str) and value[:1] in ("[", "{"):
        with contextlib.suppress(ValueError):
            value = loads(value)
    if not isinstance(value, list):
        raise RowError("wrong-type", f"'{column}' is {json_type(value)}, not an array")
    if not value:
        raise RowError("empty-messages", f"'{column}' is empty")
    return value


def string_column(row: dict[str, Any], column: str, *, may_be_empty: bool = False) -> str:
    """A column that holds a string.

    Raises:
        RowError: it holds something else, or white space only.
    """
    value = row.get(column)
    if may_be_empty and value is None:
        return ""
    if not isinstance(value, str):
        raise RowError("wrong-type", f"'{column}' is {json_type(value)}, not a string")
    if not may_be_empty and not value.strip():
        raise RowError("empty-text", f"'{column}' is empty")
    return value


def system_column(row: dict[str, Any]) -> list[Message]:
    """The system prompt of a `system` column, as no message or one."""
    system = string_column(row, "system", may_be_empty=True)
    return [Message("system", system)] if system.strip() else []


def tools_column(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The tools of a `tools` column, which may be JSON text.

    Raises:
        RowError: it isn't an array of objects.
    """
    tools = row.get("tools")
    if tools is None or tools == "":
        return []
    if isinstance(tools, str):
        try:
            tools = loads(tools)
        except ValueError:
            raise RowError("wrong-type", "'tools' is a string that isn't JSON") from None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError("wrong-type", "'tools' is not an array of objects")
    return tools


def check_answers(messages: Sequence[Message], place: str = "messages") -> None:
    """
    Raises:
        RowError: an assistant turn is empty, or none is learned.
    """
    answers = flagged = 0
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        if not message.tool_calls and not message.content.strip():
            raise RowError("empty-assistant", f"{place}[{index}] is an empty assistant turn")
        answers += 1
        flagged += message.train is False
    if not answers:
        raise RowError("nothing-to-learn", "has no assistant turn to learn from")
    if answers == flagged:
        raise RowError(
            "nothing-to-learn", "has nothing to learn from: every assistant turn has weight 0"
        )


def with_extra(shape: Shape, row: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """A row: a shape's columns, then those it carries along.

    Raises:
        RowError: the shape would give one of these a meaning.
    """
    if not extra:
        return row
    taken = [key for key in extra if key in shape.columns]
    if taken:
        raise uncarried(f"its further column {taken[0]!r} has a meaning in this format")
    return {**row, **extra}


def uncarried(what: str) -> RowError:
    """The error of a shape that can't hold an example."""
    return RowError("cannot-carry", f"can't be written in this format: {what}")


def plain_conversation(example: Example) -> Conversation:
    """The example, if it is a conversation.

    Raises:
        RowError: it is something else.
    """
    if not isinstance(example, Conversation):
        raise uncarried(f"it is {type(example).__name__.lower()}, not a conversation")
    return example
