"""`lamina data stats`."""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.cli.rows import Lamina, WriteRows, chat

from lamina.data.batches import plan_steps
from lamina.data.dataset import load_dataset
from lamina.data.shapes import SHAPES
from lamina.recipe.load import load_recipe


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
