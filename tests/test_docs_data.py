"""docs/data-commands.md says what is true: each command on it runs, and prints what stands there.

`python -m tests.test_docs_data` writes the page anew, with what the commands print now.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import get_args

import pytest
import typer

from lamina.cli.main import app, main
from lamina.data.chat.pieces import MASKS
from lamina.data.codes import CODES
from lamina.data.containers import SUFFIXES, Compression, Container
from lamina.data.dataset import load_dataset
from lamina.data.detect import detect
from lamina.data.formats import Input
from lamina.data.lengths import POLICIES
from lamina.data.messages import RowError
from lamina.data.shapes import SHAPES
from lamina.recipe.load import load_recipe
from lamina.recipe.schema import Recipe

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "data-commands.md"
REFERENCE = ROOT / "docs" / "data.md"

#: The page's blocks: what stands before one, its language, and what it holds.
BLOCK = re.compile(r"```(\w+)\n(.*?)```\n", re.S)
FILE = re.compile(r"Let this be `([\w.]+)`:\s*\Z")


def install_tokenizer(home: Path) -> None:
    """The tokenizer of the small models where their prepared weights would be: `lamina data` needs
    nothing else of them."""
    from lamina.models.mini_parent import find_parent

    parent = find_parent()
    folder = home / "stores" / "mini-mixtral-nf4"
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_text(parent.tokenizer)
    (folder / "chat_template.jinja").write_text(parent.chat_template)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({**config, "bos_token": "<|im_start|>", "add_prefix_space": False})
    )


def run(line: str) -> str:
    """What a command of the page prints on stdout, or shows of a file. `lamina tune` takes minutes:
    of it, only the
    recipe and the data are looked at."""
    words = shlex.split(line)
    if words[0] != "lamina":
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60)
        return done.stdout
    if words[1] == "tune":
        command = typer.main.get_command(app)
        tune = command.commands["tune"]  # type: ignore[attr-defined]
        given = tune.make_context("tune", words[2:]).params
        recipe = load_recipe(given["recipe"], given["overrides"])
        for file in [*given["data"], *(given["eval_data"] or ())]:
            data = Input(
                file,
                shape=recipe.data_format,
                columns=recipe.data_columns,
                text_rows=recipe.text_rows,
            )
            assert not any(isinstance(row.example, RowError) for row in data.rows()), file
        return ""
    target = None
    if ">" in words:
        target = words[words.index(">") + 1]
        words = words[: words.index(">")]
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(words[1:])
    assert code in (0, 1), err.getvalue()
    if code == 1:
        assert words[:3] == ["lamina", "data", "check"], err.getvalue()
    if target is None:
        return out.getvalue()
    Path(target).write_text(out.getvalue())
    return ""


def run_python(code: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, str(PAGE), "exec"), {})
    return out.getvalue()


def refreshed(text: str) -> str:
    """The page with what its commands print now. Works in the current folder."""
    written: list[str] = []
    end = 0
    for block in BLOCK.finditer(text):
        before, language, body = text[end : block.start()], block[1], block[2]
        end = block.end()
        if language == "text":  # what was printed: written anew after its command
            assert not before.strip(), before
            continue
        written.append(before + block[0])
        printed = ""
        if language in ("sh", "python"):
            lines = body.splitlines()
            printed = run_python(body) if language == "python" else "".join(map(run, lines))
        elif name := FILE.search(before):
            Path(name[1]).write_text(body)
        if printed:
            written.append(f"\n```text\n{printed.rstrip()}\n```\n")
    return "".join(written) + text[end:]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LAMINA_HOME", str(tmp_path / "home"))
    install_tokenizer(tmp_path / "home")
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def test_the_commands_run_and_print_what_the_page_says(work: Path) -> None:
    text = PAGE.read_text(encoding="utf-8")

    assert refreshed(text) == text, "python -m tests.test_docs_data writes the page anew"
    assert (work / "page.html").read_text().startswith("<!doctype html>")


def test_the_page_shows_every_command() -> None:
    text = PAGE.read_text(encoding="utf-8")
    data = typer.main.get_command(app).commands["data"]  # type: ignore[attr-defined]

    shown = {line.split()[2] for line in text.splitlines() if line.startswith("lamina data ")}
    assert shown == set(data.commands)


def test_options_and_the_recipes_keys_say_the_same() -> None:
    text = PAGE.read_text(encoding="utf-8")
    data = typer.main.get_command(app).commands["data"]  # type: ignore[attr-defined]
    options = {flag for p in data.commands["stats"].params for flag in p.opts}

    pairs = re.findall(r"^\| `(--[\w-]+)` \| `(\w+)` \|$", text, re.M)
    assert len(pairs) == 6
    for option, key in pairs:
        assert option in options
        assert key in Recipe.model_fields


def test_the_reference_names_all_there_is() -> None:
    text = REFERENCE.read_text(encoding="utf-8")
    containers = set(get_args(Container)) - {"saved-dataset", "hub"}

    for name in [*(shape.name for shape in SHAPES), *CODES, *SUFFIXES]:
        assert f"`{name}`" in text, name
    for name in [*containers, *MASKS, *POLICIES]:
        assert f"| {name} |" in text, name
    for name in [*get_args(Compression)[1:], "save_to_disk", "owner/name"]:
        assert name in text, name


def test_every_example_of_the_reference_is_found_and_trained(work: Path) -> None:
    """Each stands under its format, and becomes tokens of which some are learned."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work.parent / "home" / "stores" / "mini-mixtral-nf4")
    text = REFERENCE.read_text(encoding="utf-8")
    examples = re.findall(r"### `([a-z-]+)`[^#]*?```json\n(.*?)```", text, re.S)

    assert [name for name, _ in examples] == [shape.name for shape in SHAPES]
    for name, example in examples:
        file = work / f"{name}.jsonl"
        file.write_text(example)
        (found,) = detect(file)
        assert (found.shape, found.problems) == (name, []), name
        assert load_dataset(file, tokenizer).num_loss_tokens > 0, name


@pytest.mark.parametrize("page", [PAGE, REFERENCE])
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")

    for file, anchor in re.findall(r"\]\(([\w.-]+)(?:#([\w-]+))?\)", text):
        linked = (page.parent / file).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.*)$", linked, re.M)
        anchors = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
        assert not anchor or anchor in anchors, f"{file}#{anchor}"


if __name__ == "__main__":
    os.environ["NO_COLOR"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LAMINA_HOME"] = f"{folder}/home"
        install_tokenizer(Path(folder) / "home")
        (Path(folder) / "work").mkdir()
        os.chdir(f"{folder}/work")
        PAGE.write_text(refreshed(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        os.chdir(ROOT)
    sys.exit(0)
