from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.strategies import (
    ANY_EXAMPLE,
    COMPLETION,
    CONVERSATION,
    FEEDBACK,
    PLAIN_CHAT,
    PREFERENCE,
    RAW_TEXT,
    SEGMENTS,
    TOKENS,
)

from lamina.data.formats import Input, understand
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
    canonical_adapter,
)
from lamina.data.shapes import SHAPES, ShapeFinder, candidates, shape_named
from lamina.errors import DataError

#: For each shape, what it always carries.
CARRIES: dict[str, st.SearchStrategy[Any]] = {
    "messages": CONVERSATION,
    "alpaca": PLAIN_CHAT,
    "text": RAW_TEXT,
    "prompt-completion": COMPLETION,
    "input-output": SEGMENTS,
    "tokens": TOKENS,
    "preference": PREFERENCE,
    "feedback": FEEDBACK,
}


def read(row: dict[str, Any]) -> Example:
    return ShapeFinder().find(row).read(row)


def parse(row: dict[str, Any]) -> Example | RowError:
    return understand(ShapeFinder(), row)[1]


def through_json(row: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(json.dumps(row))
    return result


@pytest.mark.parametrize("name", CARRIES)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_is_written_is_read_back(name: str, data: st.DataObject) -> None:
    example = data.draw(CARRIES[name])
    row = through_json(shape_named(name).write(example))
    assert ShapeFinder().find(row).name == name
    assert read(row) == example


@settings(max_examples=300, deadline=None)
@given(example=ANY_EXAMPLE, name=st.sampled_from([shape.name for shape in SHAPES]))
def test_a_shape_carries_all_of_an_example_or_refuses_it(example: Example, name: str) -> None:
    shape = shape_named(name)
    try:
        row = through_json(shape.write(example))
    except RowError as error:
        refusal = error.code
    else:
        assert shape.read(row) == example
        refusal = "cannot-carry"
    assert refusal == "cannot-carry"


@settings(max_examples=100, deadline=None)
@given(example=ANY_EXAMPLE)
def test_pydantic_validates_the_canonical_form(example: Example) -> None:
    adapter = canonical_adapter()
    data = adapter.dump_python(example)
    assert type(example)(**data) is not None
    assert adapter.validate_python(example) == example


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape.name))
def test_the_documented_row_of_a_shape_has_it(shape: Any) -> None:
    assert candidates(shape.row)[0][0] is shape
    shape.read(shape.row)
    assert set(shape.row) <= shape.columns


def messages_of(row: dict[str, Any]) -> list[tuple[str, str]]:
    example = read(row)
    assert isinstance(example, Conversation)
    return [(m.role, m.content) for m in example.messages]


def test_sharegpt_s_spellings() -> None:
    for user, answer in (("human", "gpt"), ("user", "assistant"), ("Human", "GPT")):
        row = {"conversations": [{"from": user, "value": "q"}, {"from": answer, "value": "a"}]}
        assert messages_of(row) == [("user", "q"), ("assistant", "a")]
    row = {
        "system": "Be brief.",
        "tools": '[{"name": "f"}]',
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "a", "weight": 0},
            {"from": "human", "value": "r"},
            {"from": "gpt", "value": "b"},
        ],
    }
    example = read(row)
    assert isinstance(example, Conversation)
    assert [m.role for m in example.messages[:4]] == ["system", "user", "assistant", "tool"]
    assert example.messages[2].tool_calls == [ToolCall("f", {"x": 1})]
    assert example.messages[4].train is False
    assert example.tools == [{"name": "f"}]


def test_alpaca_s_parts() -> None:
    row = {"instruction": "Add.", "input": "2, 2", "output": "4", "system": "s"}
    assert messages_of(row) == [("system", "s"), ("user", "Add.\n2, 2"), ("assistant", "4")]
    row = {"instruction": "q2", "input": "", "output": "a2", "history": [["q1", "a1"]]}
    assert [text for _, text in messages_of(row)] == ["q1", "a1", "q2", "a2"]


