"""A command says all that is wrong with its input at once, before anything heavy is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lamina.cli.inputs import run_or_model
from lamina.cli.main import main
from lamina.errors import LaminaError


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def problems(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """The lines of a command that fails with exit code 1."""
    heavy = {"torch", "transformers"} & set(sys.modules)
    assert main(list(words)) == 1
    assert {"torch", "transformers"} & set(sys.modules) == heavy
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_tune_names_everything(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    (here / "chats.jsonl").write_text("{}\n")
    (here / "empty.jsonl").touch()
    (here / "folder").mkdir()
    (here / "folder" / "x").touch()

    lines = problems(
        capsys,
        *("tune", "mini-mixtral", "rank=3", "extra.jsonl"),
        *("--data", "chat.jsonl", "--data", "empty.jsonl", "--data", "chats.jsonl"),
        *("--eval-data", "folder", "--eval-data", "./chats.jsonl", "--out", "folder"),
    )

    assert lines == [
        "error: the run can't begin",
        "  - `extra.jsonl`: an override looks like key=value",
        "  - `rank` (override): there is no such key; did you mean `r`?",
        "  - chat.jsonl: there is no such file; did you mean chats.jsonl?",
        "  - empty.jsonl: is empty",
        "  - folder: isn't empty, and nothing is written over a run; give another --out",
        "  - chats.jsonl: is trained on and measured on too, so its loss would show memory only",
        "hint: `lamina recipes show mini-mixtral` explains every key.",
    ]


def test_tune_with_a_wrong_recipe_only(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    (here / "chats.jsonl").write_text("{}\n")

    lines = problems(capsys, "tune", "mini-mistral", "--data", "chats.jsonl")

    assert lines[0] == "error: recipe mini-mistral: there is none of that name, and no such file"
    assert lines[1].startswith("hint: Did you mean mini-mixtral?")


def test_tune_takes_data_from_the_recipe(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    (here / "mine.yaml").write_text("model: mini-mixtral\ndata: a.jsonl\neval_data: [b.jsonl]\n")

    lines = problems(capsys, "tune", "mine.yaml")

    assert lines[1:] == [
        "  - a.jsonl: there is no such file",
        "  - b.jsonl: there is no such file",
    ]


def test_tune_out_is_a_file(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    (here / "chats.jsonl").write_text("{}\n")

    lines = problems(
        capsys, "tune", "mini-mixtral", "--data", "chats.jsonl", "--out", "chats.jsonl"
    )

    assert lines[1:] == ["  - chats.jsonl: is a file, and --out is to be a folder"]


def test_eval(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    (here / "data.jsonl").write_text("{}\n")
    (here / "runs" / "mine").mkdir(parents=True)
    (here / "runs" / "mine" / "recipe.yaml").touch()

    assert problems(capsys, "eval", "mine", "--data", "data.jsonl") == [
        "error: mine: there is no such folder",
        "hint: There is a runs/mine.",
    ]
    assert problems(capsys, "eval", "runs/mime", "--data", "data.jsonl")[0] == (
        "error: runs/mime: there is no such folder; did you mean runs/mine?"
    )
    assert problems(capsys, "eval", "runs", "--data", "data.jsonl")[0] == (
        "error: runs: is neither the folder of a run nor that of a model"
    )
    assert problems(capsys, "eval", "runs/mine", "--data", "date.jsonl") == [
        "error: the evaluation can't begin",
        "  - date.jsonl: there is no such file; did you mean data.jsonl?",
    ]


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize("run", ["runs/mine", "./mine", "/nowhere/mine", "~/mi/ne", "a/b/c"])
def test_runs_that_are_not_there(
    capsys: pytest.CaptureFixture[str], command: str, run: str
) -> None:
    lines = problems(capsys, command, run)

    assert "there is no such folder" in lines[0]


@pytest.mark.parametrize("command", ["verify", "show"])
def test_stores_that_are_not_there(
    capsys: pytest.CaptureFixture[str], command: str, lamina_home: Path
) -> None:
    (lamina_home / "stores" / "other-nf4").mkdir(parents=True, exist_ok=True)

    lines = problems(capsys, "store", command, "othr-nf4")

    assert lines[0] == (
        "error: othr-nf4: there is no such store; "
        f"did you mean {lamina_home / 'stores' / 'other-nf4'}?"
    )


def test_a_folder_or_a_name(here: Path) -> None:
    (here / "mine").mkdir()
    (here / "mine" / "store.json").touch()

    assert run_or_model("mine") == "mine"
    assert run_or_model("mini-mixtral") == "mini-mixtral"
    assert run_or_model("org/model") == "org/model"
    with pytest.raises(LaminaError):
        run_or_model("./mini-mixtral")
