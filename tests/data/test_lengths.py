from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.data.dataset import load_dataset
from lamina.data.lengths import TooLong, fit
from lamina.data.messages import Conversation, Message, Segment, Segments, Text, Tokens, ToolCall
from lamina.data.template import Renderer, Sample
from lamina.errors import DataError

WORDS = st.integers(1, 30).map(lambda n: "word " * n + "end")


@st.composite
def chats(draw: st.DrawFn) -> Conversation:
    messages = [Message("system", draw(WORDS))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 5))):
        messages += [Message("user", draw(WORDS)) for _ in range(draw(st.integers(1, 2)))]
        if draw(st.booleans()) and draw(st.booleans()):
            messages.append(Message("assistant", draw(WORDS), train=False))
        messages.append(Message("assistant", draw(WORDS)))
    return Conversation(messages)


@pytest.fixture(scope="module")
def renderer(smol: Any) -> Renderer:
    return Renderer(smol)


def fitted(renderer: Renderer, example: Any, limit: int, policy: TooLong) -> list[Sample]:
    return fit(renderer, example, renderer.render(example, row=7), limit, policy)


def learned(samples: list[Sample]) -> list[int]:
    return [int(i) for s in samples for i in s.input_ids[s.loss_mask]]


@settings(max_examples=60, deadline=None)
@given(chat=chats(), limit=st.integers(5, 200), policy=st.sampled_from(["truncate", "split"]))
def test_what_is_kept_fits_and_has_something_to_learn(
    chat: Conversation, limit: int, policy: TooLong, renderer: Renderer
) -> None:
    samples = fitted(renderer, chat, limit, policy)
    for sample in samples:
        assert len(sample.input_ids) <= limit
        assert sample.loss_mask.any()
        assert not sample.loss_mask[0]
        assert sample.row == 7
    (whole,) = renderer.render(chat)
    if policy == "truncate":
        assert len(samples) <= 1
        for sample in samples:
            size = len(sample.input_ids)
            assert sample.input_ids.tolist() == whole.input_ids[:size].tolist()
            assert sample.loss_mask.tolist() == whole.loss_mask[:size].tolist()


@settings(max_examples=40, deadline=None)
@given(chat=chats(), spare=st.integers(0, 60))
def test_splitting_loses_and_repeats_nothing(
    chat: Conversation, spare: int, renderer: Renderer
) -> None:
    head = [m for m in chat.messages if m.role == "system"]
    turns = chat.messages[len(head) :]
    starts = [
        i
        for i, m in enumerate(turns)
        if m.role == "user" and (not i or turns[i - 1].role != "user")
    ]
    exchanges = [turns[a:b] for a, b in zip(starts, [*starts[1:], len(turns)], strict=True)]
    longest = max(
        len(renderer.render(Conversation(head + exchange))[0].input_ids) for exchange in exchanges
    )
    samples = fitted(renderer, chat, longest + spare, "split")
    assert learned(samples) == learned(renderer.render(chat))
    assert len(samples) <= len(exchanges)
    if not spare:
        assert max(len(sample.input_ids) for sample in samples) <= longest


def text(renderer: Renderer, sample: Sample) -> str:
    return str(renderer.tokenizer.decode(sample.input_ids))


def test_each_part_has_the_system_prompt(renderer: Renderer) -> None:
    turns = [
        message
        for k in range(3)
        for message in (Message("user", f"q{k}"), Message("assistant", f"a{k}"))
    ]
    chat = Conversation([Message("system", "Be brief."), *turns])
    parts = fitted(renderer, chat, 32, "split")
    assert [text(renderer, part).count("Be brief.") for part in parts] == [1, 1, 1]
    assert "q1" in text(renderer, parts[1])
    assert "q0" not in text(renderer, parts[1])


TOOL_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls %}"
    "{{ c.function.name }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_tool_exchange_is_never_cut(smol: Any) -> None:
    import copy

    tokenizer = copy.deepcopy(smol)
    tokenizer.chat_template = TOOL_TEMPLATE
    renderer = Renderer(tokenizer)
    exchange = [
        Message("user", "q"),
        Message("assistant", "", [ToolCall("f", {})]),
        Message("tool", "result " * 20),
        Message("assistant", "answer"),
    ]
    plain = [Message("user", "p"), Message("assistant", "b")]
    size = len(renderer.render(Conversation(exchange))[0].input_ids)
    plain_size = len(renderer.render(Conversation(plain))[0].input_ids)
    for limit in range(1, size):
        assert fitted(renderer, Conversation(exchange), limit, "truncate") == []
        assert fitted(renderer, Conversation(exchange), limit, "split") == []
        (kept,) = fitted(
            renderer, Conversation(plain + exchange), max(limit, plain_size), "truncate"
        )
        assert text(renderer, kept).endswith("b<|im_end|>")
    assert len(fitted(renderer, Conversation(plain + exchange), size, "split")) == 2


