"""From a model's name to its store: the small models are built, hub names downloaded, and both
converted."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lamina.errors import CheckpointError, StoreError
from lamina.models import load_family
from lamina.models.mini import MINI_MODEL_TYPES, MINI_NAMES, ensure_mini, mini_path
from lamina.recipe.places import store_folder
from lamina.recipe.schema import Recipe
from lamina.store.checkpoint import Checkpoint
from lamina.store.convert import convert
from lamina.store.layout import MANIFEST, Store

if TYPE_CHECKING:
    from lamina.store.hub import Hub

#: Bytes done, bytes in all, and what is being done.
Progress = Callable[[int, int, str], None]


def prepare(
    model: str,
    *,
    codec: str = "nf4",
    store: Path | None = None,
    discard_source: bool = False,
    progress: Progress | None = None,
) -> Store:
    """Convert a model to a store, or open the store if that has been done. An interrupted
    preparation goes on where it ended.

    A model on the hub is downloaded and converted one file at a time.

    Args:
        model: a folder with a checkpoint, a hub name, `mini-mixtral` or `mini-maverick`.
        codec: `nf4`, `int8` or `bf16`.
        store: its folder; None for the default place.
        discard_source: delete each downloaded file as soon as all that it holds is in the store,
            so that the disk never holds more than the store and one file.

    Raises:
        CheckpointError: the checkpoint can't be found, downloaded or converted.
        StoreError: the folder can't take the store, or holds another.
    """
    out = store_folder(model, codec, store)
    if discard_source and (model in MINI_NAMES or Path(model).expanduser().is_dir()):
        raise CheckpointError(
            f"{model} isn't downloaded from the hub, so no source is discarded",
            hint="Leave out --discard-source.",
        )
    here = _local_checkpoint(model, progress)
    if here is not None:
        return _convert(Checkpoint.open(here), here, out, codec, progress)
    return _prepare_from_hub(model, codec, out, discard_source, progress)


def _prepare_from_hub(
    model: str, codec: str, out: Path, discard: bool, progress: Progress | None
) -> Store:
    from lamina.store.hub import Hub, cached_checkpoint, finished_store

    if (store := finished_store(model, out, codec)) is not None:
        return store
    try:
        hub = Hub(model, out, discard=discard)
    except CheckpointError:
        # Without a connection, what was downloaded before will do.
        if (here := cached_checkpoint(model, out)) is None:
            raise
        return _convert(Checkpoint.open(here), here, out, codec, progress)
    load_family(_read_config(hub.folder))  # before any header: an unknown family is out
    store = _convert(hub.checkpoint(), hub.folder, out, codec, progress, hub)
    hub.close()
    return store


def _convert(
    source: Checkpoint,
    folder: Path,
    out: Path,
    codec: str,
    progress: Progress | None,
    hub: Hub | None = None,
) -> Store:
    config = _read_config(folder)
    family = load_family(config)
    return convert(
        source,
        out,
        model_type=config["model_type"],
        config=config,
        blocks=family.blocks,
        codec=codec,
        prefixes=family.checkpoint_prefixes,
        progress=progress,
        supplier=hub,
        origin=hub.origin if hub is not None else None,
    )


def open_store(recipe: Recipe, progress: Progress | None = None) -> Store:
    """The store that a recipe names. The small models prepare themselves at first use.

    Raises:
        StoreError: there is none yet, it is damaged, or it holds another model.
    """
    path = store_folder(recipe.model, recipe.codec, recipe.store)
    if not (path / MANIFEST).exists():
        if recipe.model in MINI_NAMES:
            return prepare(recipe.model, codec=recipe.codec, store=path, progress=progress)
        where = f" --store {path}" if recipe.store else ""
        raise StoreError(
            f"{recipe.model} isn't prepared: there is no store in {path}",
            hint=f"lamina prepare {recipe.model} --codec {recipe.codec}{where}",
        )
    store = Store.open(path)
    _check_same(recipe, store)
    return store


#: What a config says that doesn't make another model.
_NO_DIFFERENCE = (
    "transformers_version",
    "dtype",
    "torch_dtype",
    "_name_or_path",
    "quantization_config",
)


def _check_same(recipe: Recipe, store: Store) -> None:
    problems = []
    if store.codec != recipe.codec:
        problems.append(f"it holds {store.codec}, and the recipe says codec {recipe.codec}")
    theirs = _known_config(recipe.model)
    if theirs is not None:
        # Of a small model that isn't built only its type is known.
        keys = sorted(theirs if len(theirs) == 1 else theirs.keys() | store.config.keys())
        if theirs.get("model_type") != store.config.get("model_type"):
            keys = ["model_type"]  # the rest follows from that
        problems += [
            f"it holds a model with {key} {_short(store.config.get(key))}; "
            f"{recipe.model} has {_short(theirs.get(key))}"
            for key in keys
            if key not in _NO_DIFFERENCE and theirs.get(key) != store.config.get(key)
        ]
    if problems:
        raise StoreError(
            f"the store in {store.path} isn't that of {recipe.model}",
            problems=problems[:8],
            hint="Give the store of this model (store=...), or prepare it into another folder.",
        )


def _known_config(model: str) -> dict[str, Any] | None:
    """As much of a model's config.json as this machine has, without building or downloading it."""
    from huggingface_hub import try_to_load_from_cache

    folder = mini_path(model) if model in MINI_NAMES else Path(model).expanduser()
    if (folder / "config.json").is_file():
        return _read_config(folder)
    if model in MINI_NAMES:
        return {"model_type": MINI_MODEL_TYPES[model]}
    cached = try_to_load_from_cache(model, "config.json") if model.count("/") == 1 else None
    return _read_config(Path(cached).parent) if isinstance(cached, str) else None


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _local_checkpoint(model: str, progress: Progress | None) -> Path | None:
    """The folder of a model that is here, or None if it must be on the hub.

    Raises:
        CheckpointError: it can't be there either.
    """
    if model in MINI_NAMES:
        return ensure_mini(model, progress=_named(progress, f"building {model}"))
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise CheckpointError(
            f"{model}: there is no such folder, and it isn't the name of a model on the hub",
            hint="Give a folder with a checkpoint, a name like owner/model, or one of "
            f"{', '.join(MINI_NAMES)}.",
        )
    return None


def _named(progress: Progress | None, what: str) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(done, total, what)


def _read_config(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / "config.json"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise CheckpointError(
            f"{path} can't be read: {error.strerror}",
            hint="A checkpoint is a folder with config.json and *.safetensors, as transformers "
            "writes it.",
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{path} isn't JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} isn't a JSON object")
    return config
