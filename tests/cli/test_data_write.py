"""`lamina data convert`, `split` and `dedup`: nothing is lost, nothing is written over."""

from __future__ import annotations

import json
import os
import pty
import resource
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from tests.cli.rows import LAMINA, Lamina, WriteRows, chat

#: Each command that writes, with its options but the input.
WRITERS = {
    "convert": ["--out", "out.jsonl"],
    "dedup": ["--out", "out.jsonl"],
    "split": ["--out", "out.jsonl", "--held-out", "held.jsonl", "--count", "2", "--no-near"],
    "check": ["--fix", "--out", "out.jsonl", "--no-near"],
}


def read(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# -- what holds for all of them -------------------------------------------------------------------


@pytest.mark.parametrize("command", WRITERS)
def test_every_row_is_accounted_for(
    lamina: Lamina, work: Path, write_rows: WriteRows, command: str
) -> None:
    rows = [chat(f"{n} + 1?", f"{n + 1}") for n in range(8)]
    bad = ["no JSON", {"foo": 1}, b'{"messages": "\xff"}', {"messages": []}, "[1]"]
    write_rows("a.jsonl", [*rows[:4], *bad, *rows[4:]])

    code, out, _ = lamina(command, "a.jsonl", *WRITERS[command], "--json")

    told = json.loads(out)
    told = told.get("fix", told)
    written = read(work / "out.jsonl")
    written += read(work / "held.jsonl") if command == "split" else []
    rejected = read(work / "out.jsonl.rejected.jsonl")
    assert code == 0
    assert told["rows_in"] == 13 == len(written) + len(rejected)
    assert told["rejected"] == len(bad) == len(rejected)
    assert sorted(map(json.dumps, written)) == sorted(map(json.dumps, rows))
    assert [row["line"] for row in rejected] == [5, 6, 7, 8, 9]
    assert all(row["file"] == "a.jsonl" and row["code"] and row["reason"] for row in rejected)
    assert rejected[0]["raw"] == "no JSON"
    assert rejected[1]["row"] == {"foo": 1}


@pytest.mark.parametrize("command", WRITERS)
def test_the_account_in_words(lamina: Lamina, write_rows: WriteRows, command: str) -> None:
    write_rows("a.jsonl", [*(chat(f"{n} + 1?", f"{n + 1}") for n in range(9)), "no"])

    code, out, err = lamina(command, "a.jsonl", *WRITERS[command])

    assert (code, err) == (0, "")
    account = out.partition("10 read from a.jsonl\n")[2]
    assert " written to out.jsonl\n" in account
    assert " 1 rejected, in out.jsonl.rejected.jsonl\n" in account


@pytest.mark.parametrize("command", WRITERS)
def test_nothing_is_written_over(
    lamina: Lamina, work: Path, write_rows: WriteRows, command: str
) -> None:
    source = write_rows("a.jsonl", [chat(f"{n} + 1?", f"{n + 1}") for n in range(9)])
    before = source.read_bytes()
    words = [command, "a.jsonl", *WRITERS[command]]

    onto_itself = [*words, "--force"]
    onto_itself[onto_itself.index("out.jsonl")] = "./a.jsonl"
    code, out, err = lamina(*onto_itself)
    assert (code, out) == (1, "")
    assert "is one of the inputs, which are never written over" in err

    os.link(source, work / "link.jsonl")  # the same file by another name
    onto_itself[onto_itself.index("./a.jsonl")] = "link.jsonl"
    assert lamina(*onto_itself)[0] == 1
    assert source.read_bytes() == before

    (work / "out.jsonl").write_text("mine")
    code, _, err = lamina(*words)
    assert code == 1
    assert err.startswith("error: out.jsonl exists.\nhint: ")
    assert (work / "out.jsonl").read_text() == "mine"
    (work / "out.jsonl").unlink()
    (work / "out.jsonl.rejected.jsonl").write_text("mine")
    assert lamina(*words)[0] == 1
    assert (work / "out.jsonl.rejected.jsonl").read_text() == "mine"

    assert lamina(*words, "--force")[0] == 0
    assert (work / "out.jsonl").stat().st_size > 100


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("nowhere/out.jsonl", "the folder nowhere does not exist"),
        ("out.xml", "doesn't tell what to write"),
        ("folder", "folder is a folder"),
    ],
)
def test_outputs_that_cannot_be(
    lamina: Lamina, work: Path, write_rows: WriteRows, out: str, message: str
) -> None:
    write_rows("a.jsonl", [chat("q", "a")])
    (work / "folder").mkdir()

    for command in ("convert", "dedup"):
        code, _, err = lamina(command, "a.jsonl", "--out", out)
        assert code == 1
        assert message in err


