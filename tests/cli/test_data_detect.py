"""`lamina data detect`."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from tests.cli.rows import Lamina, WriteRows, chat


def test_detect(lamina: Lamina, work: Path, write_rows: WriteRows) -> None:
    write_rows("a.jsonl", [chat("q", "a", topic="x"), chat("q2", "a2")])
    with gzip.open(work / "b.csv.gz", "wt") as file:
        file.write("instruction,output\nAdd,4\n")

    code, out, err = lamina("detect", "a.jsonl", "b.csv.gz")

    assert (code, err) == (0, "")
    first, second = out.split("\n\n")
    assert first.startswith("a.jsonl\n  format         OpenAI messages (messages), certain\n")
    assert "topic: a string in 1 row, not used" in first
    assert "Alpaca instructions (alpaca), certain" in second
    assert "container      CSV, gzip" in second

    _, out, _ = lamina("detect", "a.jsonl", "b.csv.gz", "--json")
    found = json.loads(out)
    assert [each["shape"] for each in found] == ["messages", "alpaca"]
    assert found[0]["columns"][1] == {"name": "topic", "types": {"a string": 1}, "used": False}


def test_detect_says_what_is_ambiguous_and_how_to_say_otherwise(lamina: Lamina, work: Path) -> None:
    (work / "qa.csv").write_text("Frage,Antwort\nWas?,Das\n")

    code, out, err = lamina("detect", "qa.csv")
    assert code == 1
    assert "no known format, unknown" in out
    assert err.startswith("hint: --format, --map and --text-rows")

    code, out, err = lamina("detect", "qa.csv", "--map", "question=Frage,answer=Antwort")
    assert (code, err) == (0, "")
    assert "(table), certain" in out

    (work / "notes.txt").write_text("One.\n\nTwo.\n\nThree.\n")
    _, out, _ = lamina("detect", "notes.txt", "--text-rows", "paragraph")
    assert "looked at      3 rows" in out


def test_a_mapped_column_goes_before_one_of_that_name(
    lamina: Lamina, write_rows: WriteRows
) -> None:
    rows = [{**chat("old", "old"), "chat": chat("q", "a")["messages"]}]
    write_rows("a.jsonl", rows)

    code, out, _ = lamina("detect", "a.jsonl", "--map", "messages=chat")

    assert code == 0
    assert "messages: an array, not used" in out
    assert "its column 'messages' is not read, for 'chat' is mapped to that name" in out
    assert "'messages' ('chat' is read" in lamina("check", "a.jsonl", "--map", "messages=chat")[1]


def test_a_column_cannot_drive_the_terminal(lamina: Lamina, work: Path) -> None:
    (work / "a.csv").write_text("x\x1b[31m,y\n1,2\n")

    _, out, _ = lamina("detect", "a.csv")

    assert "\x1b" not in out
    assert r"'x\x1b[31m': a string" in out
