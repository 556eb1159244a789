"""The import direction of docs/design.md holds, inside functions too, and what must start fast
imports nothing heavy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "lamina"

LIGHT = ("errors", "recipe", "telemetry", "cli")
HEAVY = {
    "accelerate",
    "bitsandbytes",
    "huggingface_hub",
    "numpy",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "triton",
}


@dataclass(frozen=True)
class Import:
    """One imported name, by whom and where."""

    file: str
    line: int
    name: str
    at_import_time: bool

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.name}"


def imports(source: str, file: str) -> Iterator[Import]:
    """All imports of a file. `from a import b` counts as `a.b`, since b may be a module."""

    def visit(node: ast.AST, at_import_time: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(file, node.lineno, alias.name, at_import_time)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            for alias in node.names:
                yield Import(file, node.lineno, f"{node.module}.{alias.name}", at_import_time)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for child in node.body:
                yield from visit(child, False)
            for child in node.orelse:
                yield from visit(child, at_import_time)
        else:
            inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            for child in ast.iter_child_nodes(node):
                yield from visit(child, at_import_time and not inside)

    yield from visit(ast.parse(source), True)


def all_imports() -> list[Import]:
    return [
        found
        for path in sorted(SOURCE.rglob("*.py"))
        for found in imports(path.read_text(encoding="utf-8"), str(path.relative_to(SOURCE)))
    ]


def package(file: str) -> str:
    """`engine/step.py` -> engine, `errors.py` -> errors."""
    return Path(file).parts[0].removesuffix(".py")


def ranks() -> dict[str, int]:
    """Each package's place in the order that the design gives."""
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    order = re.search(r"`(errors <-[^`]+)`", text)
    assert order, "docs/design.md no longer gives the order"
    return {
        name.strip(): rank
        for rank, group in enumerate(order[1].split("<-"))
        for name in group.split(",")
    }


def violations(found: list[Import], order: dict[str, int]) -> list[str]:
    wrong = []
    for item in found:
        importer = package(item.file)
        if importer in ("__init__", "__main__"):  # the public face: it may know everybody
            continue
        parts = item.name.split(".")
        if parts[0] != "lamina":
            continue
        if item.name == "lamina.__version__":  # there before anything else of ours is
            continue
        imported = parts[1]
        if imported not in order:
            wrong.append(f"{item}, which is the public face or nothing of ours")
        elif imported != importer and order[imported] >= order[importer]:
            wrong.append(f"{item}, which isn't to the left of {importer}")
    return wrong


def test_the_design_places_every_package() -> None:
    there = {package(str(path.relative_to(SOURCE))) for path in SOURCE.rglob("*.py")} - {
        "__init__",
        "__main__",
    }

    assert there <= set(ranks())


def test_imports_point_left() -> None:
    assert violations(all_imports(), ranks()) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("store/reader.py", "import lamina.engine.step"),
        ("store/reader.py", "from lamina.engine import step"),
        ("recipe/load.py", "from lamina.telemetry.events import Event"),
        ("telemetry/events.py", "def f():\n    from lamina.recipe.load import load_recipe"),
        ("engine/step.py", "from lamina import tune"),
        ("errors.py", "import lamina.recipe"),
        ("models/spec.py", "if TYPE_CHECKING:\n    from lamina.store.layout import Store"),
        ("kernels/nf4.py", "from lamina.store.codec import NF4_CODE"),
        ("kernels/products.py", "from lamina.models.spec import Linear"),
    ],
)
def test_a_wrong_direction_is_seen(file: str, line: str) -> None:
    assert len(violations(list(imports(line, file)), ranks())) == 1


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("store/convert.py", "from lamina.models.spec import Block"),
        ("lora/experts.py", "from lamina.kernels.products import linear"),
        ("cli/tune.py", "def f():\n    from lamina.engine.loop import tune"),
        ("cli/main.py", "from lamina import __version__"),
        ("__init__.py", "from lamina.engine.loop import tune"),
        ("engine/step.py", "import torch\nfrom lamina.engine.blocks import x"),
    ],
)
def test_a_right_direction_is_let_through(file: str, line: str) -> None:
    assert violations(list(imports(line, file)), ranks()) == []


def test_light_packages_import_nothing_heavy() -> None:
    wrong = [
        str(found)
        for found in all_imports()
        if package(found.file) in (*LIGHT, "__init__", "__main__")
        and found.at_import_time
        and found.name.split(".")[0] in HEAVY
    ]

    assert wrong == []


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("lamina", {"pydantic", "rich", "typer", "yaml"} | HEAVY),
        ("lamina.cli.main", {"pydantic", "yaml"} | HEAVY),
        ("lamina.recipe.load", HEAVY),
        ("lamina.telemetry.events", {"pydantic", "yaml"} | HEAVY),
    ],
)
def test_what_an_import_brings_along(module: str, unwanted: set[str]) -> None:
    """Holds what the imports of imports do, too."""
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()

    assert unwanted & set(loaded) == set()
    assert "lamina" in loaded


def test_nobody_pickles_or_trusts_remote_code() -> None:
    for path in SOURCE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "trust_remote_code=True" not in text, path
        assert not re.search(r"^\s*(import|from) pickle\b|\btorch\.load\(", text, re.M), path