def test_prompts_with_completions() -> None:
    example = read({"prompt": "2 + 2 =", "completion": " 4"})
    assert example == Segments([Segment("2 + 2 =", False), Segment(" 4", True)])
    row = {
        "prompt": [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
        "completion": [{"role": "assistant", "content": "d"}],
    }
    example = read(row)
    assert isinstance(example, Conversation)
    assert [m.train for m in example.messages] == [None, False, None, None]


def test_preferences_in_all_their_forms() -> None:
    question = [Message("user", "q")]
    good, bad = [Message("assistant", "a")], [Message("assistant", "b")]
    q, a, b = ({"role": m.role, "content": m.content} for m in (*question, *good, *bad))
    expected = Preference(question, good, bad)
    rows: list[dict[str, Any]] = [
        {"prompt": [q], "chosen": [a], "rejected": [b]},
        {"prompt": "q", "chosen": [a], "rejected": [b]},
        {"chosen": [q, a], "rejected": [q, b]},
        {"input": {"messages": [q]}, "preferred_output": [a], "non_preferred_output": [b]},
        {"instruction": "q", "input": "", "chosen": "a", "rejected": "b"},
        {
            "conversations": [{"from": "human", "value": "q"}],
            "chosen": {"from": "gpt", "value": "a"},
            "rejected": {"from": "gpt", "value": "b"},
        },
    ]
    for row in rows:
        assert read(row) == expected, row
    assert read({"prompt": "q", "chosen": "a", "rejected": "b"}) == Preference("q", "a", "b")
    whole = {"chosen": "Human: hi\n\nAssistant: good", "rejected": "Human: hi\n\nAssistant: bad"}
    assert read(whole) == Preference("Human: hi\n\nAssistant: ", "good", "bad")
    with pytest.raises(RowError, match="begin alike and differ"):
        read({"chosen": [q, a], "rejected": [q, a]})
    assert read({"prompt": "q", "completion": "a", "label": True}) == Feedback("q", "a", True)
    assert read({"prompt": "q", "completion": "a", "label": "False"}) == Feedback("q", "a", False)


def test_padding_of_tokenized_rows_is_left_out() -> None:
    row = {"input_ids": [5, 6, 7, 0], "labels": [-100, 6, 7, -100], "attention_mask": [1, 1, 1, 0]}
    assert read(row) == Tokens([5, 6, 7], [-100, 6, 7])
    assert read({"input_ids": [5, 6]}) == Tokens([5, 6], [5, 6])


BAD: list[tuple[dict[str, Any], str]] = [
    ({"conversations": [{"value": "x"}]}, "conversations[0] has no 'from'"),
    ({"conversations": [{"from": "alien", "value": "x"}]}, "is from 'alien'"),
    ({"conversations": [{"from": 3, "value": "x"}]}, "is from 3"),
    ({"conversations": [{"from": "gpt"}]}, "conversations[0].value is missing"),
    ({"conversations": [{"from": "function_call", "value": "x"}]}, "isn't JSON"),
    ({"conversations": "x"}, "'conversations' is a string"),
    ({"instruction": "", "output": "x"}, "'instruction' is empty"),
    ({"instruction": "x", "output": ""}, "empty assistant turn"),
    ({"instruction": "x", "output": "y", "history": [["a"]]}, "history[0] is an array, not two"),
    ({"prompt": "x", "completion": " "}, "'completion' is empty"),
    ({"prompt": "x", "completion": ["y"]}, "'completion' is an array, not a string"),
    ({"segments": [{"text": "x"}]}, "segments[0].label is null, not a boolean"),
    ({"segments": [{"text": "x", "label": False}]}, "no segment is labelled"),
    ({"input_ids": [1, "2"]}, "input_ids[1] is a string, not an integer"),
    ({"input_ids": [1, True]}, "input_ids[1] is a boolean, not an integer"),
    ({"input_ids": [1, 2], "labels": [1]}, "2 input_ids, 1 labels"),
    ({"input_ids": [1, 2], "labels": [-100, 3]}, "labels[1] is 3"),
    ({"input_ids": [1, 2], "labels": [1, -100]}, "every label is -100"),
    ({"prompt": "x", "chosen": "y", "rejected": 3}, "'rejected' is a number"),
    ({"input": [], "preferred_output": []}, "'input' is an array, not an object"),
    ({"messages": [{"role": "assistant", "content": "x"}], "tools": "{"}, "isn't JSON"),
    ({"messages": [{"role": "assistant", "content": "x"}], "tools": [1]}, "array of objects"),
    ({"question": "x"}, "has no columns that a known format has (it has 'question')"),
    ({}, "it has none"),
]


@pytest.mark.parametrize(("row", "message"), BAD)
def test_a_row_that_has_its_shape_wrongly(row: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError) as caught:
        read(row)
    assert message in caught.value.message


def test_columns_are_mapped_by_name() -> None:
    finder = ShapeFinder(columns={"user": "question", "assistant": "answer"})
    row = finder.renamed({"question": "q", "answer": "a", "id": 1})
    assert finder.find(row).read(row) == Conversation(
        [Message("user", "q"), Message("assistant", "a")], [], {"id": 1}
    )
    with pytest.raises(RowError, match="no column 'answer', which was mapped"):
        finder.renamed({"question": "q"})


def test_a_mapped_column_goes_before_one_of_that_name() -> None:
    finder = ShapeFinder(columns={"user": "question", "assistant": "user"})
    swapped = {"question": "q", "user": "a"}  # nothing is left over
    assert finder.renamed(swapped) == {"user": "q", "assistant": "a"}

    finder = ShapeFinder(columns={"user": "question", "assistant": "answer"})
    row = {"user": "bob", "question": "q", "answer": "a"}
    _, example = understand(finder, row)
    assert example == Conversation(
        [Message("user", "q"), Message("assistant", "a")], [], {"user": "bob"}
    )
    assert shape_named("messages").write(example)["user"] == "bob"
    with pytest.raises(RowError, match="its further column 'user' has a meaning"):
        shape_named("table").write(example)  # rather than to lose it


def test_a_column_without_a_value_is_none() -> None:
    """A file of columns holds null where a row lacks one."""
    assert parse({"messages": None, "text": "a", "n": None}) == Text(
        "a", {"n": None, "messages": None}
    )
    chat = {"messages": [{"role": "assistant", "content": "a"}], "text": None, "tools": None}
    assert parse(chat) == Conversation([Message("assistant", "a")], [], {"text": None})
    assert isinstance(parse({"instruction": "a", "output": None}), RowError)  # and no other shape
    with pytest.raises(RowError, match="'output' is"):
        raise parse({"instruction": "a", "output": 1, "input": None})  # type: ignore[misc]


def test_a_column_has_one_meaning(write_rows: Any) -> None:
    rows = write_rows([{"a": "b"}])
    with pytest.raises(DataError, match="Two names are mapped to the column 'a'"):
        Input(rows, columns={"user": "a", "assistant": "a"})
    with pytest.raises(DataError, match="Two columns are mapped to 'user'"):
        Input(rows, columns={"user": "a", "question": "b"})
    with pytest.raises(DataError, match="Nothing can be mapped to 'usr'"):
        Input(rows, columns={"usr": "a"})


def test_rows_with_the_same_columns_can_differ_in_shape() -> None:
    finder = ShapeFinder()
    openai = {"messages": [{"role": "assistant", "content": "a"}]}
    sharegpt = {"messages": [{"from": "gpt", "value": "a"}]}
    for row, name in ((openai, "messages"), (sharegpt, "sharegpt"), (openai, "messages")):
        assert finder.find(row).name == name


def test_an_unknown_shape_is_named_with_the_known_ones() -> None:
    with pytest.raises(DataError) as caught:
        shape_named("sharegtp")
    assert "sharegpt" in (caught.value.hint or "")
