"""Alpaca: an instruction, perhaps with an input, and an output; and tables of two columns."""

from __future__ import annotations

from typing import Any, ClassVar

from lamina.data.jsonio import json_type
from lamina.data.messages import Conversation, Example, Message, RowError
from lamina.data.shapes.base import (
    Shape,
    check_answers,
    list_column,
    others,
    plain_conversation,
    string_column,
    system_column,
    uncarried,
    with_extra,
)

__all__ = ["Alpaca", "Table", "instruction"]


class Alpaca(Shape):
    name = "alpaca"
    title = "Alpaca instructions"
    about = (
        "The user says the `instruction` and, if there is one, the `input` on the next line; the "
        "assistant answers with the `output`. `system` is the system prompt, `history` a list of "
        "earlier questions with their answers, which are learned too."
    )
    columns = frozenset({"instruction", "input", "output", "system", "history"})
    row: ClassVar[dict[str, Any]] = {
        "instruction": "Add the numbers.",
        "input": "2, 2",
        "output": "4",
    }

    def fits(self, row: dict[str, Any]) -> str | None:
        if "instruction" in row and "output" in row:
            return "has 'instruction' and 'output'"
        return None

    def read(self, row: dict[str, Any]) -> Conversation:
        messages = [
            *system_column(row),
            *_history(row),
            Message("user", instruction(row)),
            Message("assistant", string_column(row, "output", may_be_empty=True)),
        ]
        check_answers(messages)
        return Conversation(messages, [], others(row, self.columns))

    def write(self, example: Example) -> dict[str, Any]:
        system, turns = _pairs(plain_conversation(example))
        asked, answered = turns[-1]
        row: dict[str, Any] = {"instruction": asked, "input": "", "output": answered}
        if system:
            row["system"] = system
        if len(turns) > 1:
            row["history"] = [list(turn) for turn in turns[:-1]]
        return with_extra(self, row, example.extra)


class Table(Shape):
    name = "table"
    title = "question and answer columns, mapped to `user` and `assistant`"
    about = (
        "For tables of questions and answers: map the columns, as in "
        "`--map user=question,assistant=answer` (and `system=...`). They become a conversation of "
        "one exchange."
    )
    columns = frozenset({"user", "assistant", "system"})
    row: ClassVar[dict[str, Any]] = {"user": "What is 2 + 2?", "assistant": "4"}

    def fits(self, row: dict[str, Any]) -> str | None:
        return "has 'user' and 'assistant'" if "user" in row and "assistant" in row else None

    def read(self, row: dict[str, Any]) -> Conversation:
        messages = [
            *system_column(row),
            Message("user", string_column(row, "user")),
            Message("assistant", string_column(row, "assistant", may_be_empty=True)),
        ]
        check_answers(messages)
        return Conversation(messages, [], others(row, self.columns))

    def write(self, example: Example) -> dict[str, Any]:
        system, turns = _pairs(plain_conversation(example))
        if len(turns) > 1:
            raise uncarried("it has several turns")
        row: dict[str, Any] = {"user": turns[0][0], "assistant": turns[0][1]}
        return with_extra(self, {"system": system, **row} if system else row, example.extra)


def instruction(row: dict[str, Any]) -> str:
    """What the user says: the instruction, and its input on the next line."""
    asked = string_column(row, "instruction", may_be_empty=True)
    given = string_column(row, "input", may_be_empty=True)
    if not (asked + given).strip():
        raise RowError("empty-text", "'instruction' is empty")
    return f"{asked}\n{given}" if given else asked


def _history(row: dict[str, Any]) -> list[Message]:
    if not row.get("history"):
        return []
    messages = []
    for index, turn in enumerate(list_column(row, "history")):
        if (
            not isinstance(turn, list)
            or len(turn) != 2
            or not all(isinstance(text, str) for text in turn)
        ):
            raise RowError("wrong-type", f"history[{index}] is {json_type(turn)}, not two strings")
        messages += [Message("user", turn[0]), Message("assistant", turn[1])]
    return messages


def _pairs(conversation: Conversation) -> tuple[str, list[tuple[str, str]]]:
    """The system prompt, and the conversation as pairs of a question and its answer."""
    messages = conversation.messages
    system = ""
    if messages[0].role == "system":
        system, messages = messages[0].content, messages[1:]
    asked, answered = messages[::2], messages[1::2]
    if conversation.tools or any(m.tool_calls for m in messages):
        raise uncarried("it has tools")
    if any(m.train is not None or m.name is not None for m in messages):
        raise uncarried("a turn has a name or a weight")
    if any(m.extra for m in conversation.messages):
        raise uncarried("a turn has further fields")
    if (
        len(asked) != len(answered)
        or any(m.role != "user" for m in asked)
        or any(m.role != "assistant" for m in answered)
    ):
        raise uncarried("its turns aren't questions and answers in turn")
    pairs = [(q.content, a.content) for q, a in zip(asked, answered, strict=True)]
    if not pairs[-1][0].strip():
        raise uncarried("its last question is empty")
    return system, pairs
