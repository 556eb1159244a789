"""Every kind of mistake that is looked for, with what to do about it.

An *error* stops a training run: the row can't be used, or would teach something wrong. A *warning*
is worth a look. A *note* says how something was understood.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["CODES", "Code", "Severity"]

Severity = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Code:
    """A kind of mistake.

    Args:
        title: what is the matter, as the beginning of a line with a count.
        advice: what to do about it.
        fixed: what `check --fix` does about it, or "" if that is nothing.
    """

    code: str
    severity: Severity
    title: str
    advice: str
    fixed: str = ""


def _table(severity: Severity, *rows: tuple[str, ...]) -> dict[str, Code]:
    return {row[0]: Code(row[0], severity, *row[1:]) for row in rows}


_FILE = _table(
    "error",
    ("encoding", "text that isn't valid UTF-8", "Save the file as UTF-8."),
    ("not-json", "lines that aren't JSON", "Write one JSON object a line."),
    ("not-object", "rows that aren't objects", "Write one JSON object a line."),
    (
        "duplicate-key",
        "objects with one key twice",
        "Remove one of them: readers disagree on which counts.",
    ),
    ("not-csv", "tables that break off", "Close the quotation mark that stays open."),
    (
        "csv-columns",
        "table rows of another width than the header",
        "Put cells with a delimiter or a line break in double quotation marks.",
    ),
)

_ROW = _table(
    "error",
    (
        "unknown-shape",
        "rows of no known format",
        "Map the columns (user=COLUMN,assistant=COLUMN), or name the format.",
    ),
    ("missing-column", "rows without a mapped column", "Check the spelling of the mapping."),
    ("wrong-type", "values of the wrong type", "Give the type that the format asks for."),
    ("missing-role", "turns without a role", "Say who speaks."),
    ("unknown-role", "turns with an unknown role", "Use system, user, assistant or tool."),
    ("missing-content", "turns without content", "Write the text, or remove the turn."),
    ("not-text", "content that isn't text", "Remove images and files: only text is trained."),
    ("empty-messages", "conversations without a turn", "Remove these rows."),
    ("empty-text", "empty texts", "Remove these rows."),
    (
        "empty-assistant",
        "empty answers",
        "Remove them: they would teach the model to say nothing.",
    ),
    (
        "nothing-to-learn",
        "rows with nothing to learn from",
        "Give each conversation an answer that is trained.",
    ),
    ("weight", "weights that are neither 0 nor 1", "Use 1 for turns to train and 0 for others."),
    ("labels", "labels that don't fit their tokens", "A label is its token's id, or -100."),
    ("same-answers", "pairs whose answers don't differ", "Remove these rows."),
    ("cannot-carry", "rows that a format can't carry", "Convert to another format."),
)

_TOOLS = _table(
    "error",
    ("tool-calls", "malformed tool calls", "A call has a function with a name and arguments."),
    (
        "tool-arguments",
        "tool arguments that don't fit the tool",
        "Make them an object that is valid under the tool's JSON schema.",
    ),
    ("unknown-tool", "calls of a tool that isn't on offer", "Add the tool to 'tools'."),
    ("tool-schema", "tools whose JSON schema is invalid", "Mend the tool's 'parameters'."),
    ("orphan-result", "tool results that answer no call", "Put the call before its result."),
    ("duplicate-call-id", "tool calls that share an id", "Give each call an id of its own."),
)

_RENDERING = _table(
    "error",
    ("no-template", "messages for a model without a chat template", "Use an instruct model."),
    ("template", "rows that the chat template refuses", "Do what its message says."),
    (
        "unstable-template",
        "rows that the chat template changes afterwards",
        "Train the last turn only, or use a template that keeps earlier turns as they are.",
    ),
    (
        "no-end-of-turn",
        "answers that the chat template never ends",
        "Use a template that ends answers with a token that stops generation.",
    ),
    (
        "tools-ignored",
        "tools that the chat template leaves out",
        "Use a model whose template knows tools, or write them into the text.",
    ),
    (
        "content-beside-calls",
        "text beside tool calls, which the model's format can't hold",
        "Split the turn in two, or remove the text.",
    ),
    ("double-bos", "texts with two beginnings of text", "Remove the one written in the text."),
    ("unknown-token", "tokens outside the vocabulary", "Tokenize with this model's tokenizer."),
)

_WARNINGS = _table(
    "warning",
    (
        "bom",
        "files with a byte order mark",
        "It is passed over here, but other programs trip over it.",
        "written without it",
    ),
    ("nan", "rows with NaN or Infinity", "JSON has no such values.", "written as null"),
    (
        "empty-turn",
        "empty user, system or tool turns",
        "Check that no text was lost.",
        "empty system prompts are removed",
    ),
    ("role-order", "turns in an unusual order", "Let user and assistant take turns."),
    (
        "last-turn",
        "conversations that don't end with an answer",
        "What comes after the last answer is not used.",
        "turns after the last answer are removed",
    ),
    ("unanswered-call", "tool calls without a result", "Add the result of each call."),
    (
        "loose-result",
        "tool results in conversations without a tool call",
        "If the calls are written as text, move them to 'tool_calls', so that the model's own "
        "format is used.",
    ),
    (
        "missing-call-id",
        "tool calls or results without an id",
        "Results are matched to calls in order; ids are safer.",
        "ids are added where there is one call and one result",
    ),
    (
        "control-tokens",
        "control tokens written in a text",
        "A tokenizer may take them for real ones: a user could forge an assistant's turn.",
    ),
    (
        "duplicate",
        "rows that are there twice",
        "They are learned twice as much.",
        "all but the first are removed",
    ),
    (
        "near-duplicate",
        "rows that are nearly the same as another",
        "Look whether they add anything.",
    ),
    (
        "leakage",
        "training rows that are also in the evaluation data",
        "Remove them from one side: the evaluation would be too good.",
    ),
    (
        "near-leakage",
        "training rows that are nearly the same as an evaluation row",
        "Remove them from one side.",
    ),
    (
        "prompt-leakage",
        "training rows whose question is in the evaluation data with another answer",
        "Remove them from one side if the answer gives it away.",
    ),
    (
        "constant-answers",
        "rows that share one answer",
        "The model may learn to always say it.",
    ),
    (
        "too-long",
        "rows with more tokens than max_length",
        "Raise max_length, or choose what happens to them: drop, truncate or split.",
    ),
    (
        "unencodable",
        "texts that the tokenizer loses a part of",
        "Its vocabulary lacks these characters.",
    ),
    ("pii", "texts with personal data", "Remove or replace it, if it must not be learned."),
)

_NOTES = _table(
    "note",
    ("mixed-shapes", "formats mixed in one dataset", "Each row is read as its own."),
    ("ambiguous", "rows that can be understood in two ways", "Name the format that is meant."),
    (
        "unknown-columns",
        "rows with columns or fields that the format doesn't know",
        "They are not trained, and conversions carry them along.",
    ),
)

CODES: dict[str, Code] = {**_FILE, **_ROW, **_TOOLS, **_RENDERING, **_WARNINGS, **_NOTES}
