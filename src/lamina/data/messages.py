"""The canonical form that every data format is read into and written from.

An *example* is one row of a dataset. The classes are dataclasses with slots and not pydantic
models, because a million rows are built in seconds; `canonical_adapter()` is the pydantic adapter
over the same classes that validates, serializes and describes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from pydantic import TypeAdapter

__all__ = [
    "ROLES",
    "Conversation",
    "Example",
    "Feedback",
    "Message",
    "Preference",
    "Role",
    "RowError",
    "Segment",
    "Segments",
    "Text",
    "Tokens",
    "ToolCall",
    "canonical_adapter",
]

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[str, ...] = get_args(Role)


class RowError(Exception):
    """One row that can't be used.

    Args:
        code: the kind of mistake, e.g. `unknown-role`.
        message: what is wrong, without the place, which the reader puts before it.
    """

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code
        self.message = message


@dataclass(slots=True)
class ToolCall:
    """A call that an assistant makes.

    Args:
        arguments: the arguments as an object; as a string only where they aren't a JSON object.
        id: joins the call to its result, or None where the format has no such thing.
    """

    name: str
    arguments: dict[str, Any] | str
    id: str | None = None


@dataclass(slots=True)
class Message:
    """One turn.

    Args:
        content: the text; empty beside tool calls that come without one.
        tool_call_id: on a tool's result, the call that it answers.
        name: the speaker's or the tool's name.
        train: whether this turn is learned; None leaves it to the masking policy.
        extra: its other fields, which training ignores, conversion carries along and comparisons
            pass over.
    """

    role: Role
    content: str
    tool_calls: list[ToolCall] = field(default_factory=list)
    tool_call_id: str | None = None
    name: str | None = None
    train: bool | None = None
    extra: dict[str, Any] = field(default_factory=dict, compare=False)


@dataclass(slots=True)
class Conversation:
    """Messages in order.

    Args:
        tools: the tools on offer, as OpenAI writes them (JSON schemas).
        extra: the row's other columns, which training ignores and conversion carries along.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Text:
    """A document that is learned as it stands."""

    text: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Segment:
    """A piece of text that is learned or only read."""

    text: str
    train: bool


@dataclass(slots=True)
class Segments:
    """Text in pieces, without a chat template.

    Args:
        closed: whether an end of text follows the last piece. A prompt with its completion is
            closed; Axolotl's segments write all their control tokens themselves.
    """

    segments: list[Segment]
    closed: bool = True
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Tokens:
    """A row that somebody has tokenized already.

    Args:
        labels: as long as `input_ids`; -100 where nothing is learned.
    """

    input_ids: list[int]
    labels: list[int]
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Preference:
    """Two answers to one prompt, of which the first is preferred. All three parts are messages, or
    all three are plain text."""

    prompt: list[Message] | str
    chosen: list[Message] | str
    rejected: list[Message] | str
    tools: list[dict[str, Any]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Feedback:
    """An answer that somebody liked, or didn't. Both parts are messages, or both are plain text."""

    prompt: list[Message] | str
    completion: list[Message] | str
    label: bool
    tools: list[dict[str, Any]] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)


Example = Conversation | Text | Segments | Tokens | Preference | Feedback


@cache
def canonical_adapter() -> TypeAdapter[Example]:
    """The pydantic adapter of `Example`: validation, serialization and the JSON schema."""
    from pydantic import TypeAdapter

    return TypeAdapter(Example)
