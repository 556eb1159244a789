from __future__ import annotations

from typing import Any

import pytest

from lamina.data.detect import detect
from lamina.data.formats import Input
from lamina.data.shapes import SHAPES

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: str(shape.name))
def test_every_shape_is_told(shape: Any, write_rows: Any) -> None:
    (found,) = detect(write_rows([shape.row] * 3))
    assert (found.shape, found.rows, found.shapes) == (shape.name, 3, {shape.name: 3})
    assert found.container == "jsonl"
    assert found.reasons[0].startswith("3 rows ")
    assert not found.problems
    assert all(column.used for column in found.columns)
    assert found.confidence == ("likely" if found.ambiguous else "certain")


def test_two_readings_are_listed_and_not_guessed(write_rows: Any) -> None:
    (found,) = detect(write_rows([{**CHAT, "text": "<s>Hi"}]))
    assert (found.shape, found.confidence) == ("messages", "likely")
    assert "it also has 'text' (raw text)" in found.ambiguous[0]
    assert "name the shape 'text'" in found.ambiguous[0]
    (found,) = detect(Input(write_rows([{**CHAT, "text": "<s>Hi"}]), shape="text"))
    assert (found.shape, found.confidence, found.ambiguous) == ("text", "certain", [])
    (found,) = detect(write_rows([{"prompt": "a", "completion": "b", "label": True}]))
    assert found.shape == "feedback"
    assert any("prompts with completions" in note for note in found.ambiguous)


def test_plain_prompts_are_pointed_out(write_rows: Any) -> None:
    (found,) = detect(write_rows([{"prompt": "a", "completion": "b"}]))
    assert "without a chat template" in found.ambiguous[0]


def test_mixed_files_are_counted(write_rows: Any) -> None:
    (found,) = detect(write_rows([CHAT, CHAT, {"text": "a"}]))
    assert found.shapes == {"messages": 2, "text": 1}
    assert "2 rows as messages, 1 row as text" in found.ambiguous[-1]


def test_unknown_columns_get_a_proposal(write_rows: Any) -> None:
    (found,) = detect(write_rows([{"the_question": "q", "the_answer": "a", "n": 1}]))
    assert (found.shape, found.confidence) == (None, "unknown")
    assert "user=the_question,assistant=the_answer" in found.ambiguous[0]
    (found,) = detect(write_rows([{"body": "q", "n": 1}]))
    assert "text=body" in found.ambiguous[0]
    (found,) = detect(write_rows([{"a": "q", "b": "r"}]))
    assert "user=COLUMN" in found.ambiguous[0]
    mapped = Input(write_rows([{"q": "x", "a": "y"}]), columns={"user": "q", "assistant": "a"})
    (found,) = detect(mapped)
    assert (found.shape, found.confidence) == ("table", "certain")
    assert all(column.used for column in found.columns)


def test_reasons_are_sentences(write_rows: Any) -> None:
    assert detect(write_rows([{"text": "a"}]))[0].reasons == ["1 row has 'text'"]
    rows = write_rows([{"text": "a"}] * 2)
    assert detect(rows)[0].reasons == ["2 rows have 'text'"]
    assert detect(Input(rows, shape="text"))[0].reasons == ["2 rows have the format that was named"]


def test_how_sure_depends_on_the_rows(write_rows: Any) -> None:
    for bad, confidence in ((0, "certain"), (1, "likely"), (30, "unsure"), (100, "unsure")):
        rows = [CHAT] * (100 - bad) + [{"messages": []}] * bad
        (found,) = detect(write_rows(rows))
        assert (found.confidence, len(found.problems) > 0) == (confidence, bad > 0)
    (found,) = detect(write_rows(["{"] * 3))
    assert (found.confidence, found.shape) == ("unknown", None)


def test_columns_and_their_types(write_rows: Any) -> None:
    (found,) = detect(write_rows([{**CHAT, "id": 1}, {**CHAT, "id": "x"}]))
    by_name = {column.name: column for column in found.columns}
    assert by_name["id"].types == {"a number": 1, "a string": 1}
    assert (by_name["id"].used, by_name["messages"].used) == (False, True)


def test_text_files_say_what_a_row_could_be(tmp_path: Any) -> None:
    path = tmp_path / "x.txt"
    path.write_text("one\ntwo\n")
    (found,) = detect(path)
    assert (found.container, found.shape) == ("text", "text")
    assert "document a line" in found.ambiguous[0]
    (found,) = detect(Input(path, text_rows="line"))
    assert (found.rows, found.confidence, found.ambiguous) == (2, "certain", [])


def test_a_mapped_column_goes_before_one_of_that_name(write_rows: Any) -> None:
    rows = write_rows([{"user": "bob", "question": "q", "answer": "a"}])
    (found,) = detect(Input(rows, columns={"question": "question", "answer": "answer"}))
    assert (found.shape, found.confidence) == ("table", "likely")
    assert found.ambiguous == [
        "1 row: its column 'user' is not read, for 'question' is mapped to that name."
    ]
    assert {c.name: c.used for c in found.columns} == {
        "user": False,
        "question": True,
        "answer": True,
    }
