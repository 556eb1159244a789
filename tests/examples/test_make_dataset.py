"""The dataset of the demo: what is in it, and that it is the same each time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import make_dataset
import pytest


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    folder = tmp_path_factory.mktemp("data")
    return folder, make_dataset.make_dataset(folder)


def read(folder: Path, name: str) -> list[list[dict[str, str]]]:
    return [json.loads(line)["messages"] for line in (folder / name).read_text().splitlines()]


def answers(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(row[-1]["content"]) for row in read(folder, name)]


def test_has_enough_rows_of_many_modules(made: tuple[Path, dict[str, int]]) -> None:
    folder, counts = made
    train, held_out = answers(folder, "train.jsonl"), answers(folder, "held-out.jsonl")
    assert counts == {
        "train": len(train),
        "train_modules": len({answer["module"] for answer in train}),
        "held_out": len(held_out),
        "held_out_modules": len({answer["module"] for answer in held_out}),
    }
    assert counts["train"] >= 1000
    assert counts["train_modules"] >= 120
    assert counts["held_out"] >= 45
    assert counts["held_out_modules"] >= 15


def test_no_module_is_on_both_sides(made: tuple[Path, dict[str, int]]) -> None:
    train, held_out = (
        {answer["module"] for answer in answers(made[0], name)}
        for name in ("train.jsonl", "held-out.jsonl")
    )
    assert not train & held_out


@pytest.mark.parametrize("name", ["train.jsonl", "held-out.jsonl"])
def test_answers_are_in_their_questions(made: tuple[Path, dict[str, int]], name: str) -> None:
    rows = read(made[0], name)
    assert len({row[1]["content"] for row in rows}) == len(rows)
    for system, user, assistant in rows:
        assert [system["role"], user["role"], assistant["role"]] == ["system", "user", "assistant"]
        question, text = user["content"], assistant["content"]
        answer = json.loads(text)
        assert list(answer) == ["module", "name", "signature", "summary"]
        assert "\n" not in text
        heading, blank, signature, *body = question.split("\n")
        assert blank == ""
        assert heading.endswith(f' "{answer["name"]}" in module "{answer["module"]}":')
        assert signature == answer["signature"]
        assert signature.startswith(answer["name"].rsplit(".", 1)[-1] + "(")
        assert answer["summary"] in " ".join(" ".join(body).split())
        assert " at 0x" not in question
        assert len(question) < 500


def test_every_process_makes_the_same_and_nothing_else(
    made: tuple[Path, dict[str, int]], tmp_path: Path
) -> None:
    folder, counts = made
    script = Path(make_dataset.__file__)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "data")],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    for name in ("train.jsonl", "held-out.jsonl"):
        assert (tmp_path / "data" / name).read_bytes() == (folder / name).read_bytes()
    assert done.stderr == ""
    assert done.stdout.startswith(f"{tmp_path / 'data'}: {counts['train']} rows of ")
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_long_docstrings_are_cut_at_a_line_but_never_within_the_summary() -> None:
    lines = ["Do it.", "", *("a line of text " * 3 for _ in range(20))]
    cut = make_dataset._trimmed(lines, "Do it.")
    assert 150 < len(cut) <= make_dataset.MAX_BODY
    assert "\n".join(lines).startswith(cut)
    assert cut.splitlines()[-1] == lines[2].strip()
    summary = " ".join(lines[2:12])
    assert make_dataset._trimmed(lines[2:], make_dataset._flat([summary])).count("\n") == 9


def documented(first: int, *, second: str = "x") -> None:
    """Do a fine thing. And another.

    At length.
    """


def undocumented() -> None:
    pass


def says_where(default: object = object()) -> None:
    """Show where an object lies in memory."""


def test_entry_of_a_function() -> None:
    documented.__annotations__.clear()
    entry = make_dataset._entry("m", "function", "documented", "documented", documented)
    assert entry is not None
    assert entry.row()["messages"][1]["content"] == (
        'Help on function "documented" in module "m":\n\n'
        "documented(first, *, second='x')\n"
        "    Do a fine thing. And another.\n\n    At length."
    )
    assert json.loads(entry.row()["messages"][2]["content"]) == {
        "module": "m",
        "name": "documented",
        "signature": "documented(first, *, second='x')",
        "summary": "Do a fine thing.",
    }
    for function in (undocumented, says_where):
        name = function.__name__
        assert make_dataset._entry("m", "function", name, name, function) is None
