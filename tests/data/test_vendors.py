"""Our templates against the vendors' own encoders, over generated conversations."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lamina.data.chat.llama4 import with_tools_in_system
from lamina.data.messages import Conversation, Message, ToolCall
from lamina.data.template import Renderer
from lamina.errors import DataError

LIMITS = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)

CONTROL = ["<|eot|>", "</s>", "[INST]", "[/INST]", "<s>", "<|header_start|>", "  ", "\n\n", "▁"]
TEXT = st.lists(
    st.text(st.characters(codec="utf-8"), max_size=12) | st.sampled_from(CONTROL), max_size=4
).map("".join)
ANSWER = TEXT.filter(lambda text: bool(text.strip()))
SCALARS = st.none() | st.booleans() | st.integers(-5, 10**20) | st.text(max_size=5)
SCALARS |= st.floats(allow_nan=False, allow_infinity=False)
ARGUMENTS = st.dictionaries(
    st.text("abcé_", min_size=1, max_size=6),
    SCALARS | st.lists(SCALARS, max_size=2) | st.dictionaries(st.text(max_size=3), SCALARS),
    max_size=3,
)
NAMES = st.sampled_from(["get_weather", "f", "look-up"])
TOOLS = st.lists(
    st.builds(
        lambda name, text, parameters: {
            "type": "function",
            "function": {"name": name, "description": text, "parameters": parameters},
        },
        NAMES,
        TEXT,
        st.sampled_from([{}, {"type": "object", "properties": {"é": {"type": "string"}}}]),
    ),
    max_size=2,
)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    messages: list[Message] = []
    if draw(st.booleans()):
        messages.append(Message("system", draw(TEXT)))
    calls = 0
    for _ in range(draw(st.integers(1, 4))):
        messages.append(Message("user", draw(TEXT)))
        for _ in range(draw(st.integers(0, 2))):
            made = draw(st.lists(st.tuples(NAMES, ARGUMENTS), min_size=1, max_size=3))
            named = [
                ToolCall(name, arguments, f"call{calls + k:05d}")
                for k, (name, arguments) in enumerate(made)
            ]
            calls += len(made)
            messages.append(Message("assistant", "", named))
            messages += [
                Message(
                    "tool",
                    draw(TEXT | SCALARS.map(json.dumps)),
                    tool_call_id=call.id,
                    name=call.name,
                )
                for call in named
            ]
        messages.append(Message("assistant", draw(ANSWER)))
    return Conversation(messages, draw(TOOLS))


@dataclass
class Pair:
    """A vendor's encoder, and our renderer on the same vocabulary."""

    vendor: Any
    renderer: Renderer


# -- Llama 4 --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama(llama_encoder: Any, llama_tokenizer: Any) -> Pair:
    return Pair(llama_encoder, Renderer(llama_tokenizer))


def llama_messages(messages: Any) -> list[Any]:
    from llama_models.datatypes import RawMessage
    from llama_models.datatypes import ToolCall as LlamaCall

    return [
        RawMessage(
            role=message.role,
            content=message.content,
            tool_calls=[
                LlamaCall(call_id=call.id or "", tool_name=call.name, arguments=call.arguments)
                for call in message.tool_calls
            ],
        )
        for message in messages
    ]


def simple_arguments(conversation: Conversation) -> bool:
    """Whether Meta's own types can hold the arguments of all calls."""
    try:
        llama_messages(conversation.messages)
    except ValueError:
        return False
    return True


def llama_prompt(pair: Pair, messages: Any) -> list[int]:
    tokens: list[int] = pair.vendor.encode_dialog_prompt(llama_messages(messages)).tokens
    return tokens


