"""`lamina data preview`."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.cli.rows import Lamina, WriteRows, chat

from lamina.data.dataset import load_dataset


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
