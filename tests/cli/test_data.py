"""What holds for all commands of `lamina data`."""

from __future__ import annotations

import gzip
import json
import os
import re
import resource
import subprocess
from pathlib import Path

import pytest
from tests.cli.rows import LAMINA, Lamina, WriteRows, chat

from lamina.cli.data_input import parse_columns
from lamina.cli.main import main
from lamina.data.chat.pieces import MASKS
from lamina.data.lengths import POLICIES

COMMANDS = ["check", "convert", "dedup", "detect", "preview", "split", "stats"]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", *command.split(), "--help"]) == 0

    out, err = capsys.readouterr()
    assert out.startswith(f"Usage: lamina data {command}".strip())
    assert err == ""
    assert max(map(len, out.splitlines())) <= 80
    assert command or "..." not in out.partition("Commands:")[2]  # no summary is cut off


@pytest.mark.slow
@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_instant(command: str) -> None:
    """In processor time, which other programs on the machine change least."""

    def used() -> float:
        return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])

    times = []
    for _ in range(3):
        before = used()
        subprocess.run([*LAMINA, "data", *command.split(), "--help"], check=True, timeout=60)
        times.append(used() - before)

    assert min(times) < 0.5, times


def test_help_names_every_choice(capsys: pytest.CaptureFixture[str]) -> None:
    main(["data", "stats", "--help"])
    text = " ".join(capsys.readouterr().out.split())

    def listed(option: str) -> list[str]:
        found = re.search(rf"--{option} [A-Z]+ [^:]+: ([^.]+)\.", text)
        assert found, option
        return re.split(", | or ", found[1])

    assert listed("mask") == list(MASKS)
    assert listed("too-long") == list(POLICIES)
    assert listed("text-rows") == ["document", "paragraph", "line"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["detect"], "Missing argument 'FILE'."),
        (["detect", "a.jsonl", "--format", "chatml"], "--format chatml: there is no such choice"),
        (["detect", "a.jsonl", "--text-rows", "word"], "--text-rows word: there is no such"),
        (["detect", "a.jsonl", "--map", "question"], "--map question: 'question' is not NAME=COL"),
        (["detect", "a.jsonl", "--map", "user=a,question=b"], "--map: two columns are mapped to"),
        (["check", "a.jsonl", "--max-length", "9"], "--max-length counts tokens"),
        (["check", "a.jsonl", "--fix"], "--fix writes a copy"),
        (["check", "a.jsonl", "--out", "b"], "--out is for --fix"),
        (["check", "a.jsonl", "--mask", "none"], "--mask none: there is no such choice"),
        (["preview", "a.jsonl"], "this needs a model, for its tokenizer"),
        (["preview", "a.jsonl", "--model", ""], "this needs a model, for its tokenizer"),
        (["preview", "a.jsonl", "--json", "--html", "p"], "--html and --json are two ways"),
        (["preview", "a.jsonl", "--rows", "-1"], "Invalid value for '--rows'"),
        (["stats", "a.jsonl"], "this needs a model"),
        (["stats", "a.jsonl", "--too-long", "cut"], "--too-long cut: there is no such choice"),
        (["convert", "a.jsonl"], "Missing option '--out'."),
        (["convert", "a.jsonl", "--out", "b", "--to", "chatml"], "--to chatml: there is no such"),
        (["split", "a.jsonl", "--out", "b", "--held-out", "c"], "say how much to split off"),
        (
            ["split", "a.jsonl", "--out", "b", "--held-out", "c", "--fraction", "2"],
            "--fraction 2.0: it must be between 0 and 1",
        ),
        (
            ["split", "a.jsonl", "--out", "b", "--held-out", "c", "--count", "0"],
            "--count 0: it must be at least 1",
        ),
        (["dedup", "a.jsonl", "--out", "b", "--threshold", "7"], "Invalid value for '--threshold'"),
    ],
)
def test_wrong_usage(lamina: Lamina, write_rows: WriteRows, words: list[str], message: str) -> None:
    write_rows("a.jsonl", [chat("q", "a")])

    code, out, err = lamina(*words)

    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("nothing.jsonl", "nothing.jsonl: there is no such file"),
        ("chat.jsonl", "chat.jsonl: there is no such file; did you mean chats.jsonl?"),
        ("assistant=b", "assistant=b: there is no such file (commas join what is mapped"),
        ("none*.jsonl", "none*.jsonl matches no file"),
        ("folder", "folder is a folder, but not one that a dataset was saved in"),
        ("empty.jsonl", "empty.jsonl: is empty"),
        ("pipe", "pipe: is not an ordinary file"),
        ("blank.jsonl", ""),
        ("x.jsonl.gz", "x.jsonl.gz can't be decompressed"),
        ("utf16.jsonl", "utf16.jsonl is UTF-16"),
    ],
)
@pytest.mark.parametrize(
    "words",
    [
        ["detect"],
        ["check"],
        ["convert", "--out", "out.jsonl"],
        ["dedup", "--out", "out.jsonl"],
        ["split", "--out", "out.jsonl", "--held-out", "held.jsonl", "--count", "1"],
    ],
)
def test_files_that_are_no_data(
    lamina: Lamina, work: Path, words: list[str], file: str, message: str
) -> None:
    (work / "chats.jsonl").write_text("{}\n")
    (work / "folder").mkdir()
    (work / "empty.jsonl").touch()
    (work / "blank.jsonl").write_text("\n \n")
    (work / "x.jsonl.gz").write_bytes(gzip.compress(b"{}")[:12])
    (work / "utf16.jsonl").write_bytes("{}".encode("utf-16"))
    os.mkfifo(work / "pipe")

    code, _, err = lamina(*words, file)

    assert code == 1
    assert message in err
    assert "Traceback" not in err
    assert "mistake in Lamina" not in err
    assert not (work / "held.jsonl").exists()


def test_all_missing_files_are_named_at_once(lamina: Lamina) -> None:
    code, _, err = lamina("check", "a.jsonl", "b.jsonl")

    assert code == 1
    assert "a.jsonl: there is no" in err
    assert "b.jsonl: there is no" in err


def test_names_that_no_terminal_can_show(work: Path) -> None:
    row = json.dumps(chat("q", "a")) + "\n"
    (work / os.fsdecode(b"b\xff.jsonl")).write_text(row)
    environment = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}

    for words in (["detect"], ["check"], ["detect", "--json"]):
        done = subprocess.run(
            [*map(os.fsencode, [*LAMINA, "data", *words]), b"b\xff.jsonl"],
            capture_output=True,
            env=environment,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, b"")
        assert rb"b\udcff.jsonl" in done.stdout


@pytest.mark.parametrize(
    ("given", "columns"),
    [
        (["user=a"], {"user": "a"}),
        (["question=a,answer=b"], {"user": "a", "assistant": "b"}),
        (["user=a", "assistant=b"], {"user": "a", "assistant": "b"}),
        (["user=a, really,assistant=b=c"], {"user": "a, really", "assistant": "b=c"}),
    ],
)
def test_mapped_columns(given: list[str], columns: dict[str, str]) -> None:
    assert parse_columns(given) == columns


def test_the_shell_completes_formats() -> None:
    done = subprocess.run(
        LAMINA,
        env=os.environ
        | {
            "_LAMINA_COMPLETE": "complete_bash",
            "COMP_WORDS": "lamina data convert x --to s",
            "COMP_CWORD": "5",
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert (done.stdout.split(), done.stderr) == (["sharegpt"], "")
