"""The folder of a run.

recipe.yaml     every key, as it was used
run.json        what the recipe doesn't say: store, data, versions
events.jsonl    one line a step
adapter/        in PEFT's format
summary.json    when the run has ended
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lamina import __version__
from lamina.errors import LaminaError
from lamina.recipe.load import load_recipe, save_recipe
from lamina.recipe.schema import Recipe
from lamina.store.layout import Store


@dataclass(frozen=True)
class RunFolder:
    """Where the parts of a run lie."""

    path: Path

    @property
    def recipe_file(self) -> Path:
        return self.path / "recipe.yaml"

    @property
    def events_file(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def adapter(self) -> Path:
        return self.path / "adapter"

    @property
    def summary_file(self) -> Path:
        return self.path / "summary.json"

    @property
    def info_file(self) -> Path:
        return self.path / "run.json"

    def create(self, recipe: Recipe, store: Store, data: Sequence[str]) -> None:
        """Write what is known before the first step.

        Raises:
            LaminaError: the folder isn't empty, or can't be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if any(self.path.iterdir()):
                raise LaminaError(
                    f"{self.path} isn't empty, and nothing is written over a run",
                    hint="Give another --out, or remove the folder.",
                )
            info = {
                "lamina": __version__,
                "torch": version("torch"),
                "transformers": version("transformers"),
                "store_fingerprint": store.fingerprint,
                "data": list(data),
            }
            self.info_file.write_text(json.dumps(info, indent=2) + "\n")
            save_recipe(recipe, self.recipe_file)
        except OSError as error:
            raise LaminaError(f"{self.path} can't be written: {error.strerror}") from error

    def load_recipe(self) -> Recipe:
        """The run's recipe.

        Raises:
            LaminaError: the folder isn't a run's.
        """
        if not self.recipe_file.is_file():
            raise LaminaError(
                f"{self.path} isn't the folder of a run: it has no recipe.yaml",
                hint="lamina tune writes runs to the folder that --out names, or to runs/.",
            )
        return load_recipe(self.recipe_file)

    def check_store(self, store: Store) -> None:
        """
        Raises:
            LaminaError: the run was made with other weights than the store holds now.
        """
        try:
            fingerprint = json.loads(self.info_file.read_text())["store_fingerprint"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LaminaError(f"{self.info_file} can't be read: {error!r}") from error
        if fingerprint != store.fingerprint:
            raise LaminaError(
                f"{store.path} holds other weights than those that {self.path} was tuned on",
                hint="Prepare the model again as the run's recipe.yaml says (model, codec).",
            )


@dataclass(frozen=True)
class RunSummary:
    """What came of a run.

    Args:
        run: its folder.
        steps: optimizer steps done.
        final_loss: of the last step; None if there was none.
        eval_loss_before, eval_loss_after: over the held-out data, or None without any.
        tokens: that went through the model in training.
        seconds: of training, without what comes before and after it.
        store_bytes_read: in training.
        seconds_waited: in which the arithmetic stood still for want of weights.
        peak_memory_bytes: of the process (CPU) or the device (CUDA).
        planned_memory_bytes: the same as the plan had it.
        dropped_rows: left out because they are too long.
        interrupted: it was ended before its last step.
        shortened_rows: of which a part was trained, because they are too long.
        notes: how rows were understood that could be meant otherwise, as sentences.
    """

    run: Path
    steps: int
    final_loss: float | None
    eval_loss_before: float | None
    eval_loss_after: float | None
    tokens: int
    seconds: float
    store_bytes_read: int
    seconds_waited: float
    peak_memory_bytes: int
    planned_memory_bytes: int
    dropped_rows: int
    interrupted: bool
    shortened_rows: int = 0
    notes: tuple[str, ...] = ()

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self) | {
            "run": str(self.run),
            "notes": list(self.notes),
            "tokens_per_second": self.tokens_per_second,
        }
