"""Answers that somebody compared, or judged one by one."""

from __future__ import annotations

import json
from typing import Any, ClassVar

from lamina.data.jsonio import json_type
from lamina.data.messages import Example, Feedback, Message, Preference, RowError
from lamina.data.shapes.alpaca import instruction
from lamina.data.shapes.base import (
    Shape,
    check_answers,
    list_column,
    others,
    string_column,
    system_column,
    tools_column,
    uncarried,
    with_extra,
)
from lamina.data.shapes.openai import parse_messages, write_messages
from lamina.data.shapes.sharegpt import parse_turns, write_turns

__all__ = ["KTO", "OpenAIPreference", "PreferencePairs", "Ranking"]


class PreferencePairs(Shape):
    name = "preference"
    title = "preference pairs"
    about = (
        "All three are texts, or all three are lists of messages (the prompt may then be one "
        "text). Without a prompt, both answers begin with it, and what they share is the prompt. "
        "Supervised training learns the chosen answer."
    )
    columns = frozenset({"prompt", "chosen", "rejected", "tools"})
    row: ClassVar[dict[str, Any]] = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}

    def fits(self, row: dict[str, Any]) -> str | None:
        if "chosen" not in row or "rejected" not in row or Ranking.has(row):
            return None
        return "has 'chosen' and 'rejected'"

    def read(self, row: dict[str, Any]) -> Preference:
        extra = others(row, self.columns)
        if isinstance(row["chosen"], str) or isinstance(row["rejected"], str):
            chosen, rejected = string_column(row, "chosen"), string_column(row, "rejected")
            _refuse_tools(row)
            if row.get("prompt") is not None:
                return Preference(string_column(row, "prompt"), chosen, rejected, [], extra)
            cut = _shared(chosen, rejected)
            if not chosen[cut:].strip() or not rejected[cut:].strip():
                raise RowError("same-answers", "has a 'chosen' and a 'rejected' that don't differ")
            return Preference(chosen[:cut], chosen[cut:], rejected[cut:], [], extra)
        good = parse_messages(list_column(row, "chosen"), "chosen")
        bad = parse_messages(list_column(row, "rejected"), "rejected")
        if row.get("prompt") is None:
            # Whole conversations: what they share is the prompt.
            cut = 0
            while cut < min(len(good), len(bad)) and good[cut] == bad[cut]:
                cut += 1
            prompt, good, bad = good[:cut], good[cut:], bad[cut:]
            if not (prompt and good and bad):
                raise RowError(
                    "same-answers", "needs a 'chosen' and a 'rejected' that begin alike and differ"
                )
        else:
            prompt = _prompt_messages(row)
        check_answers(good, "chosen")
        check_answers(bad, "rejected")
        return Preference(prompt, good, bad, tools_column(row), extra)

    def write(self, example: Example) -> dict[str, Any]:
        if not isinstance(example, Preference):
            raise uncarried("it has no two answers to choose from")
        row: dict[str, Any] = {
            "prompt": _part(example.prompt),
            "chosen": _part(example.chosen),
            "rejected": _part(example.rejected),
        }
        if example.tools:
            row["tools"] = example.tools
        return with_extra(self, row, example.extra)


class OpenAIPreference(Shape):
    name = "openai-preference"
    title = "OpenAI's preference format"
    about = (
        "`input` holds the messages of the prompt and perhaps tools; the two outputs are lists of "
        "messages."
    )
    columns = frozenset({"input", "preferred_output", "non_preferred_output"})
    row: ClassVar[dict[str, Any]] = {
        "input": {"messages": [{"role": "user", "content": "What is 2 + 2?"}]},
        "preferred_output": [{"role": "assistant", "content": "4"}],
        "non_preferred_output": [{"role": "assistant", "content": "5"}],
    }

    def fits(self, row: dict[str, Any]) -> str | None:
        return "has 'preferred_output'" if "preferred_output" in row else None

    def read(self, row: dict[str, Any]) -> Preference:
        given = row.get("input")
        if not isinstance(given, dict):
            raise RowError("wrong-type", f"'input' is {json_type(given)}, not an object")
        prompt = parse_messages(list_column(given, "messages"), "input.messages")
        good, bad = "preferred_output", "non_preferred_output"
        chosen = parse_messages(list_column(row, good), good)
        rejected = parse_messages(list_column(row, bad), bad)
        check_answers(chosen, good)
        check_answers(rejected, bad)
        extra = others(row, self.columns)
        return Preference(prompt, chosen, rejected, tools_column(given), extra)

    def write(self, example: Example) -> dict[str, Any]:
        if not isinstance(example, Preference) or isinstance(example.prompt, str):
            raise uncarried("it has no two answers, as messages, to choose from")
        given: dict[str, Any] = {"messages": write_messages(example.prompt)}
        if example.tools:
            given["tools"] = example.tools
        row = {
            "input": given,
            "preferred_output": _part(example.chosen),
            "non_preferred_output": _part(example.rejected),
        }
        return with_extra(self, row, example.extra)


