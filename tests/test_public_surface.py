"""What others rely on: the names of the package, the commands and their flags, the recipe's keys.

A change here is a change of the interface: make it on purpose.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

import lamina
from lamina.cli.main import app
from lamina.recipe.schema import Recipe

NAMES = [
    "AdapterError",
    "CheckpointError",
    "Completion",
    "DataError",
    "EvalEvent",
    "Event",
    "Generator",
    "LaminaError",
    "Recipe",
    "RecipeError",
    "RunSummary",
    "Score",
    "StartEvent",
    "StepEvent",
    "Store",
    "StoreError",
    "TrainingError",
    "UsageError",
    "__version__",
    "generate",
    "list_recipes",
    "load_recipe",
    "prepare",
    "read_events",
    "score",
    "tune",
]

COMMANDS = {
    "": ["--help", "--install-completion", "--show-completion", "--version", "-h"],
    "chat": [
        "--adapter",
        "--help",
        "--max-new-tokens",
        "--no-adapter",
        "--seed",
        "--system",
        "--temperature",
        "--top-p",
        "-h",
        "RUN",
    ],
    "data": ["--help", "-h"],
    "data check": [
        "--eval-data",
        "--fix",
        "--force",
        "--format",
        "--help",
        "--json",
        "--map",
        "--mask",
        "--max-length",
        "--model",
        "--near",
        "--no-near",
        "--out",
        "--pii",
        "--recipe",
        "--text-rows",
        "-h",
        "FILE",
    ],
    "data convert": [
        "--force",
        "--format",
        "--help",
        "--json",
        "--map",
        "--out",
        "--text-rows",
        "--to",
        "-h",
        "FILE",
    ],
    "data dedup": [
        "--force",
        "--format",
        "--help",
        "--json",
        "--map",
        "--near",
        "--out",
        "--text-rows",
        "--threshold",
        "-h",
        "FILE",
    ],
    "data detect": ["--format", "--help", "--json", "--map", "--text-rows", "-h", "FILE"],
    "data preview": [
        "--force",
        "--format",
        "--help",
        "--html",
        "--ids",
        "--json",
        "--map",
        "--mask",
        "--model",
        "--recipe",
        "--rows",
        "--start",
        "--text-rows",
        "-h",
        "FILE",
    ],
    "data split": [
        "--count",
        "--force",
        "--format",
        "--fraction",
        "--group-by",
        "--held-out",
        "--help",
        "--json",
        "--map",
        "--near",
        "--no-near",
        "--out",
        "--seed",
        "--stratify-by",
        "--text-rows",
        "-h",
        "FILE",
    ],
    "data stats": [
        "--format",
        "--help",
        "--json",
        "--map",
        "--mask",
        "--max-length",
        "--model",
        "--recipe",
        "--text-rows",
        "--too-long",
        "-h",
        "FILE",
    ],
    "doctor": ["--help", "--json", "-h"],
    "eval": ["--adapter", "--data", "--help", "--json", "--no-adapter", "-h", "RUN"],
    "generate": [
        "--adapter",
        "--help",
        "--json",
        "--max-new-tokens",
        "--no-adapter",
        "--seed",
        "--system",
        "--temperature",
        "--top-p",
        "-h",
        "PROMPT",
        "RUN",
    ],
    "plan": [
        "--data",
        "--disk-gbps",
        "--gpu",
        "--help",
        "--json",
        "--price-hour",
        "--price-kwh",
        "--ram",
        "--vram",
        "--watts",
        "-h",
        "KEY=VALUE",
        "RECIPE",
    ],
    "prepare": ["--codec", "--discard-source", "--help", "--store", "-h", "MODEL"],
    "recipes": ["--help", "-h"],
    "recipes copy": ["--help", "-h", "FILE", "NAME"],
    "recipes ls": ["--help", "--json", "-h"],
    "recipes show": ["--help", "--json", "-h", "NAME"],
    "store": ["--help", "-h"],
    "store show": ["--help", "--json", "-h", "STORE"],
    "store verify": ["--help", "-h", "STORE"],
    "tune": [
        "--data",
        "--eval-data",
        "--help",
        "--json",
        "--out",
        "-h",
        "KEY=VALUE",
        "RECIPE",
    ],
}

KEYS = [
    "description",
    "status",
    "model",
    "store",
    "codec",
    "dtype",
    "r",
    "lora_alpha",
    "lora_dropout",
    "use_rslora",
    "target_modules",
    "train_router",
    "router_aux_loss_coef",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "warmup_ratio",
    "weight_decay",
    "optim",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "tokens_per_step",
    "max_steps",
    "epochs",
    "max_length",
    "seed",
    "group_tokens",
    "ram",
    "vram",
    "float8_boundaries",
    "logits",
    "ring",
    "cache",
    "resident",
    "mask",
    "too_long",
    "data_format",
    "data_columns",
    "text_rows",
    "data",
    "eval_data",
]


def surface(command: Any, name: str = "", parent: Any = None) -> dict[str, list[str]]:
    """Every command with its flags and arguments."""
    context = command.make_context(name, [], parent=parent, resilient_parsing=True)
    found = {
        name: sorted(
            word
            for parameter in command.get_params(context)
            for word in (
                [*parameter.opts, *parameter.secondary_opts]
                if parameter.param_type_name == "option"
                else [parameter.metavar]
            )
        )
    }
    for child_name, child in getattr(command, "commands", {}).items():
        found |= surface(child, f"{name} {child_name}".strip(), context)
    return found


def test_names() -> None:
    assert lamina.__all__ == NAMES
    for name in NAMES:
        assert getattr(lamina, name) is not None
        assert name in dir(lamina)


def test_names_stay_themselves_once_their_modules_are_loaded() -> None:
    """A function named like a package would turn into the package."""
    import lamina.evaluate.generate
    import lamina.evaluate.score

    for name in ("prepare", "score", "tune"):
        assert callable(getattr(lamina, name)), name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'tuna'"):
        lamina.tuna  # noqa: B018


def test_types_and_lazy_names_agree() -> None:
    """What a type checker is told is what is imported."""
    tree = ast.parse(Path(lamina.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }

    assert told == lamina._PLACES
    assert set(told) | {"__version__"} == set(lamina.__all__)


def test_commands_and_flags() -> None:
    assert surface(typer.main.get_command(app)) == COMMANDS


def test_recipe_keys() -> None:
    assert list(Recipe.model_fields) == KEYS


def test_the_version_is_the_packages() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "lamina", "--version"], capture_output=True, text=True, check=True
    )

    assert (out.stdout, out.stderr) == (f"lamina {lamina.__version__}\n", "")