@pytest.mark.parametrize(
    ("command", "out"),
    [
        *((command, "out.jsonl") for command in WRITERS),
        ("convert", "out.parquet"),
        ("convert", "out.arrow"),
    ],
)
def test_a_full_disk_leaves_nothing_behind(
    work: Path, write_rows: WriteRows, command: str, out: str
) -> None:
    write_rows("a.jsonl", [chat(f"{n} + 1?", "x" * 5000) for n in range(40)])
    there = sorted(work.iterdir())

    done = subprocess.run(
        [*LAMINA, "data", command, "a.jsonl", *WRITERS[command], "--out", out],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000)),
    )

    assert done.returncode == 1
    assert done.stderr == f"error: {out} can't be written: File too large.\n"
    assert sorted(work.iterdir()) == there


def big_file(write_rows: WriteRows) -> None:
    """So large that it is worked on by several processes."""
    line = json.dumps(chat("What?", "x" * 4000)).encode()
    write_rows("big.jsonl", [line] * 9000)


def test_ctrl_c_leaves_nothing_behind(work: Path, write_rows: WriteRows) -> None:
    big_file(write_rows)
    process = subprocess.Popen(
        [*LAMINA, "data", "convert", "big.jsonl", "--to", "sharegpt", "--out", "out.jsonl.gz"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for _ in range(200):
        if (work / "out.jsonl.gz.partial").exists():
            break
        time.sleep(0.05)
    time.sleep(0.3)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: to all of the group
    out, err = process.communicate(timeout=60)

    assert (process.returncode, out, err) == (130, "", "interrupted\n")
    assert [path.name for path in work.iterdir()] == ["big.jsonl"]
    with pytest.raises(ProcessLookupError):  # nobody of the group is left
        os.killpg(process.pid, 0)


def test_progress_is_for_terminals(work: Path, write_rows: WriteRows) -> None:
    big_file(write_rows)
    words = [*LAMINA, "data", "convert", "big.jsonl", "--out"]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80"}

    piped = subprocess.run(
        [*words, "a.jsonl"], capture_output=True, text=True, check=True, timeout=60
    )
    assert piped.stderr == ""

    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*words, "b.jsonl"], stdout=subprocess.PIPE, stderr=theirs, env=environment, text=True
    )
    os.close(theirs)
    shown = b""
    try:
        while chunk := os.read(ours, 4096):
            shown += chunk
    except OSError:  # how Linux tells that the other side is closed
        pass
    os.close(ours)
    out, _ = process.communicate(timeout=60)

    assert process.returncode == 0
    assert b"converting" in shown
    assert b",000 rows" in shown or b" rows, " in shown
    assert out == "9,000 read from big.jsonl\n9,000 written to b.jsonl\n"


# -- convert --------------------------------------------------------------------------------------


def test_convert_there_and_back(lamina: Lamina, work: Path, write_rows: WriteRows) -> None:
    rows = [chat(f"{n} + 1?", f"{n + 1}", id=n) for n in range(5)]
    write_rows("a.jsonl", rows)

    for name, shape in (("b.parquet", "sharegpt"), ("c.csv.gz", "alpaca"), ("d.json", "table")):
        assert lamina("convert", "a.jsonl", "--to", shape, "--out", name)[0] == 0
        assert lamina("convert", name, "--out", f"{name}.jsonl")[0] == 0
        back = read(work / f"{name}.jsonl")
        assert [row["messages"] for row in back] == [row["messages"] for row in rows]
        assert [int(row["id"]) for row in back] == list(range(5))


def test_convert_says_what_a_format_cannot_carry(lamina: Lamina, write_rows: WriteRows) -> None:
    write_rows("a.jsonl", [chat("q", "a")])

    code, out, _ = lamina("convert", "a.jsonl", "--to", "tokens", "--out", "b.jsonl")

    assert code == 1
    assert out == (
        "1 read from a.jsonl\n0 written to b.jsonl\n1 rejected, in b.jsonl.rejected.jsonl\n"
        "    1 cannot-carry: a.jsonl:1 can't be written in this format: it isn't tokenized.\n"
    )


def test_convert_several_files_and_columns_of_any_name(lamina: Lamina, work: Path) -> None:
    (work / "a.csv").write_text("Frage,Antwort\nWas?,Das\n")
    (work / "b.tsv").write_text("Frage\tAntwort\nWer?\tDer\n")
    words = ("convert", "*.?sv", "--map", "question=Frage,answer=Antwort", "--out", "c.jsonl")

    code, out, _ = lamina(*words)

    assert code == 0
    assert out == "2 read from a.csv and 1 other file\n2 written to c.jsonl\n"
    assert [row["messages"][1]["content"] for row in read(work / "c.jsonl")] == ["Das", "Der"]
    code, out, _ = lamina("convert", "a.csv", "--map", "user=Fragen", "--out", "d.jsonl")
    assert code == 1
    assert "1 missing-column: a.csv:2 has no column 'Fragen', which was mapped." in out


