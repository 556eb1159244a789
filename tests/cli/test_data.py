"""`lamina data detect`, `check`, `preview` and `stats`."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lamina.cli.data_input import parse_columns
from lamina.cli.main import main
from lamina.data.batches import plan_steps
from lamina.data.chat.pieces import MASKS
from lamina.data.dataset import load_dataset
from lamina.data.lengths import POLICIES
from lamina.data.shapes import SHAPES
from lamina.recipe.load import load_recipe

Lamina = Callable[..., tuple[int, str, str]]
WriteRows = Callable[..., Path]

LAMINA = [sys.executable, "-m", "lamina"]
COMMANDS = ["check", "convert", "dedup", "detect", "preview", "split", "stats"]


def chat(question: str, answer: str, **columns: Any) -> dict[str, Any]:
    """A row with one question and its answer."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": messages, **columns}


# -- all of them ----------------------------------------------------------------------------------


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
    import time

    times = []
    for _ in range(5):
        begun = time.perf_counter()
        subprocess.run([*LAMINA, "data", *command.split(), "--help"], check=True, timeout=60)
        times.append(time.perf_counter() - begun)

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


# -- detect ---------------------------------------------------------------------------------------


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


def test_a_column_cannot_drive_the_terminal(lamina: Lamina, work: Path) -> None:
    (work / "a.csv").write_text("x\x1b[31m,y\n1,2\n")

    _, out, _ = lamina("detect", "a.csv")

    assert "\x1b" not in out
    assert r"'x\x1b[31m': a string" in out


# -- check ----------------------------------------------------------------------------------------


def test_check_exits_with_1_for_errors_only(lamina: Lamina, write_rows: WriteRows) -> None:
    good = [chat("What is 2 + 2?", "4"), chat("Name a colour.", "Blue")]
    write_rows("good.jsonl", good)
    write_rows("warned.jsonl", [*good, good[0]])
    write_rows("bad.jsonl", [*good, "no JSON", {"messages": []}])

    code, out, err = lamina("check", "good.jsonl")
    assert (code, out, err) == (0, "good.jsonl: 2 rows. Nothing that stops a run.\n", "")

    code, out, _ = lamina("check", "warned.jsonl")
    assert code == 0
    assert out.startswith("warning duplicate: rows that are there twice (1)\n    warned.jsonl:3 is")
    assert out.endswith("warned.jsonl: 3 rows, 1 warning. Nothing that stops a run.\n")

    code, out, err = lamina("check", "bad.jsonl")
    assert (code, err) == (1, "")
    assert "error not-json: lines that aren't JSON (1)\n    bad.jsonl:3 is not JSON" in out
    assert "    do: Write one JSON object a line.\n" in out
    assert out.endswith("bad.jsonl: 4 rows, 2 errors. 2 rows can't be trained on.\n")

    code, out, _ = lamina("check", "bad.jsonl", "--json")
    report = json.loads(out)
    assert (code, report["ok"], report["rows"], report["bad_rows"]) == (1, False, 4, 2)
    assert {f["code"] for f in report["findings"]} == {"not-json", "empty-messages"}


def test_check_says_the_same_thing_once(lamina: Lamina, write_rows: WriteRows) -> None:
    write_rows("a.jsonl", [chat(f"Question {n}", f"Answer {n}", topic=n) for n in range(9)])

    _, out, _ = lamina("check", "a.jsonl", "--no-near")

    assert out.count("columns that are not trained") == 1
    assert "    ... and 8 more.\n" in out


def test_check_tokenizes_for_a_model(
    lamina: Lamina, work: Path, write_rows: WriteRows, byte_tokenizer: Path
) -> None:
    write_rows("a.jsonl", [chat("q", "short"), chat("q", "long " * 40)])
    model = str(byte_tokenizer)
    (work / "r.yaml").write_text(f"model: {model}\nmax_length: 90\ntokens_per_step: 128\n")

    assert "too-long" not in lamina("check", "a.jsonl", "--model", model)[1]
    code, out, _ = lamina("check", "a.jsonl", "--recipe", "r.yaml")
    assert code == 0
    assert "warning too-long: " in out
    assert "a.jsonl:2 has 2" in out
    assert "(2)" in lamina("check", "a.jsonl", "--model", model, "--max-length", "9")[1]
    assert (
        "too-long" not in lamina("check", "a.jsonl", "--recipe", "r.yaml", "--max-length", "999")[1]
    )