def test_a_single_long_answer_is_cut(renderer: Renderer) -> None:
    chat = Conversation([Message("user", "q"), Message("assistant", "word " * 100)])
    (whole,) = renderer.render(chat)
    prompt = int(whole.loss_mask.argmax())
    for policy in ("truncate", "split"):
        (kept,) = fitted(renderer, chat, prompt + 10, policy)  # type: ignore[arg-type]
        assert (len(kept.input_ids), kept.num_loss_tokens) == (prompt + 10, 10)
        assert fitted(renderer, chat, prompt, policy) == []  # type: ignore[arg-type]
    assert fitted(renderer, chat, prompt + 10, "drop") == []


def test_the_last_turn_keeps_its_place(smol: Any) -> None:
    renderer = Renderer(smol, mask="last")
    turns = [
        message
        for k in range(4)
        for message in (Message("user", f"q{k} " * 9), Message("assistant", f"a{k} " * 9))
    ]
    chat = Conversation([Message("system", "s"), *turns])
    (whole,) = renderer.render(chat)
    for policy in ("truncate", "split"):
        (kept,) = fitted(renderer, chat, 150, policy)  # type: ignore[arg-type]
        assert learned([kept]) == learned([whole])
        assert "q0" not in text(renderer, kept)


@settings(max_examples=40, deadline=None)
@given(words=st.integers(1, 60), limit=st.integers(2, 40))
def test_windows_of_a_text_learn_every_token_once(
    words: int, limit: int, renderer: Renderer
) -> None:
    example = Text("some words " * words)
    (whole,) = renderer.render(example)
    parts = fitted(renderer, example, limit, "split")
    assert learned(parts) == learned([whole])
    assert all(len(part.input_ids) <= limit for part in parts)
    for before, after in itertools.pairwise(parts):
        assert before.input_ids[-1] == after.input_ids[0]


def test_text_segments_and_tokens_keep_their_beginning(renderer: Renderer) -> None:
    examples: list[Any] = [
        Text("word " * 50),
        Segments([Segment("prompt", False), Segment(" word" * 50, True)]),
        Tokens(list(range(50)), list(range(50))),
    ]
    for example in examples:
        (whole,) = renderer.render(example)
        (kept,) = fitted(renderer, example, 20, "truncate")
        assert kept.input_ids.tolist() == whole.input_ids[:20].tolist()
    hidden = Segments([Segment("word " * 50, False), Segment("x", True)])
    assert fitted(renderer, hidden, 20, "truncate") == []


def test_mixtral_s_samples_are_fitted_one_by_one(mistral_tokenizer: Any) -> None:
    renderer = Renderer(mistral_tokenizer)
    turns = [
        message
        for k in range(3)
        for message in (Message("user", f"q{k}"), Message("assistant", f"a{k} " * 9))
    ]
    chat = Conversation([Message("system", "Be brief."), *turns])
    whole = renderer.render(chat)
    limit = len(whole[1].input_ids)
    assert len(fitted(renderer, chat, limit, "drop")) == 2
    assert len(fitted(renderer, chat, limit, "truncate")) == 2
    split = fitted(renderer, chat, limit, "split")
    assert learned(split) == learned(whole)
    assert all("Be brief." in text(renderer, part) for part in split)


def test_a_dataset_says_what_happened(smol: Any, write_rows: Any) -> None:
    long = {"text": "word " * 100}
    rows = [long, {"text": "short one"}, {"prompt": "p", "chosen": "a", "rejected": "b"}]
    path = write_rows(rows)
    cut = load_dataset(path, smol, 40, too_long="truncate")
    assert [str(s) for s in cut.shortened] == [f"{path}:1 had 102 tokens and has 40"]
    split = load_dataset(path, smol, 40, too_long="split")
    assert [str(s) for s in split.shortened] == [
        f"{path}:1 had 102 tokens and has 104 in 3 samples"
    ]
    assert (len(cut), len(split), len(load_dataset(path, smol, 40))) == (3, 5, 2)
    assert [s.row for s in split] == [0, 0, 0, 1, 2]
    assert cut.notes == ("1 row has a pair of answers, of which the chosen one is trained.",)


def test_disliked_answers_are_not_trained(smol: Any, write_rows: Any) -> None:
    good = {"prompt": "p", "completion": "yes", "label": True}
    bad = {**good, "label": False}
    data = load_dataset(write_rows([good, bad]), smol)
    assert (len(data), data.num_rows) == (1, 2)
    assert data.notes == ("1 row has a disliked answer, which is not trained.",)
    with pytest.raises(DataError, match="all 1 answers are disliked"):
        load_dataset(write_rows([bad]), smol)


def test_errors_of_check_stop_a_run(smol: Any, write_rows: Any) -> None:
    messages = [
        {"role": "user", "content": "q"},
        {"role": "tool", "content": "1", "tool_call_id": "x"},
        {"role": "assistant", "content": "a"},
    ]
    with pytest.raises(DataError) as caught:
        load_dataset(write_rows([{"messages": messages}]), smol)
    assert "answers no call" in caught.value.problems[0]
