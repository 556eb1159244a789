"""Whose tokenizer the commands use, and what a recipe tells them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests.cli.rows import Lamina, WriteRows, chat


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


def test_a_recipe_says_what_a_row_of_a_text_is(
    lamina: Lamina, work: Path, byte_tokenizer: Path
) -> None:
    (work / "notes.txt").write_text("One.\nTwo.\n\nThree.\n")
    (work / "r.yaml").write_text(f"model: {byte_tokenizer}\ntext_rows: paragraph\n")
    (work / "other.yaml").write_text(f"model: {byte_tokenizer}\n")

    def rows(*words: str) -> int:
        return json.loads(lamina("stats", "notes.txt", *words, "--json")[1])["rows"]  # type: ignore[no-any-return]

    assert rows("--recipe", "other.yaml") == 1
    assert rows("--recipe", "r.yaml") == 2
    assert rows("--recipe", "r.yaml", "--text-rows", "line") == 3


@pytest.mark.parametrize("broken", ["tokenizer_config.json", "generation_config.json"])
def test_a_store_with_a_broken_tokenizer(
    lamina: Lamina, work: Path, write_rows: WriteRows, byte_tokenizer: Path, broken: str
) -> None:
    write_rows("a.jsonl", [chat("q", "a")])
    store = shutil.copytree(byte_tokenizer, work / "store")
    (store / "store.json").write_text("{}")
    (store / broken).write_text("[")
    (work / "r.yaml").write_text("model: owner/name\nstore: store\n")

    code, out, err = lamina("stats", "a.jsonl", "--recipe", "r.yaml")

    assert (code, out) == (1, "")
    assert err.startswith("error: store: its ")
    assert err.endswith("into the checkpoint and prepare it again.\n")
    assert len(err.splitlines()) == 2


def test_generation_ends_where_the_model_says(
    lamina: Lamina, work: Path, write_rows: WriteRows, byte_tokenizer: Path
) -> None:
    """A template may end a turn with a token that only generation_config.json calls an end."""
    write_rows("a.jsonl", [chat("q", "a")])
    folder = shutil.copytree(byte_tokenizer, work / "model")
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    (folder / "chat_template.jinja").write_text(template)

    _, out, _ = lamina("preview", "a.jsonl", "--model", "model")
    assert out.endswith("⟦a<|endoftext|>⟧\n")  # found by the template
    (folder / "chat_template.jinja").write_text(template.replace("<|endoftext|>", "E"))
    _, out, _ = lamina("preview", "a.jsonl", "--model", "model")
    assert "can't be masked" in out
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 39]}))
    _, out, _ = lamina("preview", "a.jsonl", "--model", "model")
    assert out.endswith("⟦aE⟧\n"), out