def test_check_finds_what_is_measured_on(lamina: Lamina, write_rows: WriteRows) -> None:
    write_rows("a.jsonl", [chat("What is 2 + 2?", "4"), chat("Name a colour.", "Blue")])
    write_rows("b.jsonl", [chat("What is 2 + 2?", "4")])

    _, out, _ = lamina("check", "a.jsonl", "--eval-data", "b.jsonl")

    assert "warning leakage: " in out
    assert "a.jsonl:1 is the same as b.jsonl:1." in out


def test_check_fix(lamina: Lamina, work: Path, write_rows: WriteRows) -> None:
    rows = [chat("q", "a"), chat("q", "a"), chat("q2", "a2"), '{"messages": 3}', "no"]
    rows[2]["messages"].append({"role": "user", "content": "Thanks"})
    source = write_rows("a.jsonl", rows)
    before = source.read_bytes()
    words = ("check", "a.jsonl", "--fix", "--out", "b.jsonl")

    code, out, err = lamina(*words)

    assert (code, err) == (0, "")  # of the copy
    assert "\n5 read from a.jsonl\n2 written to b.jsonl\n3 rejected, in b.jsonl.rejected" in out
    assert "mended last-turn in 1 row: turns after the last answer are removed\n" in out
    assert source.read_bytes() == before
    assert len((work / "b.jsonl").read_text().splitlines()) == 2
    assert len((work / "b.jsonl.rejected.jsonl").read_text().splitlines()) == 3
    assert len((work / "b.jsonl.mends.jsonl").read_text().splitlines()) == 1
    assert lamina("check", "b.jsonl")[0] == 0

    code, out, err = lamina(*words)
    assert (code, out) == (1, "")  # known before the check, which may take long
    assert err.startswith("error: b.jsonl exists.")
    code, out, _ = lamina(*words, "--force", "--json")
    told = json.loads(out)
    assert (code, told["ok"], told["after_fix"]["ok"]) == (0, False, True)
    assert told["fix"]["rows_in"] == told["fix"]["rows_out"] + told["fix"]["rejected"] == 5


def test_check_fix_looks_at_its_copy(
    lamina: Lamina, write_rows: WriteRows, byte_tokenizer: Path
) -> None:
    """What only a tokenizer sees can't be mended, and is there in the copy too."""
    call = {"name": "f", "arguments": {}}
    row = {
        "messages": [
            {"role": "user", "content": "Do."},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "function": call}]},
            {"role": "tool", "content": "Done.", "tool_call_id": "1"},
            {"role": "assistant", "content": "It is done."},
        ],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    }
    write_rows("a.jsonl", [row, chat("q", "a"), "no"])
    words = ("check", "a.jsonl", "--fix", "--model", str(byte_tokenizer))

    code, out, _ = lamina(*words, "--out", "b.jsonl")

    assert code == 1
    assert "2 written to b.jsonl" in out
    assert out.splitlines()[-1] == "b.jsonl: 2 rows, 1 error. 1 row can't be trained on."


def test_check_fix_with_nothing_left(lamina: Lamina, write_rows: WriteRows) -> None:
    write_rows("a.jsonl", ["no", "no"])

    code, _, err = lamina("check", "a.jsonl", "--fix", "--out", "b.jsonl")

    assert code == 1
    assert err.startswith("error: b.jsonl: not one row could be kept")


# -- preview --------------------------------------------------------------------------------------


def test_preview_without_colour(
    lamina: Lamina, write_rows: WriteRows, byte_tokenizer: Path
) -> None:
    write_rows("a.jsonl", [chat("Hi", "Hello"), "no", chat("Bye", "See you")])
    words = ("preview", "a.jsonl", "--model", str(byte_tokenizer))

    code, out, err = lamina(*words)

    assert (code, err) == (0, "")
    assert "\x1b" not in out
    assert "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦Hello<|im_end|>⟧" in out
    assert "a.jsonl:2: is not JSON" in out

    _, out, _ = lamina(*words, "--start", "3", "--rows", "5")
    assert out.count("a.jsonl:") == 1
    assert "⟦See you<|im_end|>⟧" in out
    _, out, _ = lamina(*words, "--rows", "1", "--mask", "all", "--ids")
    assert "⟦u(" in out
    code, _, err = lamina(*words, "--start", "4")
    assert (code, err) == (1, "error: a.jsonl: there is no row from row 4 on\n")


