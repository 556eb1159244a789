"""Shapes without a chat template: prompts with completions, segments, raw text, tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from lamina.data.jsonio import json_type
from lamina.data.messages import (
    Conversation,
    Example,
    Message,
    RowError,
    Segment,
    Segments,
    Text,
    Tokens,
)
from lamina.data.shapes.base import (
    Shape,
    check_answers,
    list_column,
    others,
    string_column,
    tools_column,
    uncarried,
    with_extra,
)
from lamina.data.shapes.openai import parse_messages, write_messages

__all__ = ["InputOutput", "PromptCompletion", "RawText", "Tokenized", "untrained"]


class PromptCompletion(Shape):
    name = "prompt-completion"
    title = "prompts with completions"
    about = (
        "If both are texts, no chat template is used: the prompt is read, the completion and an "
        "end of text are learned, and they are joined without anything between them. If both are "
        "lists of messages, they are a conversation of which only the completion is learned."
    )
    columns = frozenset({"prompt", "completion", "tools"})
    row: ClassVar[dict[str, Any]] = {"prompt": "2 + 2 =", "completion": " 4"}

    def fits(self, row: dict[str, Any]) -> str | None:
        if "prompt" in row and "completion" in row:
            return "has 'prompt' and 'completion'"
        return None

    def read(self, row: dict[str, Any]) -> Segments | Conversation:
        extra = others(row, self.columns)
        if isinstance(row.get("prompt"), list):
            answer = parse_messages(list_column(row, "completion"), "completion")
            check_answers(answer, "completion")
            given = untrained(parse_messages(list_column(row, "prompt"), "prompt"))
            return Conversation([*given, *answer], tools_column(row), extra)
        prompt = string_column(row, "prompt", may_be_empty=True)
        if row.get("tools"):
            raise RowError("wrong-type", "has 'tools', but its prompt is plain text")
        completion = string_column(row, "completion")
        return Segments([Segment(prompt, False), Segment(completion, True)], True, extra)

    def write(self, example: Example) -> dict[str, Any]:
        if isinstance(example, Conversation):
            return with_extra(self, self._messages(example), example.extra)
        if not isinstance(example, Segments):
            raise uncarried(f"it is {type(example).__name__.lower()}, not a prompt with an answer")
        parts = example.segments
        if [part.train for part in parts] != [False, True] or not example.closed:
            raise uncarried("it isn't one prompt with one completion")
        row = {"prompt": parts[0].text, "completion": parts[1].text}
        return with_extra(self, row, example.extra)

    def _messages(self, example: Conversation) -> dict[str, Any]:
        messages = example.messages
        cut = len(messages)
        while cut and messages[cut - 1].role == "assistant" and messages[cut - 1].train is None:
            cut -= 1
        prompt, completion = messages[:cut], messages[cut:]
        if (
            not prompt
            or not completion
            or any(m.role == "assistant" and m.train is not False for m in prompt)
        ):
            raise uncarried("it has a trained turn before its last question")
        # Reading flags the prompt's answers as untrained: that need not be written.
        bare = [replace(m, train=None) if m.role == "assistant" else m for m in prompt]
        row: dict[str, Any] = {
            "prompt": write_messages(bare),
            "completion": write_messages(completion),
        }
        return {**row, "tools": example.tools} if example.tools else row


def untrained(messages: list[Message]) -> list[Message]:
    """The messages of a prompt, whose answers are read and not learned."""
    for message in messages:
        if message.role == "assistant":
            message.train = False
    return messages


class InputOutput(Shape):
    name = "input-output"
    title = "Axolotl's segments"
    about = (
        "Pieces of text that are learned (`label` true) or only read. All control tokens stand in "
        "the text; none are added but a beginning of text, if the tokenizer wants one."
    )
    columns = frozenset({"segments"})
    row: ClassVar[dict[str, Any]] = {
        "segments": [
            {"label": False, "text": "<s>2 + 2 = "},
            {"label": True, "text": "4</s>"},
        ]
    }

    def fits(self, row: dict[str, Any]) -> str | None:
        return "has 'segments'" if "segments" in row else None

    def read(self, row: dict[str, Any]) -> Segments:
        segments = []
        for index, part in enumerate(list_column(row, "segments")):
            place = f"segments[{index}]"
            if not isinstance(part, dict):
                raise RowError("wrong-type", f"{place} is {json_type(part)}, not an object")
            text, label = part.get("text"), part.get("label")
            if not isinstance(text, str):
                raise RowError("wrong-type", f"{place}.text is {json_type(text)}, not a string")
            if not isinstance(label, bool):
                raise RowError("wrong-type", f"{place}.label is {json_type(label)}, not a boolean")
            segments.append(Segment(text, label))
        if not any(part.train and part.text for part in segments):
            raise RowError("nothing-to-learn", "has nothing to learn from: no segment is labelled")
        return Segments(segments, False, others(row, self.columns))

    def write(self, example: Example) -> dict[str, Any]:
        if not isinstance(example, Segments):
            raise uncarried(f"it is {type(example).__name__.lower()}, not text in segments")
        if example.closed:
            raise uncarried("an end of text follows it, which depends on the model")
        parts = [{"label": part.train, "text": part.text} for part in example.segments]
        return with_extra(self, {"segments": parts}, example.extra)


class RawText(Shape):
    name = "text"
    title = "raw text"
    about = "The whole text is learned, and an end of text after it."
    columns = frozenset({"text"})
    row: ClassVar[dict[str, Any]] = {"text": "Two and two make four."}

    def fits(self, row: dict[str, Any]) -> str | None:
        return "has 'text'" if "text" in row else None

    def read(self, row: dict[str, Any]) -> Text:
        text = string_column(row, "text")
        return Text(text) if len(row) == 1 else Text(text, others(row, self.columns))

    def write(self, example: Example) -> dict[str, Any]:
        if not isinstance(example, Text):
            raise uncarried(f"it is {type(example).__name__.lower()}, not raw text")
        return with_extra(self, {"text": example.text}, example.extra)


class Tokenized(Shape):
    name = "tokens"
    title = "tokens with labels"
    about = (
        "Tokens of the model's own vocabulary, used as they are. A label is its token's id where "
        "it is learned, and -100 elsewhere; without labels everything is learned. Tokens with an "
        "`attention_mask` of 0 are padding, and are left out."
    )
    columns = frozenset({"input_ids", "labels", "attention_mask"})
    row: ClassVar[dict[str, Any]] = {
        "input_ids": [1, 733, 16289, 4],
        "labels": [-100, -100, 16289, 4],
    }

    def fits(self, row: dict[str, Any]) -> str | None:
        return "has 'input_ids'" if "input_ids" in row else None

    def read(self, row: dict[str, Any]) -> Tokens:
        ids = self._ints(row, "input_ids")
        labels = self._ints(row, "labels") if row.get("labels") is not None else list(ids)
        kept = [True] * len(ids)
        if row.get("attention_mask") is not None:
            kept = [bool(flag) for flag in self._ints(row, "attention_mask")]
        if not len(ids) == len(labels) == len(kept):
            raise RowError(
                "labels",
                f"has {len(ids)} input_ids, {len(labels)} labels and {len(kept)} mask entries",
            )
        for t, (token, label) in enumerate(zip(ids, labels, strict=True)):
            if label not in (-100, token):
                raise RowError(
                    "labels", f"labels[{t}] is {label}; it can be -100 or its input_id, {token}"
                )
        # Padding is left out: nothing here is ever padded.
        if not all(kept):
            ids = [i for i, keep in zip(ids, kept, strict=True) if keep]
            labels = [label for label, keep in zip(labels, kept, strict=True) if keep]
        if all(label == -100 for label in labels[1:]):
            raise RowError("nothing-to-learn", "has nothing to learn from: every label is -100")
        return Tokens(ids, labels, others(row, self.columns))

    def _ints(self, row: dict[str, Any], column: str) -> list[int]:
        values = list_column(row, column)
        for index, value in enumerate(values):
            if type(value) is not int:
                kind = json_type(value)
                raise RowError("wrong-type", f"{column}[{index}] is {kind}, not an integer")
        return values

    def write(self, example: Example) -> dict[str, Any]:
        if not isinstance(example, Tokens):
            raise uncarried("it isn't tokenized")
        row = {"input_ids": example.input_ids, "labels": example.labels}
        return with_extra(self, row, example.extra)
