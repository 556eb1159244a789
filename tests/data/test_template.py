from __future__ import annotations

import copy
import itertools
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.data.messages import (
    Conversation,
    Example,
    Feedback,
    Message,
    Preference,
    RowError,
    Segment,
    Segments,
    Text,
    Tokens,
    ToolCall,
)
from lamina.data.parallel import cores
from lamina.data.template import Renderer
from lamina.errors import DataError

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def chat(*turns: str, system: str | None = None) -> Conversation:
    messages = [] if system is None else [Message("system", system)]
    for role, text in zip(itertools.cycle(("user", "assistant")), turns, strict=False):
        messages.append(Message(role, text))  # type: ignore[arg-type]
    return Conversation(messages)


@pytest.fixture(scope="module")
def renderer(smol: Any) -> Renderer:
    return Renderer(smol)


def learned(renderer: Renderer, conversation: Any) -> list[str]:
    """The learned text, a string for each run of learned tokens."""
    (sample,) = renderer.render(conversation)
    runs = itertools.groupby(
        zip(sample.input_ids.tolist(), sample.loss_mask.tolist(), strict=True), key=lambda p: p[1]
    )
    return [renderer.tokenizer.decode([i for i, _ in run]) for flag, run in runs if flag]


def test_exactly_the_assistant_turns_are_learned(renderer: Renderer) -> None:
    conversation = chat("Hi", "Hello!", "Bye", "See you", system="Be brief.")
    (sample,) = renderer.render(conversation)
    assert renderer.tokenizer.decode(sample.input_ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
        "<|im_start|>assistant\nSee you<|im_end|>"
    )
    assert learned(renderer, conversation) == ["Hello!<|im_end|>", "See you<|im_end|>"]
    assert sample.input_ids.dtype == np.int32
    assert sample.loss_mask.dtype == np.bool_


def test_the_template_s_own_system_prompt_is_read_but_not_learned(renderer: Renderer) -> None:
    (sample,) = renderer.render(chat("Hi", "Hello!"))
    text = renderer.tokenizer.decode(sample.input_ids)
    assert text.startswith(f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\nHi")
    assert learned(renderer, chat("Hi", "Hello!")) == ["Hello!<|im_end|>"]


# Unassigned characters are left out: SmolLM2's vocabulary lacks some of their bytes.
TEXTS = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Cn", "Co"))
    | st.sampled_from("\n \t"),
    min_size=1,
    max_size=40,
).filter(lambda text: "<|" not in text and text.strip())


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(TEXTS, min_size=2, max_size=7), system=st.none() | TEXTS)
def test_whatever_the_text_the_sample_is_prompt_plus_answer(
    renderer: Renderer, turns: list[str], system: str | None
) -> None:
    conversation = chat(*turns, system=system)
    (sample,) = renderer.render(conversation)
    tokenizer = renderer.tokenizer
    turn_ends = [m.content + "<|im_end|>" for m in conversation.messages if m.role == "assistant"]
    assert learned(renderer, conversation) == turn_ends
    # The text is what transformers renders, up to the last answer.
    whole = tokenizer.apply_chat_template(as_dicts(conversation), tokenize=False)
    assert whole.startswith(tokenizer.decode(sample.input_ids))
    # What comes before the last answer is what generation would be given.
    last = max(i for i, m in enumerate(conversation.messages) if m.role == "assistant")
    prompt = renderer.prompt(conversation.messages[:last])
    answer = tokenizer.encode(turn_ends[-1], add_special_tokens=False)
    assert sample.input_ids.tolist() == prompt + answer


def as_dicts(conversation: Conversation) -> list[dict[str, Any]]:
    return [{"role": m.role, "content": m.content} for m in conversation.messages]


