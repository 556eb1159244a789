"""Recipes from files and from the library, with `key=value` overrides; all mistakes at once.

A recipe file is YAML and holds only what differs from the defaults. Its scalars are read as YAML
1.2 does: `1e-5` is a number (PyYAML's own reading makes it a string), `010` isn't 8, and `no` isn't
false.
"""

from __future__ import annotations

import difflib
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from lamina.errors import RecipeError
from lamina.recipe.schema import Recipe, choices, conflicts

__all__ = [
    "RecipeInfo",
    "copy_recipe",
    "explain_recipe",
    "list_recipes",
    "load_recipe",
    "recipe_names",
    "recipe_text",
    "save_recipe",
]

_LIBRARY = Path(__file__).parent / "library"

#: What other tools call our keys.
_FAMILIAR = {
    "alpha": "lora_alpha",
    "base_model": "model",
    "batch_size": "tokens_per_step",
    "cutoff_len": "max_length",
    "dropout": "lora_dropout",
    "gradient_accumulation_steps": "tokens_per_step",
    "lora_r": "r",
    "lora_rank": "r",
    "lora_target": "target_modules",
    "lora_target_modules": "target_modules",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "max_seq_len": "max_length",
    "max_seq_length": "max_length",
    "micro_batch_size": "tokens_per_step",
    "model_name_or_path": "model",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "optimizer": "optim",
    "per_device_train_batch_size": "tokens_per_step",
    "rank": "r",
    "sequence_len": "max_length",
    "steps": "max_steps",
}


class _Loader(yaml.SafeLoader):
    """YAML 1.2's core schema, with underscores in numbers."""


_Loader.yaml_implicit_resolvers = {}  # not the base's, which others use
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*(?:[eE][-+]?[0-9]+)?|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?"
        r"|[0-9][0-9_]*[eE][-+]?[0-9]+|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        list("-+0123456789."),
    ),
):
    _Loader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _first
    )

#: What reading somebody's YAML may raise: PyYAML lets some mistakes through as they come.
_YAML_ERRORS = (yaml.YAMLError, ValueError, RecursionError)


@dataclass(frozen=True)
class _Given:
    """A value that a file or an override gives, and where."""

    value: Any
    place: str


@dataclass(frozen=True)
class RecipeInfo:
    """A line of `lamina recipes ls`."""

    name: str
    status: str
    model: str
    description: str


def recipe_names() -> list[str]:
    """The names of the library's recipes, sorted."""
    return sorted(path.stem for path in _LIBRARY.glob("*.yaml"))


def list_recipes() -> list[RecipeInfo]:
    """The library's recipes, sorted by name."""
    recipes = ((name, load_recipe(name)) for name in recipe_names())
    return [RecipeInfo(name, r.status, r.model, r.description) for name, r in recipes]


def recipe_text(name: str) -> str:
    """A library recipe as it was written: short, with comments.

    Raises:
        RecipeError: there is none of that name.
    """
    return _library_file(name).read_text(encoding="utf-8")


def copy_recipe(name: str, target: Path) -> None:
    """Write a library recipe to a file, which must not exist, for its owner to change.

    Raises:
        RecipeError: there is none of that name, or the file exists or can't be written.
    """
    text = recipe_text(name)
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise RecipeError(
            f"{target}: exists, and nothing is written over it",
            hint="Give another file, or remove this one.",
        ) from None
    except OSError as error:
        raise RecipeError(f"{target}: can't be written: {error.strerror}") from error


def load_recipe(
    name_or_path: str | os.PathLike[str], overrides: Sequence[str] | Mapping[str, Any] = ()
) -> Recipe:
    """A recipe of the library, or of a file, with some of its keys overridden.

    Args:
        name_or_path: the name of a library recipe, or a YAML file.
        overrides: `key=value` strings, whose values are read as YAML, or a mapping of keys to
            values.

    Raises:
        RecipeError: there is no such recipe, or its keys, its values or the overrides are wrong;
            all mistakes are named at once.
    """
    problems: list[str] = []
    path = _recipe_file(name_or_path)
    given = _read_file(path, problems)
    unreadable = bool(problems) and not given
    if isinstance(overrides, Mapping):
        given |= {str(key): _Given(value, "override") for key, value in overrides.items()}
    else:
        given |= _read_overrides(overrides, problems)
    unknown = [key for key in given if key not in Recipe.model_fields]
    problems += [_unknown_key(key, given[key]) for key in unknown]
    values = {key: entry.value for key, entry in given.items() if key not in unknown}

    recipe: Recipe | None = None
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        wrong = {str(e["loc"][0]): e for e in reversed(error.errors()) if e["loc"]}
        if unreadable and "model" not in values:
            del wrong["model"]  # it may well be in the file
        problems += [_wrong_value(key, given.get(key), wrong[key]) for key in reversed(wrong)]
        problems += conflicts(_defaults() | values, skip=wrong)
    if problems or recipe is None:
        name = os.fspath(name_or_path)
        raise RecipeError(
            f"recipe {name}: {_count(len(problems), 'mistake')}",
            problems=problems,
            hint="`lamina recipes show mini-mixtral` explains every key.",
        )
    return recipe


def save_recipe(recipe: Recipe, path: Path) -> None:
    """Write all keys of a recipe, so that `load_recipe(path)` gives the same one.

    Raises:
        OSError: the file can't be written.
    """
    path.write_text(
        yaml.safe_dump(recipe.model_dump(), sort_keys=False, allow_unicode=True), encoding="utf-8"
    )


