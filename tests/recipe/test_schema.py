"""Sizes, and the places that a recipe leaves open."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from lamina.recipe.places import home, store_folder
from lamina.recipe.schema import Recipe, choices, size_in_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("4096B", 4096),
        ("512MiB", 512 * 2**20),
        ("512 mib", 512 * 2**20),
        ("1.5GB", 1_500_000_000),
        ("25%", 250),
        ("150 %", 1500),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert size_in_bytes(text, whole=1000) == size


@pytest.mark.parametrize("text", ["", "big", "-1", "1e3", "1 parsec", "%", "1%%", "1 2"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        size_in_bytes(text, whole=1000)


def test_a_percentage_needs_a_whole() -> None:
    with pytest.raises(ValueError, match="is a percentage"):
        size_in_bytes("25%")


def test_a_recipe_is_immutable_and_strict() -> None:
    recipe = Recipe(model="m")

    with pytest.raises(ValidationError):
        recipe.r = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Recipe(model="m", rank=3)  # type: ignore[call-arg]
    with pytest.raises(ValidationError, match="can't hold one sequence"):
        Recipe(model="m", tokens_per_step=8, max_length=9)


def test_choices() -> None:
    assert choices("codec") == ("nf4", "int8", "bf16")


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_HOME", "~/weights")
    assert home() == Path.home() / "weights"
    monkeypatch.setenv("LAMINA_HOME", "")
    assert home() == Path.home() / ".cache" / "lamina"


def test_a_store_is_named_after_model_and_codec(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LAMINA_HOME", str(tmp_path))
    stores = tmp_path / "stores"

    assert store_folder("mini-mixtral", "nf4") == stores / "mini-mixtral-nf4"
    assert store_folder("org/Model-1.0", "bf16") == stores / "org--Model-1.0-bf16"
    assert store_folder("org/Model-1.0", "bf16", "/a/b") == Path("/a/b")


def test_two_local_models_of_one_name_have_two_stores(tmp_path: Path) -> None:
    (tmp_path / "a" / "model").mkdir(parents=True)
    (tmp_path / "b" / "model").mkdir(parents=True)

    first, second = (store_folder(str(tmp_path / x / "model"), "nf4") for x in "ab")

    assert first != second
    assert first == store_folder(f"{tmp_path}/b/../a/model/", "nf4")
    assert first.name.startswith("model-")
