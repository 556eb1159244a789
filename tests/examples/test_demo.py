"""The demo: how it judges, and that it shows what it should."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import demo
import pytest

WANTED = json.dumps(
    {"module": "textwrap", "name": "dedent", "signature": "dedent(text)", "summary": "Unindent."}
)


def altered(**changes: object) -> str:
    return json.dumps({**json.loads(WANTED), **changes})


@pytest.mark.parametrize(
    ("given", "right"),
    [
        (WANTED, True),
        (altered(summary="Remove the margin."), True),
        (altered(signature="dedent(text, /)"), False),
        (altered(name="indent"), False),
        (altered(module="text"), False),
        (altered(more=1), False),
        (json.dumps({"signature": "dedent(text)"}), False),
        (f"Here it is: {WANTED}", False),
        (WANTED[:-1], False),
        ("", False),
        ("[]", False),
        ("[" * 100_000, False),
    ],
)
def test_is_right(given: str, right: bool) -> None:
    assert demo.is_right(given, WANTED) is right


@pytest.mark.parametrize(
    ("before", "after", "code"),
    [(0.0, 0.9, 0), (0.1, 0.8, 0), (0.12, 0.9, 1), (0.0, 0.79, 1)],
)
def test_verdict(
    before: float, after: float, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo._verdict(before, after) == code
    assert ("didn't show what it should" in capsys.readouterr().err) is bool(code)


def test_examples_show_a_failure_if_there_is_one() -> None:
    assert demo._examples([False] * 6, [True] * 6) == [0, 1, 2]
    assert demo._examples([False] * 6, [True, False, True, False, True, True]) == [0, 2, 1]
    assert demo._examples([False] * 3, [False] * 3) == [0]


@pytest.mark.slow
def test_demo_learns(tmp_path: Path) -> None:
    """Over what an earlier one left, which it replaces."""
    (tmp_path / "demo" / "run").mkdir(parents=True)
    (tmp_path / "demo" / "run" / "recipe.yaml").touch()
    done = subprocess.run(
        [sys.executable, demo.__file__],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning" not in (done.stdout + done.stderr).lower()
    assert (tmp_path / "demo" / "run" / "adapter" / "adapter_model.safetensors").is_file()
