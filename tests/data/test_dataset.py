from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lamina.data.dataset import load_dataset
from lamina.data.template import Renderer
from lamina.errors import DataError

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}


def test_rows_become_samples(smol: Any, write_rows: Any) -> None:
    first = write_rows(["", GOOD, "  ", {"text": "Once upon a time"}], "a.jsonl")
    second = write_rows([b"\xef\xbb\xbf" + b'{"text": "more"}'], "b.jsonl")
    seen: list[int] = []
    data = load_dataset([first, str(second)], smol, progress=seen.append)
    assert (len(data), data.num_rows) == (3, 3)
    assert [data.place(row) for row in range(3)] == [f"{first}:2", f"{first}:4", f"{second}:1"]
    samples = list(data)
    assert [s.row for s in samples] == [0, 1, 2]
    assert smol.decode(samples[1].input_ids) == "Once upon a time<|im_end|>"
    assert smol.decode(samples[0].input_ids[samples[0].loss_mask]) == "Yo<|im_end|>"
    assert data.num_tokens == sum(len(s.input_ids) for s in samples) == data.lengths.sum()
    assert data.num_loss_tokens == sum(s.num_loss_tokens for s in samples)
    assert data.dropped == ()
    assert seen[-1] == 3


def test_samples_are_those_of_the_renderer(smol: Any, write_rows: Any) -> None:
    rows = [{"text": f"row {k} " * (k % 7 + 1)} for k in range(700)]
    data = load_dataset(write_rows(rows), smol)
    renderer = Renderer(smol)
    from lamina.data.messages import Text

    for k in (0, 255, 256, 511, 699):
        (expected,) = renderer.render(Text(rows[k]["text"]), row=k)
        assert data[k].row == k
        assert data[k].input_ids.tolist() == expected.input_ids.tolist()
        assert data[k].loss_mask.tolist() == expected.loss_mask.tolist()


BAD_ROWS: list[tuple[Any, str]] = [
    ("{not json", "is not JSON: Expecting property name"),
    ("[" * 100_000, "nested too deeply"),
    (b'{"text": "\xff"}', "is not UTF-8"),
    ("[1]", "is an array, not an object"),
    ({"prompt": 1}, "has no columns that a known format has (it has 'prompt')"),
    ({"messages": None}, "'messages' is null, not an array"),
    ({"messages": []}, "'messages' is empty"),
    ({"messages": [3]}, "messages[0] is a number, not an object"),
    ({"messages": [{"content": "x"}]}, "messages[0] has no 'role'"),
    ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0] has the role 'bot'; known:"),
    ({"messages": [{"role": 1, "content": "x"}]}, "messages[0].role is a number"),
    ({"messages": [{"role": "user"}]}, "messages[0].content is missing"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content is null"),
    ({"messages": [{"role": "user", "content": {}}]}, "messages[0].content is an object"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "messages[0].content[0] has the type 'image_url'; only text is trained",
    ),
    ({"messages": [{"role": "user", "content": "x"}]}, "has no assistant turn to learn from"),
    (
        {"messages": [{"role": "assistant", "content": " "}]},
        "messages[0] is an empty assistant turn",
    ),
    (
        {"messages": [{"role": "assistant", "content": "x", "weight": 0}]},
        "every assistant turn has weight 0",
    ),
    (
        {"messages": [{"role": "assistant", "content": "x", "weight": 0.5}]},
        "messages[0].weight is 0.5; it can be 0 or 1",
    ),
    (
        {"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]},
        "messages[0] has tool calls, but its role is user",
    ),
    (
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
        "messages[0].tool_calls[0] names no function",
    ),
    ({"text": 3}, "'text' is a number, not a string"),
    ({"text": "\n"}, "'text' is empty"),
]


@pytest.mark.parametrize(("row", "message"), BAD_ROWS)
def test_a_malformed_row_is_named(row: Any, message: str, smol: Any, write_rows: Any) -> None:
    path = write_rows([GOOD, row])
    with pytest.raises(DataError) as caught:
        load_dataset(path, smol)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}:2 ")
    assert message in problem
    assert str(caught.value).startswith("1 of 2 rows")


def test_all_malformed_rows_are_reported_at_once(smol: Any, write_rows: Any) -> None:
    path = write_rows([row for row, _ in BAD_ROWS] + [GOOD])
    with pytest.raises(DataError) as caught:
        load_dataset(path, smol)
    assert len(caught.value.problems) == 11
    assert caught.value.problems[-1] == f"... and {len(BAD_ROWS) - 10} more."
    assert f"{len(BAD_ROWS)} of {len(BAD_ROWS) + 1} rows" in str(caught.value)


def test_what_openai_s_format_allows(smol: Any, write_rows: Any) -> None:
    rows = [
        {"messages": [{"role": "developer", "content": "s"}, *GOOD["messages"]]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}]},
                {"role": "assistant", "content": "skip", "weight": 0, "name": "bo"},
                {"role": "user", "content": ""},
                {"role": "assistant", "content": "b", "weight": 1.0},
            ],
            "source": "somewhere",
        },
    ]
    data = load_dataset(write_rows(rows), smol)
    assert "system\ns<|im_end|>" in smol.decode(data[0].input_ids)
    assert smol.decode(data[1].input_ids[data[1].loss_mask]) == "b<|im_end|>"


def test_missing_files_are_all_named(smol: Any, tmp_path: Path, write_rows: Any) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset([tmp_path / "a", write_rows([GOOD]), tmp_path], smol)
    assert caught.value.problems == (
        f"{tmp_path / 'a'} does not exist.",
        f"{tmp_path} is a folder, but not one that a dataset was saved in: name its files.",
    )
    with pytest.raises(DataError, match="No data was given"):
        load_dataset([], smol)
    with pytest.raises(DataError, match="no row was found"):
        load_dataset(write_rows([""]), smol)


def test_long_samples_are_dropped_and_named(smol: Any, write_rows: Any) -> None:
    path = write_rows([GOOD, {"text": "word " * 100}, {"text": "short one"}])
    data = load_dataset(path, smol, max_length=60)
    assert (len(data), data.num_rows) == (2, 3)
    assert [s.row for s in data] == [0, 2]
    assert [str(d) for d in data.dropped] == [f"{path}:2 has 102 tokens"]
    assert len(load_dataset(path, smol, max_length=102)) == 3
    with pytest.raises(DataError, match="shortest has 3 tokens"):
        load_dataset(path, smol, max_length=2)