def test_a_prompt_is_what_transformers_makes_of_it(renderer: Renderer, smol: Any) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    expected = smol.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert renderer.prompt(messages) == expected
    messages += [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Bye"}]
    expected = smol.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert renderer.prompt(messages) == expected


def test_per_message_flags(renderer: Renderer) -> None:
    conversation = chat("a", "first", "b", "second")
    plain = renderer.render(conversation)[0].input_ids.tolist()
    conversation.messages[1].train = False
    assert learned(renderer, conversation) == ["second<|im_end|>"]
    assert renderer.render(conversation)[0].input_ids.tolist() == plain
    conversation.messages[3].train = False
    with pytest.raises(DataError, match="every assistant turn is flagged not to be trained"):
        renderer.render(conversation)


def test_turns_after_the_last_answer_are_left_out(renderer: Renderer) -> None:
    longer, shorter = chat("Hi", "Hello!", "unanswered"), chat("Hi", "Hello!")
    ours, expected = renderer.render(longer)[0], renderer.render(shorter)[0]
    assert ours.input_ids.tolist() == expected.input_ids.tolist()


def test_two_answers_in_a_row(renderer: Renderer) -> None:
    conversation = Conversation(
        [Message("user", "a"), Message("assistant", "b"), Message("assistant", "c")]
    )
    assert learned(renderer, conversation) == ["b<|im_end|>", "c<|im_end|>"]


def test_text_ends_with_the_end_of_text(renderer: Renderer, smol: Any) -> None:
    (sample,) = renderer.render(Text("Once upon a time"))
    assert smol.decode(sample.input_ids) == "Once upon a time<|im_end|>"
    # Nothing stands before the first token: it can't be learned.
    assert sample.loss_mask.tolist() == [False] + [True] * (len(sample.input_ids) - 1)
    with pytest.raises(DataError, match="no token to learn"):
        renderer.render(Text(""))


def test_a_tokenizer_that_begins_texts_itself_begins_them_once(smol: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(smol)
    tokenizer.bos_token = "<|endoftext|>"
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", bos)]
    )
    renderer = Renderer(tokenizer)
    for example in (Text("abc"), Text("<|endoftext|>abc"), chat("Hi", "Hello!")):
        ids = renderer.render(example)[0].input_ids.tolist()
        assert ids.count(bos) == 1
        assert ids[0] == bos
        assert not renderer.render(example)[0].loss_mask[0]
    assert renderer.render(Text("abc"))[0].loss_mask[1:].all()
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    ids = Renderer(tokenizer).render(chat("Hi", "Hello!"))[0].input_ids.tolist()
    assert ids.count(bos) == 1
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    with pytest.raises(DataError, match="two beginning-of-text"):
        Renderer(tokenizer).render(chat("Hi", "Hello!"))


def with_template(smol: Any, template: str) -> Renderer:
    tokenizer = copy.deepcopy(smol)
    tokenizer.chat_template = template
    return Renderer(tokenizer)


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + CONTENT + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_a_template_that_forgets_reasoning_is_refused(smol: Any) -> None:
    template = CHATML.replace(
        "CONTENT", "(m.content if loop.last else m.content.split('</think>')[-1])"
    )
    renderer = with_template(smol, template)
    assert learned(renderer, chat("a", "<think>x</think>b"))  # one answer: nothing to forget
    with pytest.raises(DataError, match=r"isn't prefix-stable.*messages\[1\] change"):
        renderer.render(chat("a", "<think>x</think>b", "c", "d"))


def test_a_template_that_moves_the_system_prompt_is_refused(smol: Any) -> None:
    template = (
        "{% if messages[0].role == 'system' %}{% set s = messages[0].content %}"
        "{% set messages = messages[1:] %}{% else %}{% set s = '' %}{% endif %}"
        "{% set ns = namespace(last=-1) %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}"
        "{% endfor %}{% for m in messages %}{% if m.role == 'user' %}[INST]"
        "{{ s if loop.index0 == ns.last }}{{ m.content }}[/INST]{% else %}{{ m.content }}"
        "<|im_end|>{% endif %}{% endfor %}"
    )
    renderer = with_template(smol, template)
    assert learned(renderer, chat("a", "b", "c", "d")) == ["b<|im_end|>", "d<|im_end|>"]
    assert learned(renderer, chat("a", "b", system="s")) == ["b<|im_end|>"]
    with pytest.raises(DataError, match="isn't prefix-stable"):
        renderer.render(chat("a", "b", "c", "d", system="s"))


def test_a_generation_prompt_that_the_turn_doesn_t_begin_with_is_refused(smol: Any) -> None:
    template = CHATML.replace("CONTENT", "m.content").replace("assistant\n'", "assistant\n<think>'")
    with pytest.raises(DataError, match=r"the assistant turn messages\[1\] changes"):
        with_template(smol, template).render(chat("a", "b"))


def test_a_template_that_never_ends_a_turn_is_refused(smol: Any) -> None:
    template = (
        "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}### assistant:\n{% endif %}"
    )
    with pytest.raises(DataError, match="none of the tokens that end generation"):
        with_template(smol, template).render(chat("a", "b"))


def test_a_template_s_own_refusal_is_passed_on(smol: Any) -> None:
    template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="chat template: roles must alternate"):
        with_template(smol, template).render(chat("a", "b"))
    with pytest.raises(DataError, match="is not valid Jinja"):
        with_template(smol, "{% if %}")
    tokenizer = copy.deepcopy(smol)
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="has no chat template"):
        Renderer(tokenizer).render(chat("a", "b"))
    assert Renderer(tokenizer).render(Text("ab cd"))


