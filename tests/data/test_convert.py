from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data.strategies import ANY_EXAMPLE, CONVERSATION, MEANINGFUL, PLAIN_CHAT, RAW_TEXT

from lamina.data.convert import convert
from lamina.data.formats import Input
from lamina.data.mend import mend
from lamina.data.messages import Conversation, Example, Message, RowError, Text
from lamina.data.shapes import SHAPES, shape_named
from lamina.errors import DataError

GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}
SUFFIXES = [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".jsonl.gz", ".csv.zst"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("convert")


def write(path: Path, examples: list[Any], shape: str) -> Path:
    rows = [shape_named(shape).write(example) for example in examples]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def examples(path: Path, **options: Any) -> list[Any]:
    return [row.example for row in Input(path, **options).rows()]


def without_extra(example: Example) -> Example:
    example.extra = {}
    return example


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("shape", ["messages", "sharegpt"])
@settings(max_examples=15, deadline=None)
@given(rows=st.lists(CONVERSATION.map(without_extra), min_size=1, max_size=4))
def test_conversations_survive_every_container(
    suffix: str, shape: str, rows: list[Conversation], folder: Path
) -> None:
    source = write(folder / "in.jsonl", rows, "messages")
    there, back = folder / f"out{suffix}", folder / "back.jsonl"
    first = convert(Input(source), there, to=shape, force=True)
    if shape == "messages" and ".csv" not in suffix and ".tsv" not in suffix:
        assert first.rejected == 0
    assert first.rows_in == len(rows) == first.rows_out + first.rejected
    if first.rows_out:
        second = convert(Input(there), back, force=True)
        assert second.rejected == 0
        assert second.rows_out == first.rows_out
        got = examples(back)
        rejected = rejected_lines(first.rejected_file)
        assert got == [row for k, row in enumerate(rows, 1) if k not in rejected]


def rejected_lines(path: Path | None) -> set[int]:
    if path is None:
        return set()
    return {json.loads(line)["line"] for line in path.read_text().splitlines()}


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(ANY_EXAMPLE, min_size=1, max_size=4),
    extra=MEANINGFUL,
    to=st.sampled_from([shape.name for shape in SHAPES]),
)
def test_nothing_is_lost_or_invented(
    rows: list[Any], extra: dict[str, Any], to: str, folder: Path
) -> None:
    """Whatever is converted to whatever: each row is either there, unchanged, or rejected."""
    source, there = folder / "any.jsonl", folder / "there.jsonl"
    with source.open("w") as file:
        for example in rows:
            for shape in SHAPES:
                try:
                    row = shape.write(example)
                except RowError:
                    continue
                file.write(json.dumps({**extra, **row}) + "\n")
                break
    result = convert(Input(source), there, to=to, force=True)
    before = list(Input(source).rows())
    assert result.rows_in == len(before) == result.rows_out + result.rejected
    rejected = rejected_lines(result.rejected_file)
    kept = [row.example for row in before if row.raw.line not in rejected]
    after = list(Input(there).rows()) if kept else []
    assert [row.example for row in after] == kept
    assert all(row.shape is not None and row.shape.name == to for row in after)


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(PLAIN_CHAT.map(without_extra), min_size=1, max_size=4))
def test_alpaca_there_and_back(rows: list[Any], folder: Path) -> None:
    source = write(folder / "chat.jsonl", rows, "messages")
    convert(Input(source), folder / "alpaca.jsonl", to="alpaca", force=True)
    convert(Input(folder / "alpaca.jsonl"), folder / "again.jsonl", force=True)
    assert examples(folder / "again.jsonl") == rows


@settings(max_examples=25, deadline=None)
@given(rows=st.lists(RAW_TEXT.map(without_extra), min_size=1, max_size=4))
def test_text_there_and_back(rows: list[Text], folder: Path) -> None:
    source = write(folder / "texts.jsonl", rows, "text")
    result = convert(Input(source), folder / "out.txt", to="text", force=True)
    rejected = rejected_lines(result.rejected_file)
    kept = [row for k, row in enumerate(rows, 1) if k not in rejected]
    assert all("\n" in row.text or "\r" in row.text for row in rows if row not in kept)
    assert examples(folder / "out.txt", text_rows="line") == kept


