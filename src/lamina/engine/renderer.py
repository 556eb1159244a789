"""From a model's name to what writes and reads its prompts: tokenizer and chat template.

No weight is opened, so this answers for models that nothing is prepared of, and before anything
heavy is loaded.
"""

from __future__ import annotations

import difflib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from lamina.data.chat.pieces import Mask
from lamina.data.template import Renderer
from lamina.errors import CheckpointError, LaminaError, StoreError
from lamina.recipe.load import load_recipe, recipe_names
from lamina.recipe.places import store_folder
from lamina.recipe.schema import Recipe, choices

if TYPE_CHECKING:
    from lamina.engine.prepare import Progress

__all__ = ["load_renderer", "open_renderer"]


def open_renderer(
    model: Recipe | str, *, mask: Mask | None = None, progress: Progress | None = None
) -> Renderer:
    """The renderer of a model: the one that a run of it uses.

    Args:
        model: a recipe, its name or its file; the folder of a run, a store or a checkpoint; or a
            name on the hub.
        mask: the masking policy; None: what the recipe says, or else `assistant`.
        progress: told how far the building of a small model is.

    Raises:
        LaminaError: there is no such model, or its tokenizer can't be loaded.
    """
    recipe = model if isinstance(model, Recipe) else _recipe(model)
    if mask is None:
        mask = recipe.mask if recipe is not None else "assistant"
    place = _place(recipe if recipe is not None else str(model), progress)
    return load_renderer(place, mask=mask)


def load_renderer(place: Path | str, *, mask: Mask = "assistant") -> Renderer:
    """The renderer of the tokenizer in a folder, or of a name on the hub.

    Raises:
        StoreError: the folder is a store's, and its tokenizer can't be loaded.
        CheckpointError: it is another, or a name, and that can't be.
    """
    from transformers import AutoTokenizer

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Without a word on it, transformers would ask on the terminal whether to run code.
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # transformers, tokenizers and the hub raise errors of many types
        raise _unusable(place, "its tokenizer can't be loaded", error) from error
    return Renderer(tokenizer, stop_ids=_stop_ids(place), mask=mask)


def _stop_ids(place: Path | str) -> tuple[int, ...]:
    """The end tokens that generation_config.json names, if there is one."""
    from transformers import GenerationConfig

    if isinstance(place, Path) and not (place / "generation_config.json").is_file():
        return ()
    try:
        eos = GenerationConfig.from_pretrained(place).eos_token_id
    except Exception as error:  # as above
        if isinstance(place, Path):
            raise _unusable(place, "its generation_config.json can't be read", error) from error
        return ()  # many models on the hub have none
    return tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)


def _unusable(place: Path | str, what: str, error: Exception) -> LaminaError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    message = f"{place}: {what}: {reason}"
    if not isinstance(place, Path):
        return CheckpointError(
            message,
            hint="Check the name and the network. A gated model needs HF_TOKEN, once its licence "
            "is accepted on its page.",
        )

    from lamina.store.layout import MANIFEST

    if (place / MANIFEST).is_file():
        return StoreError(
            message,
            hint="Put the model's tokenizer files into the checkpoint and prepare it again.",
        )
    return CheckpointError(
        message, hint="It needs the files that transformers writes beside a checkpoint."
    )


def _recipe(model: str) -> Recipe | None:
    """The recipe that a text names, as a file, by its name, or by the folder of a run."""
    path = Path(model).expanduser()
    if (path / "recipe.yaml").is_file():
        return load_recipe(path / "recipe.yaml")
    if model in recipe_names() or path.suffix in (".yaml", ".yml"):
        return load_recipe(model)
    return None


def _place(model: Recipe | str, progress: Progress | None) -> Path | str:
    """The folder with a model's tokenizer, or its name on the hub."""
    if isinstance(model, Recipe):
        name = model.model
        stores = [store_folder(name, model.codec, model.store)]
    else:
        name = model
        stores = [store_folder(name, codec) for codec in choices("codec")]
    folder = Path(name).expanduser()
    for place in (folder, *stores) if isinstance(model, str) else (*stores, folder):
        if _has_tokenizer(place):
            return place
    if folder.is_dir():
        raise CheckpointError(
            f"{name}: this folder holds no tokenizer (tokenizer_config.json)",
            hint="It needs the files that transformers writes beside a checkpoint.",
        )

    from lamina.models.mini import MINI_NAMES, ensure_mini

    if name in MINI_NAMES:
        if progress is None:
            return ensure_mini(name)
        tell, what = progress, f"building {name}"
        return ensure_mini(name, progress=lambda done, total: tell(done, total, what))
    if name.count("/") != 1 or name[0] in "./~":
        close = difflib.get_close_matches(name, [*recipe_names(), *_beside(folder)], n=1)
        raise CheckpointError(
            f"{name}: there is no such model{f'; did you mean {close[0]}?' if close else ''}",
            hint="A model is a recipe (`lamina recipes ls`), the folder of a store, a checkpoint "
            "or a run, or a name on the hub.",
        )
    return name


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("tokenizer_config.json", "tokenizer.json"))


def _beside(folder: Path) -> list[str]:
    try:
        return [str(path) for path in folder.parent.iterdir() if path.is_dir()]
    except OSError:
        return []
