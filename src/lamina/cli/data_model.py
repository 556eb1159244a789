"""Whose tokenizer `lamina data` uses, which is the one that training would use."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from lamina.cli.data_input import no_such_choice
from lamina.cli.terminal import byte_progress
from lamina.errors import UsageError

if TYPE_CHECKING:
    from lamina.data.chat.pieces import Mask
    from lamina.data.lengths import TooLong
    from lamina.data.template import Renderer
    from lamina.engine.prepare import Progress
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
    given = recipe if model is None else model
    if not given:
        raise UsageError(
            "this needs a model, for its tokenizer and chat template",
            hint="Add --model, for instance --model mini-mixtral, or --recipe NAME.",
        )

    from lamina.engine.renderer import open_renderer as run_open

    with ExitStack() as stack:
        bar: Progress | None = None

        def progress(done: int, total: int, what: str) -> None:
            nonlocal bar
            if bar is None:  # a model that is there needs none
                bar = stack.enter_context(byte_progress("model"))
            bar(done, total, what)

        return run_open(given, mask=mask, progress=progress)