def test_generation_blocks_and_tools_are_rendered_as_transformers_does(smol: Any) -> None:
    template = (
        "{{ tools | tojson if tools }}{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% if m.tool_calls %}"
        "{{ m.tool_calls[0].function | tojson }}{% endif %}<|im_end|>{% endgeneration %}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    renderer = with_template(smol, template)
    tool = {"type": "function", "function": {"name": "f", "description": "é<", "parameters": {}}}
    call = ToolCall("f", {"x": "<ü>"}, "call12345")
    conversation = Conversation(
        [Message("user", "a"), Message("assistant", "", [call]), Message("tool", "1")], [tool]
    )
    (sample,) = renderer.render(conversation)
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "a"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": {"x": "<ü>"}}}],
        },
    ]
    whole = renderer.tokenizer.apply_chat_template(messages, tools=[tool], tokenize=False)
    assert renderer.tokenizer.decode(sample.input_ids) == whole
    assert learned(renderer, conversation) == ['{"name": "f", "arguments": {"x": "<ü>"}}<|im_end|>']


def test_tools_that_a_template_would_leave_out_are_refused(renderer: Renderer) -> None:
    conversation = chat("a", "b")
    conversation.tools = [{"type": "function", "function": {"name": "f"}}]
    with pytest.raises(DataError, match="offers tools, but"):
        renderer.render(conversation)
    conversation.tools = []
    conversation.messages[1].tool_calls = [ToolCall("f", {})]
    with pytest.raises(DataError, match="has tool calls, but"):
        renderer.render(conversation)


def test_stop_ids(renderer: Renderer, smol: Any) -> None:
    assert renderer.end_of_turn_id == smol.convert_tokens_to_ids("<|im_end|>")
    assert renderer.stop_ids == {2}
    assert Renderer(smol, stop_ids=[7]).stop_ids == {2, 7}
    tokenizer = copy.deepcopy(smol)
    tokenizer.eos_token = "<|endoftext|>"
    assert Renderer(tokenizer).stop_ids == {0, 2}
    (sample,) = Renderer(tokenizer).render(chat("a", "b"))
    assert sample.input_ids[-1] == 2


def test_render_many_keeps_the_order_and_reports_in_place(renderer: Renderer) -> None:
    examples: list[Example | RowError] = [
        Text(f"text {k}") if k % 2 else chat("a", f"b{k}") for k in range(600)
    ]
    examples[10] = Text("")
    unreadable = examples[300] = RowError("not-json", "is not JSON")
    results = list(renderer.render_many(examples))
    assert isinstance(results[10], RowError)
    assert results[300] is unreadable
    for k, (example, result) in enumerate(zip(examples, results, strict=True)):
        if k not in (10, 300):
            assert not isinstance(example, RowError)
            assert not isinstance(result, RowError)
            assert result[0].row == k
            assert np.array_equal(result[0].input_ids, renderer.render(example)[0].input_ids)


def test_examples_are_taken_only_a_little_ahead(renderer: Renderer) -> None:
    threads = threading.active_count()
    taken = 0

    def examples() -> Iterator[Example]:
        nonlocal taken
        for taken in range(1, 100_001):
            yield Text(f"text {taken}")

    results = renderer.render_many(examples())
    next(results)
    assert taken <= 128 * (cores() + 1)
    results.close()  # type: ignore[attr-defined]
    assert threading.active_count() == threads


def test_long_examples_are_taken_one_by_one(renderer: Renderer) -> None:
    taken = 0

    def examples() -> Iterator[Example]:
        nonlocal taken
        while taken < 40:
            taken += 1
            yield Text("word " * 250_000)

    next(renderer.render_many(examples()))
    assert taken <= cores() + 1


def test_a_caller_s_truncation_does_not_cut(smol: Any) -> None:
    tokenizer = copy.deepcopy(smol)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=64)
    expected = Renderer(smol).render(chat("a", "b " * 50))[0]
    ours = Renderer(tokenizer).render(chat("a", "b " * 50))[0]
    assert ours.input_ids.tolist() == expected.input_ids.tolist()