# -- split ----------------------------------------------------------------------------------------


def questions(count: int) -> list[dict[str, Any]]:
    """Rows that are not alike, three of each conversation, of one language in four another."""
    words = [f"{n * 7919 % 1000003:x}{n * 104729 % 999983:x}" for n in range(count)]
    return [
        chat(f"{word} is what?", f"{word[::-1]} it is", id=n // 3, lang="de" if n % 4 else "en")
        for n, word in enumerate(words)
    ]


def test_split(lamina: Lamina, work: Path, write_rows: WriteRows) -> None:
    rows = questions(60)
    write_rows("a.jsonl", rows)

    def parts(name: str, *words: str) -> tuple[list[Any], list[Any]]:
        out, held = f"{name}.out.jsonl", f"{name}.held.jsonl"
        code, _, err = lamina("split", "a.jsonl", "--out", out, "--held-out", held, *words)
        assert (code, err) == (0, "")
        return read(work / out), read(work / held)

    train, held = parts("one", "--fraction", "0.2", "--seed", "1")
    assert (len(train), len(held)) == (48, 12)
    assert [row for row in rows if row in train] == train  # in their order
    assert [row for row in rows if row in held] == held
    assert parts("two", "--fraction", "0.2", "--seed", "1") == (train, held)
    assert parts("three", "--fraction", "0.2", "--seed", "2")[1] != held
    assert len(parts("four", "--count", "7")[1]) == 7

    train, held = parts("five", "--count", "12", "--group-by", "id")
    assert len(held) == 12
    assert not {row["id"] for row in train} & {row["id"] for row in held}
    _, held = parts("six", "--fraction", "0.2", "--stratify-by", "lang")
    assert [row["lang"] for row in held].count("en") == 3
    assert len(held) == 12


def test_split_keeps_repeats_on_one_side(lamina: Lamina, work: Path, write_rows: WriteRows) -> None:
    rows = questions(20)
    write_rows("a.jsonl", [*rows, *rows])

    code, out, _ = lamina(
        "split", "a.jsonl", "--fraction", "0.5", "--out", "b.jsonl", "--held-out", "c.jsonl"
    )

    one, other = ({json.dumps(row) for row in read(work / n)} for n in ("b.jsonl", "c.jsonl"))
    assert code == 0
    assert len(one) + len(other) == 20
    assert "Rows that belong together stayed together: 20 groups.\n" in out


def test_split_tells_what_cannot_be(lamina: Lamina, write_rows: WriteRows) -> None:
    write_rows("a.jsonl", questions(6))
    words = ("split", "a.jsonl", "--out", "b.jsonl", "--held-out")

    for more, message in (
        (["c.jsonl", "--count", "6"], "6 rows can't be split off: there are 6 usable rows"),
        (["c.jsonl", "--count", "1", "--group-by", "topic"], "no row has the column 'topic'"),
        (["c.jsonl", "--count", "1", "--group-by", "id"], "Nothing can be split off"),
        (["./b.jsonl", "--count", "1"], "Two things would be written to b.jsonl"),
    ):
        code, out, err = lamina(*words, *more)
        assert (code, out) == (1, "")
        assert message in err


# -- dedup ----------------------------------------------------------------------------------------


def test_dedup(lamina: Lamina, work: Path, write_rows: WriteRows) -> None:
    long = "The quick brown fox jumps over the lazy dog, and so it goes on and on. " * 3
    rows = [chat("Tell me.", long), chat("2 + 2?", "4"), chat("Tell me.", long + "End."), "no"]
    write_rows("a.jsonl", [*rows, rows[1]])

    code, out, _ = lamina("dedup", "a.jsonl", "--out", "b.jsonl")
    assert code == 0
    assert "5 read from a.jsonl\n3 written to b.jsonl\n2 rejected, in b.jsonl.rej" in out
    assert "    1 duplicate: a.jsonl:5 is the same as a.jsonl:2.\n" in out
    assert read(work / "b.jsonl") == rows[:3]

    code, out, _ = lamina("dedup", "a.jsonl", "--near", "--out", "c.jsonl", "--json")
    told = json.loads(out)
    assert told["reasons"] == {"duplicate": 1, "near-duplicate": 1, "not-json": 1}
    assert read(work / "c.jsonl") == rows[:2]
    _, out, _ = lamina(
        "dedup", "a.jsonl", "--near", "--threshold", "1", "--out", "d.jsonl", "--json"
    )
    assert "near-duplicate" not in json.loads(out)["reasons"]