def test_every_row_is_accounted_for(tmp_path: Path, write_rows: Any) -> None:
    path = write_rows(
        [
            GOOD,
            "",
            "{",
            b'{"text": "\xff"}',
            {"text": "a"},
            {"messages": []},
            {"x": 1},
            GOOD,
        ]
    )
    out = tmp_path / "out.jsonl"
    seen: list[int] = []
    result = convert(Input(path), out, to="sharegpt", progress=seen.append)
    assert (result.rows_in, result.rows_out, result.rejected) == (7, 2, 5)
    assert result.reasons == {
        "not-json": 1,
        "encoding": 1,
        "cannot-carry": 1,
        "empty-messages": 1,
        "unknown-shape": 1,
    }
    assert result.shapes == {"messages": 3, "text": 1}
    rejected = tmp_path / "out.jsonl.rejected.jsonl"
    assert result.rejected_file == rejected
    lines = [json.loads(line) for line in rejected.read_text().splitlines()]
    assert [line["line"] for line in lines] == [3, 4, 5, 6, 7]
    assert all(line["file"] == str(path) for line in lines)
    assert lines[0]["raw"] == "{"
    assert lines[1]["raw"] == '{"text": "\\xff"}'
    assert lines[2]["row"] == {"text": "a"}
    assert "can't be written in this format: it is text" in lines[2]["reason"]


def test_an_input_is_never_written_over(tmp_path: Path, write_rows: Any) -> None:
    path = write_rows([GOOD])
    content = path.read_bytes()
    for force in (False, True):
        with pytest.raises(DataError, match="is one of the inputs"):
            convert(Input(path), path, force=force)
    (tmp_path / "link.jsonl").symlink_to(path)
    with pytest.raises(DataError, match="is one of the inputs"):
        convert(Input(path), tmp_path / "link.jsonl", force=True)
    assert path.read_bytes() == content


def test_an_output_that_exists_is_only_replaced_by_force(tmp_path: Path, write_rows: Any) -> None:
    path, out = write_rows([GOOD]), tmp_path / "out.jsonl"
    out.write_text("precious")
    with pytest.raises(DataError, match=r"out\.jsonl exists"):
        convert(Input(path), out)
    assert out.read_text() == "precious"
    convert(Input(path), out, force=True)
    assert json.loads(out.read_text()) == GOOD
    rejected = tmp_path / "new.jsonl.rejected.jsonl"
    rejected.write_text("precious")
    with pytest.raises(DataError, match=r"rejected\.jsonl exists"):
        convert(Input(path), tmp_path / "new.jsonl")


def test_a_file_that_is_written_first_is_a_new_one(tmp_path: Path, write_rows: Any) -> None:
    data = write_rows([{"text": "a"}], "out.jsonl.partial")
    before = data.read_bytes()
    convert(Input(data), tmp_path / "out.jsonl", to="text")
    assert data.read_bytes() == before
    assert {path.name for path in tmp_path.iterdir()} == {"out.jsonl", "out.jsonl.partial"}


def test_nothing_is_left_behind_by_a_failure(tmp_path: Path, write_rows: Any) -> None:
    path = write_rows(["{"] + [GOOD] * 10)
    with gzip.open(tmp_path / "cut.jsonl.gz", "wb") as file:
        file.write(path.read_bytes() * 100)
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(cut.read_bytes()[:-40])
    before = sorted(tmp_path.iterdir())
    for name in ("out.jsonl", "out.parquet", "out.csv.gz"):
        with pytest.raises(DataError, match=r"cut\.jsonl\.gz can't be read"):
            convert(Input(cut), tmp_path / name)
        assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("out.xyz", "doesn't tell what to write"),
        ("out.parquet.gz", "are compressed inside"),
        ("nowhere/out.jsonl", "does not exist"),
        ("", "is a folder"),
    ],
)
def test_outputs_that_can_t_be(name: str, message: str, tmp_path: Path, write_rows: Any) -> None:
    with pytest.raises(DataError, match=message):
        convert(Input(write_rows([GOOD])), tmp_path / name)