def test_sentencepiece_spaces_are_not_put_inside(smol: Any) -> None:
    """A tokenizer that puts a space before any text must not do so in the middle of a sample."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<s>": 0, "</s>": 1, "<unk>": 2, "▁": 3, "\n": 4}
    vocab |= {c: len(vocab) + k for k, c in enumerate("abcdefghijklmnopqrstuvwxyz:[]/INST")}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    core.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }}"
        "[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    )
    renderer = Renderer(tokenizer)
    (sample,) = renderer.render(chat("hi", "yo", "ab", "cd"))
    tokens = tokenizer.convert_ids_to_tokens(sample.input_ids.tolist())
    answers = [t for t, flag in zip(tokens, sample.loss_mask, strict=True) if flag]
    assert answers == ["▁", "y", "o", "</s>", "▁", "c", "d", "</s>"]


# -- masks and other examples ---------------------------------------------------------------------


def test_only_the_last_turn(smol: Any) -> None:
    renderer = Renderer(smol, mask="last")
    conversation = chat("a", "first", "b", "second", "unanswered")
    assert learned(renderer, conversation) == ["second<|im_end|>"]
    plain = Renderer(smol).render(conversation)[0].input_ids.tolist()
    assert renderer.render(conversation)[0].input_ids.tolist() == plain
    conversation.messages[3].train = False
    with pytest.raises(DataError, match="its last assistant turn is flagged"):
        renderer.render(conversation)


def test_a_template_that_forgets_can_learn_the_last_turn(smol: Any) -> None:
    tokenizer = copy.deepcopy(smol)
    tokenizer.chat_template = CHATML.replace(
        "CONTENT", "(m.content if loop.last else m.content.split('</think>')[-1])"
    )
    renderer = Renderer(tokenizer, mask="last")
    assert learned(renderer, chat("a", "<think>x</think>b", "c", "<think>y</think>d")) == [
        "<think>y</think>d<|im_end|>"
    ]


def test_only_flagged_turns(smol: Any) -> None:
    renderer = Renderer(smol, mask="flagged")
    conversation = chat("a", "first", "b", "second")
    with pytest.raises(DataError, match="no assistant turn is flagged to be trained"):
        renderer.render(conversation)
    conversation.messages[1].train = True
    assert learned(renderer, conversation) == ["first<|im_end|>"]


def test_every_token(smol: Any, llama_tokenizer: Any, mistral_tokenizer: Any) -> None:
    conversation = chat("a", "b", "c", "d", "unanswered", system="s")
    for tokenizer in (smol, llama_tokenizer, mistral_tokenizer):
        (sample,) = Renderer(tokenizer, mask="all").render(conversation)
        assert sample.loss_mask.tolist() == [False] + [True] * (len(sample.input_ids) - 1)
        text = tokenizer.decode(sample.input_ids)
        assert "unanswered" in text
        if tokenizer is smol:
            assert text == tokenizer.apply_chat_template(as_dicts(conversation), tokenize=False)


def test_prompts_with_completions(renderer: Renderer, smol: Any) -> None:
    example = Segments([Segment("2 + 2 =", False), Segment(" 4", True)])
    (sample,) = renderer.render(example)
    assert smol.decode(sample.input_ids) == "2 + 2 = 4<|im_end|>"
    assert learned(renderer, example) == [" 4<|im_end|>"]
    everything = Renderer(smol, mask="all")
    assert learned(everything, example) == [" + 2 = 4<|im_end|>"]
    written = Segments([Segment("<|im_start|>user\nHi", False), Segment("Yo", True)], closed=False)
    assert learned(renderer, written) == ["Yo"]


def test_tokens_as_they_are(renderer: Renderer) -> None:
    example = Tokens([5, 6, 7, 8], [-100, 6, -100, 8])
    (sample,) = renderer.render(example)
    assert sample.input_ids.tolist() == [5, 6, 7, 8]
    assert sample.loss_mask.tolist() == [False, True, False, True]
    assert sample.labels.tolist() == [-100, 6, -100, 8]
    with pytest.raises(DataError, match="the token 99999999, but the vocabulary has"):
        renderer.render(Tokens([1, 99999999], [1, 99999999]))


def test_pairs_and_verdicts(renderer: Renderer) -> None:
    prompt = [Message("user", "a"), Message("assistant", "not this"), Message("user", "b")]
    good, bad = [Message("assistant", "good")], [Message("assistant", "bad")]
    assert learned(renderer, Preference(prompt, good, bad)) == ["good<|im_end|>"]
    assert prompt[1].train is None
    assert learned(renderer, Preference("a ", "good", "bad")) == ["good<|im_end|>"]
    assert learned(renderer, Feedback(prompt, good, True)) == ["good<|im_end|>"]
    assert renderer.render(Feedback(prompt, good, False)) == []