@LIMITS
@given(conversation=conversations().filter(simple_arguments))
def test_llama4_is_meta_s_encoding_to_the_token(llama: Pair, conversation: Conversation) -> None:
    messages = with_tools_in_system(conversation)
    (sample,) = llama.renderer.render(conversation)
    ids, mask = sample.input_ids.tolist(), sample.loss_mask.tolist()
    whole = llama_prompt(llama, messages)
    header = llama_prompt(llama, [])[1:]
    assert ids + header == whole
    expected = [False] * len(ids)
    for index, message in enumerate(messages):
        if message.role == "assistant":
            before = len(llama_prompt(llama, messages[:index]))
            after = len(llama_prompt(llama, messages[: index + 1])) - len(header)
            expected[before:after] = [True] * (after - before)
            assert llama.renderer.prompt(Conversation(list(messages[:index]))) == whole[:before]
    assert mask == expected


def test_llama4_writes_known_tools_in_their_own_way(llama: Pair) -> None:
    calls = [
        ToolCall("brave_search", {"query": "a {} b"}, "x"),
        ToolCall("code_interpreter", {"code": "1 + 1"}, "y"),
    ]
    conversation = Conversation([Message("user", "q"), Message("assistant", "Well:", calls)])
    (sample,) = llama.renderer.render(conversation)
    text = llama.renderer.tokenizer.decode(sample.input_ids)
    assert text.endswith('Well:brave_search.call(query="a {} b")1 + 1<|eom|>')
    expected = llama_prompt(llama, conversation.messages)
    assert sample.input_ids.tolist() == expected[: len(sample.input_ids)]
    calls[0].arguments = {}
    with pytest.raises(DataError, match="calls brave_search without 'query'"):
        llama.renderer.render(conversation)


def test_llama4_describes_tools_in_the_system_prompt(llama: Pair) -> None:
    tool = {"name": "f", "parameters": {}}
    for messages in (
        [Message("user", "q"), Message("assistant", "a")],
        [Message("system", "Be brief."), Message("user", "q"), Message("assistant", "a")],
    ):
        (sample,) = llama.renderer.render(Conversation(messages, [tool]))
        text = llama.renderer.tokenizer.decode(sample.input_ids)
        start = "<|begin_of_text|><|header_start|>system<|header_end|>\n\n"
        assert text.startswith(start + ("Be brief.\n\n" if len(messages) == 3 else "") + "You can")
        assert '{"type": "function", "function": {"name": "f", "parameters": {}}}<|eot|>' in text


def test_llama4_stops_at_its_ends_of_turn(llama: Pair) -> None:
    reference = llama.vendor.tokenizer
    assert llama.renderer.template_name == "llama4"
    assert llama.renderer.stop_ids == set(reference.stop_tokens)
    assert llama.renderer.end_of_turn_id == reference.eot_id


# -- Mixtral --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixtral(mistral_encoder: Any, mistral_tokenizer: Any) -> Pair:
    return Pair(mistral_encoder, Renderer(mistral_tokenizer))


def mistral_tokens(pair: Pair, conversation: Conversation, count: int) -> list[int]:
    """Mistral's encoding of the first `count` messages, which may end with any role."""
    from mistral_common.protocol.instruct import messages as m
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.protocol.instruct.tool_calls import FunctionCall, Tool
    from mistral_common.protocol.instruct.tool_calls import ToolCall as MistralCall

    converted: list[Any] = []
    for message in conversation.messages[:count]:
        if message.role == "assistant":
            calls = [
                MistralCall(id=c.id, function=FunctionCall(name=c.name, arguments=c.arguments))
                for c in message.tool_calls
            ]
            converted.append(
                m.AssistantMessage(content=message.content or None, tool_calls=calls or None)
            )
        elif message.role == "tool":
            converted.append(
                m.ToolMessage(content=message.content, tool_call_id=message.tool_call_id)
            )
        else:
            kind = m.UserMessage if message.role == "user" else m.SystemMessage
            converted.append(kind(content=message.content))
    request = ChatCompletionRequest(
        messages=converted, tools=[Tool.from_openai(t) for t in conversation.tools] or None
    )
    if converted[-1].role == "assistant":
        tokens: list[int] = pair.vendor.encode_chat_completion(request).tokens
        return tokens
    # Finetuning mode wants an answer at the end; the encoder below it doesn't.
    normal = pair.vendor._instruct_request_normalizer.from_chat_completion_request(request)
    prompt: list[int] = pair.vendor.instruct_tokenizer.encode_instruct(normal).tokens
    return prompt


