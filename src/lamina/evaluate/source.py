"""What can be evaluated: a run, a store, or a model by its name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lamina.engine.model import Model, open_model
from lamina.engine.prepare import Progress
from lamina.engine.run import RunFolder
from lamina.lora.adapter import Adapter
from lamina.recipe.schema import Recipe
from lamina.store.layout import MANIFEST, Store


@dataclass(frozen=True)
class Tuned:
    """A model, and the adapter that was tuned on it, if any."""

    model: Model
    adapter: Adapter | None


def open_tuned(
    run_or_model: str | Path, *, adapter: bool = True, progress: Progress | None = None
) -> Tuned:
    """Open a run's folder (the model and its adapter), a store's folder, or a model by its name.

    Args:
        adapter: False leaves a run's adapter out.

    Raises:
        LaminaError: it can't be opened.
    """
    path = Path(run_or_model).expanduser()
    run = RunFolder(path)
    if run.recipe_file.is_file():
        model = open_model(run.load_recipe(), progress)
        run.check_store(model.store)
        loaded = None
        if adapter:
            loaded = Adapter.load(model.family, run.adapter, device=model.device)
        return Tuned(model, loaded)
    if (path / MANIFEST).is_file():
        codec = Store.open(path).codec
        recipe = Recipe.model_validate({"model": str(path), "store": str(path), "codec": codec})
        return Tuned(open_model(recipe, progress), None)
    recipe = Recipe.model_validate({"model": str(run_or_model)})
    return Tuned(open_model(recipe, progress), None)