def test_preview_in_colour(
    lamina: Lamina,
    write_rows: WriteRows,
    byte_tokenizer: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_rows("a.jsonl", [chat("Hi", "Hello")])
    words = ("preview", "a.jsonl", "--model", str(byte_tokenizer))
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("TERM", "xterm-256color")

    assert "⟦Hello" in lamina(*words)[1]  # NO_COLOR is set for all tests

    monkeypatch.delenv("NO_COLOR")
    out = lamina(*words)[1]
    assert "⟦" not in out
    learned, read = re.findall(r"(\x1b\[[\d;]*m)(?=Hello|<\|im_start\|>user)", out)[::-1]
    assert learned != read
    monkeypatch.setenv("TERM", "dumb")
    assert "⟦Hello" in lamina(*words)[1]


def test_preview_json_is_what_is_trained(
    lamina: Lamina, write_rows: WriteRows, byte_tokenizer: Path
) -> None:
    from transformers import AutoTokenizer

    file = write_rows("a.jsonl", [chat(f"{n} + 1?", f"{n + 1}") for n in range(5)])

    code, out, _ = lamina(
        "preview", "a.jsonl", "--model", str(byte_tokenizer), "--rows", "0", "--json"
    )

    lines = [json.loads(line) for line in out.splitlines()]
    trained = load_dataset(file, AutoTokenizer.from_pretrained(byte_tokenizer))
    assert code == 0
    assert [line["input_ids"] for line in lines] == [s.input_ids.tolist() for s in trained]
    assert [line["labels"] for line in lines] == [s.labels.tolist() for s in trained]
    assert -100 in lines[0]["labels"]


def test_preview_html(
    lamina: Lamina, work: Path, write_rows: WriteRows, byte_tokenizer: Path
) -> None:
    source = write_rows("a.jsonl", [chat("<script>alert(1)</script>", "Hello")])
    words = ("preview", "a.jsonl", "--model", str(byte_tokenizer), "--html")

    code, out, err = lamina(*words, "page.html")

    assert (code, out, err) == (0, "", "page.html: written\n")
    page = (work / "page.html").read_text()
    assert "<script" not in page
    assert "<mark" in page
    assert lamina(*words, "page.html")[0] == 1
    assert lamina(*words, "page.html", "--force")[0] == 0
    before = source.read_bytes()
    assert lamina(*words, "a.jsonl", "--force")[0] == 1
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("mini-mixtrl", "there is no such model; did you mean mini-mixtral?"),
        ("./nowhere", "there is no such model"),
        ("empty", "this folder holds no tokenizer"),
        ("broken", "its tokenizer can't be loaded: "),
        ("owner/name", "its tokenizer can't be loaded: "),
        ("wrong.yaml", "there is no such key"),
    ],
)
def test_models_without_a_tokenizer(
    lamina: Lamina, work: Path, write_rows: WriteRows, model: str, message: str
) -> None:
    write_rows("a.jsonl", [chat("q", "a")])
    (work / "empty").mkdir()
    (work / "broken").mkdir()
    (work / "broken" / "tokenizer_config.json").write_text("{")
    (work / "wrong.yaml").write_text("model: mini-mixtral\nmax_len: 3\n")

    code, out, err = lamina("preview", "a.jsonl", "--model", model)

    assert (code, out) == (1, "")
    assert message in err
    assert len(err.splitlines()) <= 3


def test_a_model_is_a_recipe_a_run_a_store_or_a_checkpoint(
    lamina: Lamina, work: Path, write_rows: WriteRows, byte_tokenizer: Path
) -> None:
    write_rows("a.jsonl", [chat("Hi", "Hello")])
    (work / "r.yaml").write_text(f"model: owner/name\nstore: {byte_tokenizer}\n")
    (work / "run").mkdir()
    (work / "run" / "recipe.yaml").write_text((work / "r.yaml").read_text())

    shown = {
        lamina("preview", "a.jsonl", "--model", model)
        for model in (str(byte_tokenizer), "r.yaml", "run")
    }

    assert len(shown) == 1
    assert shown.pop()[0] == 0


