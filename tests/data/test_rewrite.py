"""Splitting, removing duplicates and mending: what writes a changed copy of a dataset."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.data.convert import PROGRESS_EVERY
from lamina.data.dedup import dedup
from lamina.data.formats import Input
from lamina.data.groups import Groups
from lamina.data.mend import mend
from lamina.data.split import split
from lamina.errors import DataError


def words(seed: int, count: int = 50) -> str:
    generator = random.Random(seed)
    return " ".join(str(generator.randrange(10**6)) for _ in range(count))


def load(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def near(text: str) -> str:
    parts = text.split()
    parts[25] = "changed"
    return " ".join(parts)


@given(
    size=st.integers(1, 20),
    pairs=st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30),
)
def test_groups_are_the_connected_parts(size: int, pairs: list[tuple[int, int]]) -> None:
    groups = Groups(size)
    linked = [{k} for k in range(size)]
    for a, b in pairs:
        if a < size and b < size:
            groups.join(a, b)
            union = linked[a] | linked[b]
            for k in union:
                linked[k] = union
    assert [groups.first(k) for k in range(size)] == [min(linked[k]) for k in range(size)]


# -- split ----------------------------------------------------------------------------------------


def test_every_pass_tells_its_progress(write_rows: Any, tmp_path: Path) -> None:
    data = Input(write_rows([{"text": f"text {k}"} for k in range(PROGRESS_EVERY + 1)]))
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    told: list[int] = []
    dedup(data, one, progress=told.append, force=True)
    mend(data, one, progress=told.append, force=True)
    split(data, one, other, count=1, near_duplicates=False, progress=told.append, force=True)
    assert told == [PROGRESS_EVERY] * 6


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "train.jsonl", tmp_path / "held-out.jsonl"


def test_a_split_by_fraction(write_rows: Any, parts: tuple[Path, Path]) -> None:
    rows = [{"text": words(k), "id": k} for k in range(100)] + ["{", {"x": 1}]
    result = split(Input(write_rows(rows)), *parts, fraction=0.2, seed=3)
    first, second = map(load, parts)
    assert (result.rows_in, result.rows_first, result.rows_second, result.rejected) == (
        102,
        80,
        20,
        2,
    )
    assert (len(first), len(second)) == (80, 20)
    assert sorted(first + second, key=lambda row: row["id"]) == rows[:100]
    assert [row["id"] for row in second] == sorted(row["id"] for row in second)
    assert result.rejected_file is not None
    assert [line["line"] for line in load(result.rejected_file)] == [101, 102]


def test_a_split_depends_on_its_seed_alone(write_rows: Any, tmp_path: Path) -> None:
    path = write_rows([{"text": words(k)} for k in range(40)])

    def second(seed: int) -> bytes:
        a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
        split(Input(path), a, b, count=10, seed=seed, force=True)
        return b.read_bytes()

    assert second(1) == second(1)
    assert second(1) != second(2)
    assert len(second(1).splitlines()) == 10


def test_what_belongs_together_stays_together(write_rows: Any, parts: tuple[Path, Path]) -> None:
    rows = [{"text": words(k), "chat": k % 10} for k in range(60)]
    rows += [{"text": near(words(60 + k)), "chat": 100 + k} for k in range(20)]
    rows += [{"text": words(60 + k), "chat": 200 + k} for k in range(20)]
    rows += [{"text": words(80 + k), "chat": 300 + k % 20} for k in range(40)]
    result = split(Input(write_rows(rows)), *parts, fraction=0.3, group_by="chat")
    sides: dict[str, set[int]] = {}
    for side, path in enumerate(parts):
        for row in load(path):
            sides.setdefault(f"chat {row['chat']}", set()).add(side)
            sides.setdefault(near(row["text"]), set()).add(side)
    assert all(len(side) == 1 for side in sides.values())
    assert result.rows_first + result.rows_second == len(rows)
    assert 20 <= result.rows_second <= 42


def test_near_duplicates_may_be_left_apart(write_rows: Any, parts: tuple[Path, Path]) -> None:
    texts = [words(k) for k in range(30)]
    rows = [{"text": text} for text in texts + [near(text) for text in texts]]
    path = write_rows(rows)
    together = split(Input(path), *parts, fraction=0.5)
    assert together.groups == 30
    apart = split(Input(path), *parts, fraction=0.5, near_duplicates=False, force=True)
    assert apart.groups == 60


def test_strata_keep_their_shares(write_rows: Any, parts: tuple[Path, Path]) -> None:
    rows = [{"text": words(k), "kind": "rare" if k % 10 == 0 else "common"} for k in range(200)]
    result = split(Input(write_rows(rows)), *parts, fraction=0.1, stratify_by="kind")
    kinds = [row["kind"] for row in load(parts[1])]
    assert (kinds.count("rare"), kinds.count("common")) == (2, 18)
    assert result.strata == {"rare": (18, 2), "common": (162, 18)}


def test_strata_are_called_by_their_values(write_rows: Any, parts: tuple[Path, Path]) -> None:
    values = ["a\nb", 3, {"k": '"'}, None]
    rows = [{"text": words(k), "kind": values[k % 4]} for k in range(40)]
    result = split(
        Input(write_rows([*rows, '{"text": 1}'])), *parts, fraction=0.5, stratify_by="kind"
    )
    assert set(result.strata) == {"a\nb", "3", '{"k": "\\""}', ""}
    assert result.reasons == {"wrong-type": 1}


def test_splits_that_make_no_sense(write_rows: Any, parts: tuple[Path, Path]) -> None:
    data = Input(write_rows([{"text": words(k), "g": 1} for k in range(10)]))
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "either a fraction or a count"),
        ({"fraction": 0.1, "count": 2}, "either a fraction or a count"),
        ({"fraction": 1.5}, "between 0 and 1"),
        ({"count": 0}, "at least 1"),
        ({"count": 10}, "there are 10 usable rows"),
        ({"count": 2, "group_by": "g"}, "Nothing can be split off"),
        ({"count": 2, "group_by": "h"}, "no row has the column 'h'"),
        ({"count": 2, "stratify_by": "h"}, "no row has the column 'h'"),
    ]
    for options, message in cases:
        with pytest.raises(DataError, match=message):
            split(data, *parts, **options)
    same = parts[0].parent / ".." / parts[0].parent.name / parts[0].name
    rejected = parts[0].with_name(parts[0].name + ".rejected.jsonl")
    for second in (parts[0], same, rejected):
        with pytest.raises(DataError, match="Two things would be written"):
            split(data, parts[0], second, count=2)
    with pytest.raises(DataError, match="one of the inputs"):
        split(data, data.sources[0].path, parts[1], count=2, force=True)
    assert not any(path.exists() for path in parts)


# -- dedup ----------------------------------------------------------------------------------------


def test_repeated_rows_are_left_out(write_rows: Any, tmp_path: Path) -> None:
    one, two = {"text": words(1)}, {"text": words(2)}
    path = write_rows([one, two, {**one, "id": 1}, "{", two, {"text": near(words(1))}])
    exact = dedup(Input(path), tmp_path / "exact.jsonl")
    assert (exact.rows_in, exact.rows_out, exact.rejected) == (6, 3, 3)
    assert load(tmp_path / "exact.jsonl") == [one, two, {"text": near(words(1))}]
    assert exact.reasons == {"duplicate": 2, "not-json": 1}
    assert exact.rejected_file is not None
    assert load(exact.rejected_file)[0]["reason"] == f"is the same as {path}:1"
    close = dedup(Input(path), tmp_path / "near.jsonl", near=True)
    assert load(tmp_path / "near.jsonl") == [one, two]
    assert close.reasons == {"duplicate": 2, "near-duplicate": 1, "not-json": 1}


@settings(max_examples=20, deadline=None)
@given(texts=st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=12))
def test_each_row_remains_once(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("dedup")
    (folder / "in.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    result = dedup(Input(folder / "in.jsonl"), folder / "out.jsonl")
    assert [row["text"] for row in load(folder / "out.jsonl")] == list(dict.fromkeys(texts))
    assert result.rows_in == len(texts) == result.rows_out + result.rejected


# -- mend -----------------------------------------------------------------------------------------


def chat(*roles_and_texts: tuple[str, str], **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": r, "content": t} for r, t in roles_and_texts], **more}


GOOD = chat(("user", "q"), ("assistant", "a"))


def test_only_what_needs_no_judgement_is_mended(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
    tools = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1"},
            {"role": "assistant", "content": "b"},
        ]
    }
    rows = [
        json.dumps(GOOD),
        json.dumps(chat(("system", " "), ("user", "x"), ("assistant", "a"), ("user", "more"))),
        '{"text": "t", "score": NaN}',
        json.dumps(tools),
        json.dumps(chat(("user", ""), ("assistant", "kept"))),
        json.dumps({**GOOD, "id": 3}),
        '{"messages": []}',
    ]
    path, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join(rows).encode())
    result = mend(Input(path), out)
    assert (result.rows_in, result.rows_out, result.rejected) == (7, 5, 2)
    assert result.mends == {
        "bom": 1,
        "empty-turn": 1,
        "last-turn": 1,
        "nan": 1,
        "missing-call-id": 1,
    }
    assert result.reasons == {"duplicate": 1, "empty-messages": 1}
    good, ended, text, called, empty = load(out)
    assert good == GOOD
    assert ended == chat(("user", "x"), ("assistant", "a"))
    assert text == {"text": "t", "score": None}
    assert called["messages"][1]["tool_calls"][0]["id"] == called["messages"][2]["tool_call_id"]
    assert empty == chat(("user", ""), ("assistant", "kept"))
    assert result.mends_file is not None
    listed = [(line["line"], line["code"]) for line in load(result.mends_file)]
    assert listed == [
        (1, "bom"),
        (2, "empty-turn"),
        (2, "last-turn"),
        (3, "nan"),
        (4, "missing-call-id"),
    ]
    again = mend(Input(out), tmp_path / "again.jsonl")
    assert (again.mends, again.rejected, again.mends_file) == ({}, 0, None)
    assert load(tmp_path / "again.jsonl") == load(out)


def test_a_mended_row_keeps_the_names_of_its_file(tmp_path: Path, write_rows: Any) -> None:
    ended = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a"}]
    rows = [
        {"chat": GOOD["messages"], "functions": [], "id": 1},
        {"chat": [*ended, {"role": "user", "content": "more"}], "functions": [], "id": 2},
    ]
    columns = {"messages": "chat", "tools": "functions"}
    result = mend(Input(write_rows(rows), columns=columns), tmp_path / "out.jsonl")
    assert result.mends == {"last-turn": 1}
    assert load(result.output) == [rows[0], {"chat": ended, "id": 2, "functions": None}]
    again = mend(Input(result.output, columns=columns), tmp_path / "again.jsonl")
    assert (again.rows_out, again.mends, again.rejected) == (2, {}, 0)


@pytest.mark.parametrize("rewrite", [dedup, mend])
def test_a_rewrite_is_never_over_an_input(
    rewrite: Callable[..., Any], write_rows: Any, tmp_path: Path
) -> None:
    path = write_rows([GOOD])
    with pytest.raises(DataError, match="one of the inputs"):
        rewrite(Input(path), path, force=True)
    (tmp_path / "out.jsonl").write_text("precious")
    with pytest.raises(DataError, match="exists"):
        rewrite(Input(path), tmp_path / "out.jsonl")
