"""Chat templates that come with a tokenizer, as Jinja source: where do assistant turns lie?"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterator
from typing import Any, Literal

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from lamina.data.chat.pieces import Mask, Piece, learned_turns
from lamina.data.messages import Conversation, Message, RowError
from lamina.errors import DataError

__all__ = ["ForeignTemplate"]


class ForeignTemplate:
    """A tokenizer's chat template.

    It is compiled here, in the environment that transformers documents for chat templates, since
    going through `apply_chat_template` costs several times the rendering itself.

    Args:
        source: the Jinja source.
        special_tokens: the tokenizer's named special tokens, which a template may write.

    Raises:
        DataError: the source isn't valid Jinja.
    """

    name = "tokenizer"

    def __init__(self, source: str, special_tokens: dict[str, Any]):
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        try:
            self._template = environment.from_string(source)
            # Copied at each rendering, which the chain of dicts that they are makes slow.
            self._template.globals = dict(self._template.globals)
            variables = meta.find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            raise DataError(
                f"The tokenizer's chat template is not valid Jinja: {error}.",
                hint="Repair the chat template in the model's folder.",
            ) from error
        self._special_tokens = special_tokens
        self._takes_tools = "tools" in variables
        self._writes_tool_calls = "tool_calls" in source

    def samples(self, conversation: Conversation, mask: Mask) -> list[list[Piece]]:
        messages = conversation.messages
        if mask == "all":
            turns, cut = [True] * len(messages), [m.role == "assistant" for m in messages]
        else:
            turns = learned_turns(messages, mask)
            # Only the last turn's rendering has to stand, if only that is learned.
            cut = turns if mask == "last" else [m.role == "assistant" for m in messages]
        pieces = []
        for text, index in self._cut(conversation, cut, prompt=False):
            learned: Literal["no", "turn"] = "turn" if index is not None and turns[index] else "no"
            pieces.append(Piece(text, learn="all" if mask == "all" else learned))
        return [pieces]

    def prompt(self, conversation: Conversation) -> list[Piece]:
        cut = [message.role == "assistant" for message in conversation.messages]
        return [Piece(text) for text, _ in self._cut(conversation, cut, prompt=True)]

    def _cut(
        self, conversation: Conversation, cut: list[bool], *, prompt: bool
    ) -> Iterator[tuple[str, int | None]]:
        """The rendered conversation in parts, from its beginning: in turn what comes before a turn
        that is to be cut out, and that turn with its index.

        Args:
            cut: which messages are to be cut out.
            prompt: end with the header of one more assistant turn.
        """
        self._refuse_unwritable(conversation)
        messages = [_to_dict(message) for message in conversation.messages]
        tools = conversation.tools or None
        whole = self._render(messages, tools, prompt)
        done = 0
        for index in (i for i, flag in enumerate(cut) if flag):
            header = self._render(messages[:index], tools, True)
            last = index + 1 == len(messages)
            turn = whole if last and not prompt else self._render(messages[: index + 1], tools)
            if not (
                len(header) >= done
                and whole.startswith(turn)
                and turn.startswith(header)
                and len(turn) > len(header)
            ):
                raise RowError("unstable-template", _why_unstable(index, header, turn, whole))
            yield whole[done : len(header)], None
            yield whole[len(header) : len(turn)], index
            done = len(turn)
        if done < len(whole):
            yield whole[done:], None

    def assistant_tail(self) -> str:
        """What the template writes after the text of an assistant's turn; empty if it can't be
        found out."""
        mark = "lamina probes this template"
        user, answer = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": mark}
        try:
            return self._render([user, answer], None).rpartition(mark)[2]
        except RowError:
            return ""

    def _render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None,
        prompt: bool = False,
    ) -> str:
        try:
            return self._template.render(
                messages=messages,
                tools=tools,
                documents=None,
                add_generation_prompt=prompt,
                **self._special_tokens,
            )
        except Exception as error:  # a template is foreign code: it can fail in any way
            reason = str(error).rstrip(".") or type(error).__name__
            raise RowError(
                "template", f"is refused by the tokenizer's chat template: {reason}"
            ) from error

    def _refuse_unwritable(self, conversation: Conversation) -> None:
        """Templates leave out what they don't know without a word."""
        if conversation.tools and not self._takes_tools:
            raise RowError(
                "tools-ignored", "offers tools, but the tokenizer's chat template has no tools"
            )
        if not self._writes_tool_calls and any(m.tool_calls for m in conversation.messages):
            raise RowError(
                "tools-ignored",
                "has tool calls, but the tokenizer's chat template doesn't write any",
            )


def _why_unstable(index: int, header: str, turn: str, whole: str) -> str:
    """The reason why a conversation can't be cut before or after `messages[index]`."""
    if not whole.startswith(turn):
        shorter, longer, what = turn, whole, f"the turns after messages[{index}] change"
    else:
        shorter, longer, what = header, turn, f"the assistant turn messages[{index}] changes"
    at = next((k for k, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), None)
    at = min(len(shorter), len(longer)) if at is None else at
    return (
        "can't be masked: the tokenizer's chat template isn't prefix-stable. In its rendering, "
        f"{what} what stands before: {shorter[at : at + 30]!r} becomes {longer[at : at + 30]!r} "
        f"after {shorter[max(0, at - 30) : at]!r}"
    )


def _to_dict(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it: tool arguments as objects."""
    result: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.tool_calls:
        result["tool_calls"] = [
            {
                "type": "function",
                **({} if call.id is None else {"id": call.id}),
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        result["tool_call_id"] = message.tool_call_id
    if message.name is not None:
        result["name"] = message.name
    return result


_DICT_ATTRIBUTES = frozenset(dir(dict))


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with a short way to what templates ask for most: `message.role`."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        if type(obj) is dict and attribute in obj and attribute not in _DICT_ATTRIBUTES:
            return obj[attribute]
        return super().getattr(obj, attribute)


class _GenerationTag(Extension):
    """`{% generation %}`, with which some templates mark what is learned: its body is rendered."""

    tags = {"generation"}  # noqa: RUF012 (declared so by Jinja)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