@LIMITS
@given(conversation=conversations())
def test_mixtral_is_mistral_s_encoding_to_the_token(
    mixtral: Pair, conversation: Conversation
) -> None:
    messages = conversation.messages
    samples = mixtral.renderer.render(conversation)
    covered: list[int] = []
    users = [i for i, m in enumerate(messages) if m.role == "user"]
    moved = bool(conversation.tools) or any(m.role == "system" and m.content for m in messages)
    if moved:
        assert len(samples) == len(users)
        groups = list(zip(users, [*users[1:], len(messages)], strict=True))
    else:
        assert len(samples) == 1
        groups = [(0, len(messages))]
    for sample, (start, end) in zip(samples, groups, strict=True):
        ids = sample.input_ids.tolist()
        assert ids == mistral_tokens(mixtral, conversation, end)
        expected = [False] * len(ids)
        for index in range(start, end):
            if messages[index].role == "assistant":
                prompt = mistral_tokens(mixtral, conversation, index)
                after = len(mistral_tokens(mixtral, conversation, index + 1))
                expected[len(prompt) : after] = [True] * (after - len(prompt))
                assert ids[: len(prompt)] == prompt
                shown = Conversation(messages[:index], conversation.tools)
                assert mixtral.renderer.prompt(shown) == prompt
                covered.append(index)
        assert sample.loss_mask.tolist() == expected
    # Every answer is learned in exactly one sample.
    assert covered == [i for i, m in enumerate(messages) if m.role == "assistant"]


def test_mixtral_joins_neighbours_as_mistral_does(mixtral: Pair) -> None:
    conversation = Conversation(
        [
            Message("assistant", "first"),
            Message("user", "a"),
            Message("user", ""),
            Message("user", "b"),
            Message("system", "one"),
            Message("user", "c"),
            Message("system", "two"),
            Message("assistant", "x  "),
            Message("assistant", "y  "),
        ]
    )
    *_, sample = mixtral.renderer.render(conversation)
    assert sample.input_ids.tolist() == mistral_tokens(mixtral, conversation, 9)
    text = mixtral.renderer.tokenizer.decode(sample.input_ids)
    assert "one\n\ntwo\n\nc" in text


def test_mixtral_writes_call_ids_of_nine_characters(mixtral: Pair) -> None:
    def exchange(call_id: str | None, result_id: str | None) -> str:
        messages = [
            Message("user", "q"),
            Message("assistant", "", [ToolCall("f", {}, call_id)]),
            Message("tool", "1", tool_call_id=result_id),
            Message("assistant", "a"),
        ]
        (sample,) = mixtral.renderer.render(Conversation(messages))
        text: str = mixtral.renderer.tokenizer.decode(sample.input_ids)
        return text

    text = exchange("call_that_is_longer", "call_that_is_longer")
    call_id = text.split('"id": "')[1][:9]
    assert call_id.isalnum()
    assert f'{{"content": 1, "call_id": "{call_id}"}}' in text
    assert exchange(None, None).count(exchange(None, None).split('"id": "')[1][:9]) == 2
    with pytest.raises(DataError, match="answers no tool call"):
        mixtral.renderer.render(
            Conversation([Message("user", "q"), Message("tool", "1"), Message("assistant", "a")])
        )


def test_mixtral_refuses_text_beside_calls(mixtral: Pair) -> None:
    messages = [Message("user", "q"), Message("assistant", "Well", [ToolCall("f", {})])]
    with pytest.raises(DataError, match="text beside tool calls"):
        mixtral.renderer.render(Conversation(messages))


def test_mixtral_is_known_by_its_control_tokens(mixtral: Pair) -> None:
    assert mixtral.renderer.template_name == "mixtral"
    assert mixtral.renderer.stop_ids == {2}
    with pytest.raises(DataError, match="llama4 template was asked for"):
        Renderer(mixtral.renderer.tokenizer, template="llama4")
