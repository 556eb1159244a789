"""`lamina data check`."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.rows import Lamina, WriteRows, chat


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
