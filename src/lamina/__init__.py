"""Lamina: LoRA for mixture-of-experts models that don't fit the memory at hand.

    import lamina

    recipe = lamina.load_recipe("mini-mixtral", ["max_steps=20"])
    summary = lamina.tune(recipe, data=["chats.jsonl"])
    with lamina.Generator(summary.run) as generator:
        ...

Names are imported when they are first used, so `import lamina` itself costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lamina.engine.loop import tune
    from lamina.engine.prepare import prepare
    from lamina.engine.run import RunSummary
    from lamina.errors import (
        AdapterError,
        CheckpointError,
        DataError,
        LaminaError,
        RecipeError,
        StoreError,
        TrainingError,
        UsageError,
    )
    from lamina.evaluate.generate import Completion, Generator, generate
    from lamina.evaluate.score import Score
    from lamina.evaluate.score import evaluate as score
    from lamina.recipe.load import list_recipes, load_recipe
    from lamina.recipe.schema import Recipe
    from lamina.store.layout import Store
    from lamina.telemetry.events import EvalEvent, Event, StartEvent, StepEvent, read_events

__all__ = [
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

__version__ = "0.1.0"

_HOMES = {
    "lamina.engine.loop": ("tune",),
    "lamina.engine.prepare": ("prepare",),
    "lamina.engine.run": ("RunSummary",),
    "lamina.errors": (
        "AdapterError",
        "CheckpointError",
        "DataError",
        "LaminaError",
        "RecipeError",
        "StoreError",
        "TrainingError",
        "UsageError",
    ),
    "lamina.evaluate.generate": ("Completion", "Generator", "generate"),
    "lamina.evaluate.score": ("Score", "evaluate"),
    "lamina.recipe.load": ("list_recipes", "load_recipe"),
    "lamina.recipe.schema": ("Recipe",),
    "lamina.store.layout": ("Store",),
    "lamina.telemetry.events": ("EvalEvent", "Event", "StartEvent", "StepEvent", "read_events"),
}
#: `lamina.evaluate` is a package, so the function of that name is called `score` here.
_RENAMED = {"evaluate": "score"}
_PLACES = {
    _RENAMED.get(name, name): (module, name) for module, names in _HOMES.items() for name in names
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module 'lamina' has no attribute {name!r}")
    module, attribute = _PLACES[name]
    value = getattr(import_module(module), attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