def explain_recipe(recipe: Recipe) -> str:
    """All keys of a recipe as YAML, each with its help text, and its default where it differs."""
    parts = []
    for key, field in Recipe.model_fields.items():
        value = getattr(recipe, key)
        text = field.description or ""
        if not field.is_required() and value != field.default:
            text += f" (default: {_scalar(field.default)})"
        comment = textwrap.fill(text, 96, initial_indent="# ", subsequent_indent="#   ")
        parts.append(f"{comment}\n{key}: {_scalar(value)}\n")
    return "\n".join(parts)


def _scalar(value: object) -> str:
    """A value as YAML, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def _recipe_file(name_or_path: str | os.PathLike[str]) -> Path:
    """The file of a recipe; what looks like a path is one."""
    text = os.fspath(name_or_path)
    path = Path(text).expanduser()
    if isinstance(name_or_path, str) and text in recipe_names():
        return _library_file(text)
    if path.is_file():
        return path
    if path.is_dir():
        inside = path / "recipe.yaml"
        raise RecipeError(
            f"recipe {text}: is a folder",
            hint=f"Give its {inside}." if inside.is_file() else "Give a YAML file.",
        )
    if not isinstance(name_or_path, str) or os.sep in text or path.suffix in (".yaml", ".yml"):
        close = difflib.get_close_matches(path.name, _siblings(path), n=1)
        raise RecipeError(
            f"recipe {text}: there is no such file",
            hint=f"Did you mean {path.parent / close[0]}?" if close else None,
        )
    return _library_file(text)


def _siblings(path: Path) -> list[str]:
    try:
        return [entry.name for entry in path.parent.iterdir() if entry.is_file()]
    except OSError:
        return []


def _library_file(name: str) -> Path:
    names = recipe_names()
    if name not in names:
        close = _closest(name, names)
        raise RecipeError(
            f"recipe {name}: there is none of that name, and no such file",
            hint=(f"Did you mean {close}? " if close else "") + f"There are: {', '.join(names)}.",
        )
    return _LIBRARY / f"{name}.yaml"


def _read_file(path: Path, problems: list[str]) -> dict[str, _Given]:
    """The keys of a recipe file, unchecked."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it isn't UTF-8 text"
        raise RecipeError(f"recipe {path}: can't be read: {reason}") from error
    try:
        loader = _Loader(text)
        root = loader.get_single_node()
    except _YAML_ERRORS as error:
        problems.append(f"{path.name}{_mark(error)}: not YAML: {_reason(error)}")
        return {}
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        problems.append(f"{path.name}: must be lines of `key: value`")
        return {}
    given: dict[str, _Given] = {}
    for key_node, value_node in root.value:
        place = f"{path.name}, line {key_node.start_mark.line + 1}"
        try:
            key = str(loader.construct_object(key_node, deep=True))
            value = loader.construct_object(value_node, deep=True)
        except _YAML_ERRORS as error:
            problems.append(f"{place}: {_reason(error)}")
            continue
        if key in given:
            problems.append(f"`{key}` ({place}) is there twice: first at {given[key].place}")
        given[key] = _Given(value, place)
    return given


def _read_overrides(overrides: Iterable[str], problems: list[str]) -> dict[str, _Given]:
    """The keys of `key=value` strings, unchecked; the last of several for one key counts."""
    if isinstance(overrides, str):
        overrides = [overrides]
    given = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals or not key:
            problems.append(f"`{override}`: an override looks like key=value")
            continue
        try:
            value = yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain values only
        except _YAML_ERRORS as error:
            problems.append(f"`{override}`: the value isn't YAML: {_reason(error)}")
            continue
        given[key] = _Given(value, "override")
    return given


def _unknown_key(key: str, given: _Given) -> str:
    close = _FAMILIAR.get(key.lower()) or _closest(key, Recipe.model_fields)
    return f"`{key}` ({given.place}): there is no such key" + (
        f"; did you mean `{close}`?" if close else ""
    )


def _wrong_value(key: str, given: _Given | None, error: Any) -> str:
    """One sentence on a value that the schema refuses."""
    if given is None:
        return f"`{key}` is missing. {Recipe.model_fields[key].description}"
    reason = _REASONS.get(error["type"], error["msg"]).format(**error.get("ctx", {}))
    reason = reason.removeprefix("Value error, ")
    if error["type"] == "literal_error":
        *others, last = choices(key)
        reason = f"must be {', '.join(others)} or {last}"
        close = _closest(str(given.value), [*others, last])
        if close:
            reason += f"; did you mean {close}?"
    return f"`{key}` ({given.place}) is {_scalar_or_repr(given.value)}: {reason}"


_REASONS = {
    "bool_type": "must be true or false",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "greater_than": "must be more than {gt:g}",
    "greater_than_equal": "must be {ge:g} or more",
    "int_from_float": "must be a whole number",
    "int_type": "must be a whole number",
    "less_than": "must be less than {lt:g}",
    "string_too_short": "must not be empty",
    "string_type": "must be text",
}


def _scalar_or_repr(value: object) -> str:
    try:
        text = _scalar(value)
    except yaml.YAMLError:
        text = repr(value)
    return textwrap.shorten(text, 60, placeholder=" ...")


def _closest(word: str, choices: Iterable[str]) -> str | None:
    found = difflib.get_close_matches(word.lower(), list(choices), n=1, cutoff=0.6)
    return found[0] if found else None


def _defaults() -> dict[str, Any]:
    return {key: field.default for key, field in Recipe.model_fields.items()}


def _mark(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f", line {mark.line + 1}" if mark else ""


def _reason(error: Exception) -> str:
    return str(getattr(error, "problem", None) or error).splitlines()[0]


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