class Ranking(Shape):
    name = "ranking"
    title = "LLaMA-Factory's ranking form"
    about = (
        "A ShareGPT prompt with two turns to choose from, or an Alpaca `instruction` with two "
        "texts."
    )
    includes = ("sharegpt", "alpaca")
    columns = frozenset(
        {"conversations", "instruction", "input", "system", "tools", "chosen", "rejected"}
    )
    row: ClassVar[dict[str, Any]] = {
        "conversations": [{"from": "human", "value": "What is 2 + 2?"}],
        "chosen": {"from": "gpt", "value": "4"},
        "rejected": {"from": "gpt", "value": "5"},
    }

    @staticmethod
    def has(row: dict[str, Any]) -> bool:
        return "chosen" in row and ("conversations" in row or "instruction" in row)

    def fits(self, row: dict[str, Any]) -> str | None:
        if "rejected" not in row or not self.has(row):
            return None
        return "has 'chosen' and 'rejected' answers to a ShareGPT or Alpaca prompt"

    def read(self, row: dict[str, Any]) -> Preference:
        prompt = system_column(row)
        if "conversations" in row:
            prompt += parse_turns(list_column(row, "conversations"), "conversations")
            chosen, rejected = (
                parse_turns([row.get(column)], column) for column in ("chosen", "rejected")
            )
        else:
            prompt.append(Message("user", instruction(row)))
            chosen, rejected = (
                [Message("assistant", string_column(row, column))]
                for column in ("chosen", "rejected")
            )
        check_answers(chosen, "chosen")
        check_answers(rejected, "rejected")
        return Preference(prompt, chosen, rejected, tools_column(row), others(row, self.columns))

    def write(self, example: Example) -> dict[str, Any]:
        if not isinstance(example, Preference) or isinstance(example.prompt, str):
            raise uncarried("it has no two answers, as messages, to choose from")
        if len(example.chosen) != 1 or len(example.rejected) != 1:
            raise uncarried("an answer has several turns")
        row: dict[str, Any] = {"conversations": write_turns(example.prompt)}
        if example.tools:
            row["tools"] = json.dumps(example.tools, ensure_ascii=False)
        for column, answer in (("chosen", example.chosen), ("rejected", example.rejected)):
            assert not isinstance(answer, str)
            (row[column],) = write_turns(answer)
        return with_extra(self, row, example.extra)


class KTO(Shape):
    name = "feedback"
    title = "answers with a verdict (KTO)"
    about = (
        "`label` is true for an answer that somebody liked. Supervised training learns these and "
        "leaves out the others."
    )
    columns = frozenset({"prompt", "completion", "label", "tools"})
    row: ClassVar[dict[str, Any]] = {"prompt": "2 + 2 =", "completion": " 4", "label": True}

    def fits(self, row: dict[str, Any]) -> str | None:
        if not all(column in row for column in ("prompt", "completion", "label")):
            return None
        if _verdict(row["label"]) is None:
            return None
        return "has 'prompt', 'completion' and a 'label' that is true or false"

    def read(self, row: dict[str, Any]) -> Feedback:
        label = _verdict(row.get("label"))
        if label is None:
            kind = json_type(row.get("label"))
            raise RowError("wrong-type", f"'label' is {kind}, not true or false")
        extra = others(row, self.columns)
        if isinstance(row.get("prompt"), list):
            completion = parse_messages(list_column(row, "completion"), "completion")
            check_answers(completion, "completion")
            return Feedback(_prompt_messages(row), completion, label, tools_column(row), extra)
        _refuse_tools(row)
        prompt = string_column(row, "prompt", may_be_empty=True)
        return Feedback(prompt, string_column(row, "completion"), label, [], extra)

    def write(self, example: Example) -> dict[str, Any]:
        if not isinstance(example, Feedback):
            raise uncarried("it has no verdict")
        row: dict[str, Any] = {
            "prompt": _part(example.prompt),
            "completion": _part(example.completion),
            "label": example.label,
        }
        if example.tools:
            row["tools"] = example.tools
        return with_extra(self, row, example.extra)


def _shared(one: str, other: str) -> int:
    """How much of two texts is the same, up to the end of a word."""
    size = min(len(one), len(other))
    same = next((k for k in range(size) if one[k] != other[k]), size)
    return max(one.rfind(space, 0, same) for space in " \n") + 1


def _verdict(label: object) -> bool | None:
    if isinstance(label, bool):
        return label
    words = {"true": True, "false": False}
    return words.get(label.lower()) if isinstance(label, str) else None


def _prompt_messages(row: dict[str, Any]) -> list[Message]:
    if isinstance(row["prompt"], str):
        return [Message("user", string_column(row, "prompt"))]
    return parse_messages(list_column(row, "prompt"), "prompt")


def _refuse_tools(row: dict[str, Any]) -> None:
    if row.get("tools"):
        raise RowError("wrong-type", "has 'tools', but its prompt is plain text")


def _part(part: list[Message] | str) -> list[dict[str, Any]] | str:
    return part if isinstance(part, str) else write_messages(part)
