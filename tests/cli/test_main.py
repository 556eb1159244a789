"""The error boundary: every way to fail, its message and its exit code."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import lamina.recipe.load
from lamina.cli.main import main
from lamina.cli.quiet import quiet
from lamina.errors import LaminaError, StoreError
from lamina.recipe.load import load_recipe, recipe_names

LAMINA = [sys.executable, "-m", "lamina"]
COMMANDS = [
    "",
    "doctor",
    "plan",
    "prepare",
    "tune",
    "eval",
    "generate",
    "chat",
    "recipes",
    "recipes ls",
    "recipes show",
    "recipes copy",
    "store",
    "store show",
    "store verify",
]


@pytest.fixture(autouse=True)
def nothing_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In an empty folder, and with the process's switches put back afterwards."""
    environment = dict(os.environ)
    level = logging.getLogger("transformers").level
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    yield
    os.environ.clear()
    os.environ.update(environment)
    logging.getLogger("transformers").setLevel(level)


def run(*words: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [*LAMINA, *words],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | environment,
        check=False,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help"]) == 0

    out, err = capsys.readouterr()
    assert f"Usage: lamina {command}".strip() in out
    assert err == ""
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_instant(command: str) -> None:
    """Cold, in a process of its own. Processor time, which is what it takes on a machine that has
    nothing else to do, and the best of three."""
    times = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run(*command.split(), "--help").returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    assert min(times) < 0.5, times


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tun"], "No such command 'tun'. Did you mean 'tune'?"),
        (["tune"], "Missing argument 'RECIPE'."),
        (["tune", "mini-mixtral", "--dat", "x"], "No such option: --dat"),
        (["eval", "run"], "Missing option '--data'."),
        (["generate", "run", "--max-new-tokens", "0"], "Invalid value for '--max-new-tokens'"),
        (["generate", "run", "--temperature", "hot"], "Invalid value for '--temperature'"),
        (["tune", "mini-mixtral"], "there is nothing to train on"),
        (["prepare", "m", "--codec", "nf5"], "--codec nf5: there is no such codec"),
        (["generate", ""], "a run or a model is needed"),
    ],
)
def test_wrong_usage(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2

    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"error: {message}")
    assert "Traceback" not in err


@pytest.mark.parametrize("words", [[], ["recipes"], ["store"]])
def test_nothing_to_do_shows_what_there_is(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2

    out, err = capsys.readouterr()
    assert out == ""
    assert "Commands:" in err


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let `recipes ls` run into an error."""

    def fail() -> None:
        raise error

    monkeypatch.setattr(lamina.recipe.load, "list_recipes", fail)


def test_a_users_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, StoreError("it broke [red]", problems=["one", "two"], hint="Mend it."))

    assert main(["recipes", "ls"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: it broke [red]\n  - one\n  - two\nhint: Mend it.\n"


def test_our_mistake(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fail_with(monkeypatch, ZeroDivisionError("by zero"))

    assert main(["recipes", "ls"]) == 70
    err = capsys.readouterr().err
    assert err.startswith("error: this is a mistake in Lamina, not yours: ZeroDivisionError")
    assert "Traceback" not in err
    (report,) = tmp_path.glob("lamina-error-*.txt")
    assert str(report) in err
    text = report.read_text()
    assert "Traceback" in text
    assert "in fail" in text


def test_our_mistake_in_full(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("LAMINA_DEBUG", "1")
    fail_with(monkeypatch, ZeroDivisionError("by zero"))

    assert main(["recipes", "ls"]) == 70
    assert "Traceback" in capsys.readouterr().err


def test_the_machines_refusals_are_not_our_mistakes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "runs/a"))

    assert main(["recipes", "ls"]) == 1
    assert capsys.readouterr().err == "error: runs/a: No space left on device\n"


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())

    assert main(["recipes", "ls"]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_ctrl_c_in_a_process() -> None:
    process = subprocess.Popen(
        [*LAMINA, "generate", "some/model"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    time.sleep(1.0)  # until it waits for its prompt
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)

    assert (process.returncode, out, err) == (130, "", "interrupted\n")


def test_a_reader_that_goes_away() -> None:
    process = subprocess.Popen(
        [*LAMINA, "recipes", "show", "mini-mixtral"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()

    assert (process.wait(timeout=30), err) == (1, "")


def test_recipes_ls(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "ls"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["RECIPE", "STATUS", "DESCRIPTION"]
    assert [line.split()[0] for line in lines[1:]] == recipe_names()
    assert "untried" in lines[1]

    assert main(["recipes", "ls", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [recipe["name"] for recipe in listed] == recipe_names()


def test_recipes_show(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["recipes", "show", "mini-mixtral"]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    assert load_recipe("shown.yaml") == load_recipe("mini-mixtral")

    (tmp_path / "free.yaml").write_text("model: m\nmax_grad_norm: .inf\n")
    assert main(["recipes", "show", "free.yaml", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (shown["r"], shown["max_grad_norm"]) == (16, None)

    assert main(["recipes", "show", "mini-mistral"]) == 1
    assert "Did you mean mini-mixtral?" in capsys.readouterr().err


def test_recipes_copy(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "copy", "mini-mixtral", "mine.yaml"]) == 0
    assert capsys.readouterr().out == ""
    assert load_recipe("mine.yaml") == load_recipe("mini-mixtral")
    assert main(["recipes", "copy", "mini-mixtral", "mine.yaml"]) == 1
    assert "nothing is written over it" in capsys.readouterr().err


def test_the_shell_completes_commands_and_recipes() -> None:
    def complete(words: str) -> list[str]:
        done = run(
            _LAMINA_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD=str(words.count(" "))
        )
        assert done.stderr == ""
        return done.stdout.split()

    assert complete("lamina t") == ["tune"]
    assert complete("lamina tune mini") == ["mini-maverick", "mini-mixtral"]


def test_colours_only_where_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR")
    assert "\x1b" not in run("tun").stderr
    assert "\x1b[" in run("tun", FORCE_COLOR="1").stderr
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]m", run("tun", FORCE_COLOR="1", NO_COLOR="1").stderr)


def test_quiet_keeps_what_the_user_has_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "debug")
    monkeypatch.delenv("HF_HUB_DISABLE_PROGRESS_BARS", raising=False)
    quiet()
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "debug"
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
    assert logging.getLogger("transformers").level == logging.ERROR


def test_libraries_keep_quiet() -> None:
    """All that the engine needs, imported as a command would: not a word."""
    code = (
        "from lamina.cli.quiet import quiet; quiet()\n"
        "import torch, transformers, bitsandbytes, peft, safetensors.torch, logging, warnings\n"
        "warnings.warn('noise'); logging.getLogger('transformers.x').warning('noise')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )

    assert (done.stdout, done.stderr) == ("", "")


@pytest.mark.parametrize("error", [LaminaError("no"), ValueError("no")])
def test_no_exception_leaves_main(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fail_with(monkeypatch, error)

    outcome: Callable[[list[str]], int] = main
    assert outcome(["recipes", "ls"]) in (1, 70)
