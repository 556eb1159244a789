"""Whose tokenizer `lamina data` uses, which is the one that training would use."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.cli.data_input import no_such_choice
from lamina.cli.inputs import did_you_mean
from lamina.cli.terminal import byte_progress
from lamina.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from lamina.data.chat.pieces import Mask
    from lamina.data.lengths import TooLong
    from lamina.data.template import Renderer
    from lamina.recipe.schema import Recipe

__all__ = ["choose_mask", "choose_too_long", "open_recipe", "open_renderer"]


def choose_mask(mask: str | None, recipe: Recipe | None) -> Mask:
    """The masking policy that an option or else a recipe says.

    Raises:
        UsageError: there is no such policy.
    """
    from lamina.data.chat.pieces import MASKS

    if mask is None:
        return recipe.mask if recipe is not None else "assistant"
    if mask not in MASKS:
        raise no_such_choice("--mask", mask, [*MASKS])
    return mask  # type: ignore[return-value]


def choose_too_long(policy: str | None, recipe: Recipe | None) -> TooLong:
    """The length policy that an option or else a recipe says.

    Raises:
        UsageError: there is no such policy.
    """
    from lamina.data.lengths import POLICIES

    if policy is None:
        return recipe.too_long if recipe is not None else "drop"
    if policy not in POLICIES:
        raise no_such_choice("--too-long", policy, [*POLICIES])
    return policy  # type: ignore[return-value]


def open_recipe(name: str | None) -> Recipe | None:
    """
    Raises:
        RecipeError: there is no such recipe, or it has mistakes.
    """
    from lamina.recipe.load import load_recipe

    return None if name is None else load_recipe(name)


def open_renderer(model: str | None, recipe: Recipe | None, mask: Mask) -> Renderer:
    """What turns rows into tokens as training does.

    Args:
        model: the value of `--model`, which goes before the recipe's.

    Raises:
        UsageError: neither is given.
        LaminaError: the model's tokenizer can't be had.
    """
    if not model and (model is not None or recipe is None):
        raise UsageError(
            "this needs a model, for its tokenizer and chat template",
            hint="Add --model, for instance --model mini-mixtral, or --recipe NAME.",
        )
    place = _tokenizer_place(model, recipe)

    from lamina.data.template import Renderer

    tokenizer, stop_ids = _load_tokenizer(place)
    return Renderer(tokenizer, stop_ids=stop_ids, mask=mask)


def _tokenizer_place(model: str | None, recipe: Recipe | None) -> Path | str:
    """The folder with a model's tokenizer, or its name on the hub."""
    from lamina.recipe.load import load_recipe, recipe_names
    from lamina.recipe.places import store_folder

    if model is not None:
        path = Path(model).expanduser()
        if (path / "recipe.yaml").is_file():
            recipe = load_recipe(str(path / "recipe.yaml"))
        elif model in recipe_names() or path.suffix in (".yaml", ".yml"):
            recipe = load_recipe(model)
        elif path.is_dir():
            if not _has_tokenizer(path):
                raise CheckpointError(
                    f"{model}: this folder holds no tokenizer (tokenizer_config.json)"
                )
            return path
        else:
            recipe = None
    name = recipe.model if recipe is not None else model
    assert name is not None
    codecs = [recipe.codec] if recipe is not None else ["nf4", "int8", "bf16"]
    stores = [store_folder(name, codec, recipe.store if recipe else None) for codec in codecs]
    for folder in (*stores, Path(name).expanduser()):
        if _has_tokenizer(folder):
            return folder

    from lamina.models.mini import MINI_NAMES, ensure_mini

    if name in MINI_NAMES:
        with byte_progress(f"building {name}") as progress:
            return ensure_mini(name, progress=lambda done, all_: progress(done, all_, "weights"))
    if name.count("/") != 1 or name[0] in "./~":
        close = difflib.get_close_matches(name, recipe_names(), n=1)
        meant = f"; did you mean {close[0]}?" if close else did_you_mean(Path(name).expanduser())
        raise CheckpointError(
            f"{name}: there is no such model{meant}",
            hint="--model takes a recipe (`lamina recipes ls`), the folder of a store, a "
            "checkpoint or a run, or a name on the hub.",
        )
    return name


def _has_tokenizer(folder: Path) -> bool:
    return (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file()


def _load_tokenizer(place: Path | str) -> tuple[Any, tuple[int, ...]]:
    """A tokenizer, and the ids that end generation."""
    from transformers import AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(place)
    except Exception as error:  # transformers, tokenizers and the hub raise errors of many types
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        hint = "It needs the files that transformers writes beside a checkpoint."
        if not isinstance(place, Path):
            hint = (
                "Check the name and the network. A gated model needs HF_TOKEN, once its licence "
                "is accepted on its page."
            )
        raise CheckpointError(f"{place}: its tokenizer can't be loaded: {reason}", hint=hint) from (
            error
        )
    try:
        eos = GenerationConfig.from_pretrained(place).eos_token_id
    except Exception:  # there is none, which many models do without
        eos = None
    return tokenizer, tuple(eos) if isinstance(eos, list) else (eos,) if eos is not None else ()