def test_the_same_rows_give_the_same_bytes(tmp_path: Path, write_rows: Any) -> None:
    path = write_rows([GOOD] * 5)
    for suffix in SUFFIXES:
        one, two = tmp_path / f"one{suffix}", tmp_path / f"two{suffix}"
        convert(Input(path), one)
        convert(Input(path), two)
        assert one.read_bytes() == two.read_bytes(), suffix


def test_columns_that_are_not_understood_are_carried_along(tmp_path: Path, write_rows: Any) -> None:
    path = write_rows([{**GOOD, "id": 7, "meta": {"a": [None, 1.5]}}])
    convert(Input(path), tmp_path / "out.jsonl", to="sharegpt")
    row = json.loads((tmp_path / "out.jsonl").read_text())
    assert row["id"] == 7
    assert row["meta"] == {"a": [None, 1.5]}


def test_mixed_types_in_a_columnar_file_are_an_error(tmp_path: Path, write_rows: Any) -> None:
    path = write_rows([{**GOOD, "id": 7}, {**GOOD, "id": "seven"}])
    with pytest.raises(DataError, match="values of several types"):
        convert(Input(path), tmp_path / "out.parquet")
    assert not list(tmp_path.glob("out*"))


def test_tool_calls_keep_their_arguments(tmp_path: Path, write_rows: Any) -> None:
    arguments = '{"b": 1, "a": {"x": null}, "big": 123456789012345678901}'
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1", "tool_call_id": "1"},
            {"role": "assistant", "content": "a"},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": {}}}}],
    }
    path = write_rows([row, GOOD])
    for suffix in SUFFIXES:
        middle = tmp_path / f"middle{suffix}"
        assert convert(Input(path), middle).rejected == 0
        convert(Input(middle), tmp_path / "end.jsonl", force=True)
        end = [json.loads(line) for line in (tmp_path / "end.jsonl").read_text().splitlines()]
        assert end == [row, GOOD], suffix


def test_fields_of_a_message_are_carried_along(tmp_path: Path, write_rows: Any) -> None:
    turns = [
        {"role": "user", "content": "q", "id": 7, "refusal": None},
        {"role": "assistant", "content": "a", "reasoning_content": "because"},
        {"role": "user", "content": "Thanks"},
    ]
    source = write_rows([{"messages": turns, "parallel_tool_calls": False}])
    del turns[0]["refusal"]  # holds nothing
    there, back = tmp_path / "there.jsonl", tmp_path / "back.jsonl"
    convert(Input(source), there, to="sharegpt")
    convert(Input(there), back, to="messages")
    assert json.loads(back.read_text()) == {"messages": turns, "parallel_tool_calls": False}
    mend(Input(source), tmp_path / "mended.jsonl")
    assert json.loads((tmp_path / "mended.jsonl").read_text())["messages"] == turns[:2]

    assert convert(Input(source), tmp_path / "x.csv", to="alpaca").reasons == {"cannot-carry": 1}
    turns[0]["from"] = "x"  # means something in the other format
    source = write_rows([{"messages": turns}], "other.jsonl")
    assert convert(Input(source), there, to="sharegpt", force=True).reasons == {"cannot-carry": 1}


def test_messages_have_roles(tmp_path: Path, write_rows: Any) -> None:
    path = write_rows([{"question": "q", "answer": "a"}], "table.jsonl")
    mapped = Input(path, columns={"user": "question", "assistant": "answer"})
    assert [row.example for row in mapped.rows()] == [
        Conversation([Message("user", "q"), Message("assistant", "a")])
    ]
    with pytest.raises(DataError, match="Nothing can be mapped to 'usr'"):
        Input(path, columns={"usr": "question"})
    # In everyday words, as on the command line.
    everyday = Input(path, columns={"question": "question", "answer": "answer"})
    assert everyday.columns == mapped.columns
    with pytest.raises(DataError, match="Two columns are mapped to 'user'"):
        Input(path, columns={"question": "question", "user": "answer"})
