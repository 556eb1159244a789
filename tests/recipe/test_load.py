"""Recipes from files, from the library, and with overrides."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import LaminaError, RecipeError
from lamina.recipe.load import (
    copy_recipe,
    explain_recipe,
    list_recipes,
    load_recipe,
    recipe_names,
    recipe_text,
    save_recipe,
)
from lamina.recipe.schema import Recipe


def refused(recipe: str | Path, overrides: object = ()) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, overrides)  # type: ignore[arg-type]
    return caught.value


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", recipe_names())
def test_a_library_recipe_is_short_and_holds_differences_only(name: str) -> None:
    text = recipe_text(name)
    recipe = load_recipe(name)
    keys = yaml.safe_load(text)

    assert text.startswith("# For ")
    assert len(text.splitlines()) <= 12
    assert ("untried" in recipe.description) == (recipe.status == "untried")
    assert {"description", "status", "model"} <= set(keys)
    for key in set(keys) - {"description", "status", "model"}:
        assert getattr(recipe, key) != Recipe.model_fields[key].default, key


def test_the_library() -> None:
    listed = {info.name: info for info in list_recipes()}

    assert list(listed) == [
        "maverick-24gb",
        "mini-maverick",
        "mini-mixtral",
        "mixtral-8x22b-24gb",
        "mixtral-8x7b-12gb",
        "scout-24gb",
    ]
    assert {n for n, info in listed.items() if info.status == "tested"} == {
        "mini-maverick",
        "mini-mixtral",
    }
    assert listed["maverick-24gb"].model == "meta-llama/Llama-4-Maverick-17B-128E-Instruct"


def test_values_of_overrides_are_read_as_yaml() -> None:
    recipe = load_recipe(
        "mini-mixtral",
        [
            "learning_rate=1e-5",
            "max_steps=1_000",
            "use_rslora=true",
            "target_modules=[q_proj, experts.down_proj]",
            "max_grad_norm=.inf",
            "warmup_steps=null",
            "weight_decay=0",
            "ring=1048576",
            "data=chats.jsonl",
            "description=no",
        ],
    )

    assert recipe.learning_rate == 1e-5
    assert recipe.max_steps == 1000
    assert recipe.use_rslora is True
    assert recipe.target_modules == ["q_proj", "experts.down_proj"]
    assert recipe.max_grad_norm == float("inf")
    assert recipe.warmup_steps is None
    assert recipe.weight_decay == 0.0
    assert recipe.ring == "1048576"
    assert recipe.data == ["chats.jsonl"]
    assert recipe.description == "no"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("all-linear", "all-linear"),
        ("q_proj", "q_proj"),
        ("q_proj,v_proj", ["q_proj", "v_proj"]),
        ("[q_proj]", ["q_proj"]),
    ],
)
def test_target_modules_are_one_name_or_several(text: str, value: object) -> None:
    assert load_recipe("mini-mixtral", [f"target_modules={text}"]).target_modules == value


def test_a_mapping_overrides_too() -> None:
    recipe = load_recipe("mini-mixtral", {"r": 4, "store": Path("here"), "data": [Path("a")]})

    assert (recipe.r, recipe.store, recipe.data) == (4, "here", ["a"])


def test_the_last_override_of_a_key_counts() -> None:
    assert load_recipe("mini-mixtral", ["r=2", "r=4"]).r == 4


def test_all_mistakes_are_named_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "model: mini-mixtral\n"
        "lerning_rate: 1e-5\n"
        "codec: nf5\n"
        "r: 1.5\n"
        "seed: 1\n"
        "seed: 2\n"
        "ring: 12 parsecs\n"
        "max_length: 99999\n",
    )

    error = refused(path, ["rank=3", "oops", "optim=adam", "use_rslora=yes", "target_modules=[]"])

    expected = [
        "`seed` (mine.yaml, line 6) is there twice: first at mine.yaml, line 5",
        "`oops`: an override looks like key=value",
        "`lerning_rate` (mine.yaml, line 2): there is no such key; did you mean `learning_rate`?",
        "`rank` (override): there is no such key; did you mean `r`?",
        "`codec` (mine.yaml, line 3) is nf5: must be nf4, int8 or bf16; did you mean nf4?",
        "`r` (mine.yaml, line 4) is 1.5: must be a whole number",
        "`use_rslora` (override) is 'yes': must be true or false",
        "`target_modules` (override) is []: names no module, so there would be nothing to train",
        "`optim` (override) is adam: must be adamw_8bit, adamw_4bit or adamw; did you mean adamw?",
        "`ring` (mine.yaml, line 7) is 12 parsecs: must be a size such as 512MiB, 4GB or 25%",
        "`tokens_per_step` is 16384, which can't hold one sequence of `max_length` 99999",
    ]
    assert list(error.problems) == expected
    assert error.message.endswith("11 mistakes")
    assert error.exit_code == 1


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["lora_dropout=1"], "must be less than 1"),
        (["lora_dropout=-0.1"], "must be 0 or more"),
        (["r=0"], "must be more than 0"),
        (["r=true"], "must be a whole number"),
        (["r=8.0"], "must be a whole number"),
        (["learning_rate=.nan"], "must be a finite number"),
        (["learning_rate=.inf"], "must be a finite number"),
        (["learning_rate=fast"], "must be a number"),
        (["max_grad_norm=.nan"], "must be more than 0"),
        (["max_grad_norm=0"], "must be more than 0"),
        (["epochs=0"], "must be more than 0"),
        (["seed=010"], "must be a whole number"),
        (["model="], "must be text"),
        (["model=''"], "must not be empty"),
        (["target_modules=3"], "must be the name of a module"),
        (["target_modules='q_proj,'"], "must be the name of a module"),
        (["data=[]"], "names no file"),
        (["data=[1]"], "must be a file, or a list of files"),
        (["resident=some"], "must be auto, or a size"),
        (["cache=-1"], "must be a size"),
        (["r=!!int x"], "the value isn't YAML"),
        (["r=!!python/object/apply:os.system [echo]"], "the value isn't YAML"),
        (["max_steps=5", "warmup_steps=6"], "more than all the 5 steps"),
        (["tokens_per_step=512"], "can't hold one sequence of `max_length` 1024"),
    ],
)
def test_a_wrong_value_is_one_problem(overrides: list[str], problem: str) -> None:
    problems = refused("mini-mixtral", overrides).problems

    assert len(problems) == 1
    assert problem in problems[0]


def test_a_wrong_key_is_not_blamed_for_a_contradiction_too() -> None:
    problems = refused("mini-mixtral", ["tokens_per_step=4k"]).problems

    assert problems == ("`tokens_per_step` (override) is 4k: must be a whole number",)


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    problems = refused(write(tmp_path, "r: 8\n")).problems

    assert len(problems) == 1
    assert problems[0].startswith("`model` is missing.")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: b: c\n", "mine.yaml, line 1: not YAML"),
        ("- r\n", "mine.yaml: must be lines of `key: value`"),
        ("model: [\n", "mine.yaml, line 2: not YAML"),
        ("model: m\nr: !!timestamp 2001-99-99\n", "mine.yaml, line 2: month must be in 1..12"),
        ("[" * 5000, "mine.yaml: not YAML"),
    ],
)
def test_a_file_that_is_not_a_mapping(tmp_path: Path, text: str, problem: str) -> None:
    problems = refused(write(tmp_path, text), ["r=0"]).problems

    assert problem in problems[0]
    assert problems[-1] == "`r` (override) is 0: must be more than 0"
    assert not any("missing" in p for p in problems)


def test_recipes_that_are_not_there(tmp_path: Path) -> None:
    write(tmp_path, "model: m\n")

    assert refused("mini-mistral").hint == (
        "Did you mean mini-mixtral? There are: maverick-24gb, mini-maverick, mini-mixtral, "
        "mixtral-8x22b-24gb, mixtral-8x7b-12gb, scout-24gb."
    )
    assert refused("qwertz").hint == refused("mini-mistral").hint.removeprefix(  # type: ignore
        "Did you mean mini-mixtral? "
    )
    assert refused(tmp_path / "mien.yaml").hint == f"Did you mean {tmp_path / 'mine.yaml'}?"
    assert "there is no such file" in refused("nowhere/x.yaml").message
    assert "is a folder" in refused(tmp_path).message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")

    assert "isn't UTF-8 text" in refused(path).message


def test_copy_does_not_overwrite(tmp_path: Path) -> None:
    target = tmp_path / "mine.yaml"
    copy_recipe("mini-mixtral", target)

    assert target.read_text() == recipe_text("mini-mixtral")
    assert load_recipe(target) == load_recipe("mini-mixtral")
    target.write_text("model: m\n")
    with pytest.raises(RecipeError, match="nothing is written over it"):
        copy_recipe("mini-mixtral", target)
    assert target.read_text() == "model: m\n"
    with pytest.raises(RecipeError, match="can't be written"):
        copy_recipe("mini-mixtral", tmp_path / "nowhere" / "mine.yaml")


@pytest.mark.parametrize("name", recipe_names())
def test_what_is_saved_or_explained_is_the_same_recipe(tmp_path: Path, name: str) -> None:
    recipe = load_recipe(name, ["max_grad_norm=.inf", "learning_rate=3e-7", "data=[ä b.jsonl, c]"])
    save_recipe(recipe, tmp_path / "saved.yaml")

    assert load_recipe(tmp_path / "saved.yaml") == recipe
    assert load_recipe(write(tmp_path, explain_recipe(recipe))) == recipe


def test_explanations_hold_help_and_defaults() -> None:
    text = explain_recipe(load_recipe("mini-mixtral", ["r=8"]))

    assert "# LoRA's rank. (default: 16)\nr: 8\n" in text
    assert "\n# What LoRA adds is multiplied by lora_alpha / r.\nlora_alpha: 32\n" in text
    for key, field in Recipe.model_fields.items():
        assert f"\n{key}: " in f"\n{text}"
        assert field.description
        assert field.description.endswith(".")


@given(st.lists(st.text(max_size=30), max_size=4), st.text(max_size=60))
def test_nothing_that_is_typed_escapes_as_another_error(overrides: list[str], text: str) -> None:
    path = Path(os.environ["LAMINA_HOME"]) / "fuzz.yaml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    for recipe in ("mini-mixtral", path):
        with contextlib.suppress(LaminaError):
            load_recipe(recipe, overrides)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            key: st.none()
            | st.booleans()
            | st.integers()
            | st.floats()
            | st.text()
            | st.lists(st.text() | st.integers(), max_size=2)
            for key in Recipe.model_fields
        },
    )
)
def test_every_refused_key_is_named(overrides: dict[str, object]) -> None:
    try:
        load_recipe("mini-mixtral", overrides)
    except RecipeError as error:
        named = {key for key in Recipe.model_fields for p in error.problems if f"`{key}`" in p}
        assert named <= set(overrides) | {"max_length", "tokens_per_step"}
        assert named
