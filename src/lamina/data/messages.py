"""The canonical form that every data format is read into and written from.

An *example* is one row of a dataset: a `Conversation` or a raw `Text`. The classes are dataclasses
with slots and not pydantic models, because a million rows are built in seconds;
`canonical_adapter()` is the pydantic adapter over the same classes that validates, serializes and
describes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, get_args

from pydantic import TypeAdapter

__all__ = [
    "ROLES",
    "Conversation",
    "Example",
    "Message",
    "Role",
    "RowError",
    "Text",
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
    """

    role: Role
    content: str
    tool_calls: list[ToolCall] = field(default_factory=list)
    tool_call_id: str | None = None
    name: str | None = None
    train: bool | None = None


@dataclass(slots=True)
class Conversation:
    """Messages in order, with the tools (JSON schemas, as OpenAI writes them) on offer in them."""

    messages: list[Message]
    tools: list[dict[str, Any]] = field(default_factory=list)
    id: str | None = None


@dataclass(slots=True)
class Text:
    """A document that is learned as it stands."""

    text: str
    id: str | None = None


Example = Conversation | Text


@cache
def canonical_adapter() -> TypeAdapter[Example]:
    """The pydantic adapter of `Example`: validation, serialization and the JSON schema."""
    return TypeAdapter(Example)