def test_a_recipe_says_all_that_options_say(
    lamina: Lamina, work: Path, byte_tokenizer: Path
) -> None:
    """And options go before it."""
    (work / "qa.csv").write_text("Frage,Antwort,Frage2\nWas?,Das,Wer?\n")
    (work / "r.yaml").write_text(
        f"model: {byte_tokenizer}\nmask: all\ntoo_long: truncate\nmax_length: 40\n"
        "data_columns: {user: Frage, assistant: Antwort}\n"
    )
    words = ("qa.csv", "--recipe", "r.yaml")

    _, out, _ = lamina("preview", *words)
    assert "⟦user\nWas?" in out
    _, out, _ = lamina("preview", *words, "--mask", "last")
    assert "user\nWas?" in out
    assert "⟦Das<|im_end|>⟧" in out
    _, out, _ = lamina("preview", *words, "--map", "question=Frage2,answer=Antwort")
    assert "⟦user\nWer?" in out
    told = json.loads(lamina("stats", *words, "--json")[1])["settings"]
    assert (told["mask"], told["too_long"], told["max_length"]) == ("all", "truncate", 40)
    assert lamina("check", *words)[0] == 0
    assert lamina("check", *words, "--fix", "--out", "copy.csv")[0] == 0
    code, out, _ = lamina("check", *words, "--format", "sharegpt")
    assert code == 1
    assert "error wrong-type" in out


# -- stats ----------------------------------------------------------------------------------------


def test_stats(lamina: Lamina, work: Path, write_rows: WriteRows, byte_tokenizer: Path) -> None:
    from transformers import AutoTokenizer

    rows = [chat("q", "x" * n) for n in range(1, 61)]
    write_rows("a.jsonl", [*rows, "no"])
    (work / "r.yaml").write_text(f"model: {byte_tokenizer}\nmax_length: 60\ntokens_per_step: 60\n")
    words = ("stats", "a.jsonl", "--recipe", "r.yaml")

    code, out, err = lamina(*words)

    assert (code, err) == (0, "")
    assert "rows           61, 1 of them unusable\n" in out
    assert "unusable       1 not-json\n" in out
    assert "turns          60 user, 60 assistant\n" in out
    assert re.search(r"\n +\d+ - +\d+  █+ \d+\n", out)
    _, out, _ = lamina(*words, "--json")
    told = json.loads(out)
    longest = told["lengths"]["maximum"]
    assert told["longest"][0] == {"place": "a.jsonl:60", "num_tokens": longest}
    assert told["num_loss_tokens"] == sum(n + 1 for n in range(1, 61))
    assert told["loss_share"] == told["num_loss_tokens"] / told["num_tokens"]
    assert told["too_long"] == told["dropped"] == longest - 60
    write_rows("good.jsonl", rows)
    trained = load_dataset(
        "good.jsonl", AutoTokenizer.from_pretrained(byte_tokenizer), max_length=60
    )
    steps = plan_steps(trained, 60, epochs=1, seed=load_recipe("r.yaml").seed)
    assert told["steps_per_epoch"] == len(steps)
    assert told["settings"] == {
        "max_length": 60,
        "too_long": "drop",
        "tokens_per_step": 60,
        "mask": "assistant",
    }

    _, out, _ = lamina(*words, "--too-long", "truncate", "--json")
    told = json.loads(out)
    assert (told["dropped"], told["shortened"]) == (0, longest - 60)
    _, out, _ = lamina(*words, "--max-length", "500")
    assert "no row is too long" in out
    assert "a step of 60 tokens can't hold the longest sample" in out
    assert "epoch" not in lamina("stats", "a.jsonl", "--model", str(byte_tokenizer))[1]


def test_every_format_is_counted(
    lamina: Lamina, write_rows: WriteRows, byte_tokenizer: Path
) -> None:
    for shape in SHAPES:
        row = {"input_ids": [1, 2], "labels": [-100, 2]} if shape.name == "tokens" else shape.row
        write_rows(f"{shape.name}.jsonl", [row])

    code, out, _ = lamina("stats", "*.jsonl", "--model", str(byte_tokenizer), "--json")

    told = json.loads(out)
    assert code == 0
    assert told["shapes"] == {shape.name: 1 for shape in SHAPES}
    assert told["unusable"] == {}
    assert told["samples"] == len(SHAPES)
