"""A prepared model, opened: its store, family and tokenizer, and where it computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from lamina.data.template import Renderer
from lamina.engine.prepare import Progress, open_store
from lamina.engine.renderer import load_renderer
from lamina.engine.streamed import StreamedSource
from lamina.models import load_family
from lamina.models.common import Family
from lamina.recipe.schema import Recipe, size_in_bytes
from lamina.store.layout import Store
from lamina.store.stream import Stream


@dataclass(frozen=True)
class Model:
    """What a run, an evaluation and a generator start from."""

    recipe: Recipe
    store: Store
    family: Family
    tokenizer: Any
    renderer: Renderer
    dtype: torch.dtype
    device: torch.device

    @property
    def logits_bytes(self) -> int:
        """What a chunk of logits may take."""
        return size_in_bytes(self.recipe.logits, self.store.total_bytes)

    @contextmanager
    def streamed(self) -> Iterator[StreamedSource]:
        """The weights, streamed within the recipe's ring and cache."""
        total = self.store.total_bytes
        with Stream(
            self.store,
            ring_bytes=size_in_bytes(self.recipe.ring, total),
            cache_bytes=size_in_bytes(self.recipe.cache, total),
        ) as stream:
            yield StreamedSource(self.store, stream, self.dtype, self.device)


def open_model(recipe: Recipe, progress: Progress | None = None) -> Model:
    """Open the store of a recipe's model.

    Raises:
        StoreError: it isn't prepared, is damaged, or holds another model or no tokenizer.
    """
    store = open_store(recipe, progress)
    family = load_family(store.config)
    renderer = load_renderer(store.path, mask=recipe.mask)
    return Model(
        recipe=recipe,
        store=store,
        family=family,
        tokenizer=renderer.tokenizer,
        renderer=renderer,
        dtype=getattr(torch, recipe.dtype),
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
    )
