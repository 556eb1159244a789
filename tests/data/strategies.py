"""Generated examples, for the tests that hold for all of them."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from lamina.data.messages import (
    Conversation,
    Feedback,
    Message,
    Preference,
    Segment,
    Segments,
    Text,
    Tokens,
    ToolCall,
)

TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
FULL = TEXT.filter(lambda text: bool(text.strip()))
VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
#: Columns that no format knows, carried along.
EXTRA = st.dictionaries(st.sampled_from(["id", "source", "größe", "score"]), VALUES, max_size=2)
#: Columns that one format or another gives a meaning.
MEANINGFUL = st.dictionaries(
    st.sampled_from(["system", "history", "label", "text", "input", "tools", "prompt"]),
    VALUES,
    max_size=1,
)
NAME = st.sampled_from(["f", "get_weather"])
CALL = st.builds(
    ToolCall,
    NAME,
    st.dictionaries(TEXT, VALUES, max_size=2) | st.sampled_from(["", "not json", "[1]"]),
    st.none() | st.sampled_from(["call12345", "x"]),
)
TOOL = st.builds(
    lambda name, text: {
        "type": "function",
        "function": {"name": name, "description": text, "parameters": {"type": "object"}},
    },
    NAME,
    TEXT,
)
FLAG = st.none() | st.booleans()
NAMED = st.none() | st.just("Ann")

SYSTEM = st.builds(lambda text: Message("system", text), TEXT)
USER = st.builds(lambda text, name: Message("user", text, name=name), TEXT, NAMED)
ANSWER = st.builds(lambda text, train: Message("assistant", text, train=train), FULL, FLAG)
CALLING = st.builds(
    lambda calls, text: Message("assistant", text, calls),
    st.lists(CALL, min_size=1, max_size=2),
    st.sampled_from(["", "", "Let me see."]),
)
RESULT = st.builds(
    lambda text, call_id: Message("tool", text, tool_call_id=call_id),
    TEXT,
    st.none() | st.just("call12345"),
)
TURNS = st.lists(SYSTEM | USER | ANSWER | CALLING | RESULT, max_size=6)


def _learnable(messages: list[Message]) -> list[Message]:
    return [*messages, Message("user", "?"), Message("assistant", "!")]


CONVERSATION = st.builds(Conversation, TURNS.map(_learnable), st.lists(TOOL, max_size=2), EXTRA)
PLAIN_CHAT = st.builds(
    lambda system, pairs, extra: Conversation(
        [
            *([Message("system", system)] if system.strip() else []),
            *(
                message
                for asked, answered in pairs
                for message in (Message("user", asked), Message("assistant", answered))
            ),
        ],
        [],
        extra,
    ),
    TEXT,
    st.lists(st.tuples(FULL, FULL), min_size=1, max_size=3),
    EXTRA,
)
RAW_TEXT = st.builds(Text, FULL, EXTRA)
COMPLETION = st.builds(
    lambda prompt, completion, extra: Segments(
        [Segment(prompt, False), Segment(completion, True)], True, extra
    ),
    TEXT,
    FULL,
    EXTRA,
)
SEGMENTS = st.builds(
    lambda parts, extra: Segments([*parts, Segment("x", True)], False, extra),
    st.lists(st.builds(Segment, TEXT, st.booleans()), max_size=3),
    EXTRA,
)
TOKENS = st.builds(
    lambda pairs, extra: Tokens(
        [1, *(i for i, _ in pairs), 2],
        [-100, *(i if flag else -100 for i, flag in pairs), 2],
        extra,
    ),
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=4),
    EXTRA,
)
PROMPT = st.lists(SYSTEM | USER, min_size=1, max_size=2)
ANSWERS = st.builds(lambda text: [Message("assistant", text)], FULL)
PREFERENCE = st.builds(
    Preference, PROMPT, ANSWERS, ANSWERS, st.lists(TOOL, max_size=1), EXTRA
) | st.builds(Preference, FULL, FULL, FULL, st.just([]), EXTRA)
FEEDBACK = st.builds(
    Feedback, PROMPT, ANSWERS, st.booleans(), st.lists(TOOL, max_size=1), EXTRA
) | st.builds(Feedback, TEXT, FULL, st.booleans(), st.just([]), EXTRA)

ANY_EXAMPLE = st.one_of(
    CONVERSATION, PLAIN_CHAT, RAW_TEXT, COMPLETION, SEGMENTS, TOKENS, PREFERENCE, FEEDBACK
)
