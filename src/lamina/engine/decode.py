"""Forward only, a token at a time: what every token needs stays in memory where it fits, and of the
experts only those are read that a token is routed to.

Shapes: T = tokens of a pass, N = sequences, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import psutil
import torch
from torch import Tensor

from lamina.engine.blocks import BlockRunner, BlockWeights, Group
from lamina.engine.model import Model
from lamina.engine.sources import Walk
from lamina.lora.adapter import Adapter
from lamina.lora.experts import ExpertWeights
from lamina.models.common import CachedAttention
from lamina.models.spec import Block
from lamina.recipe.schema import size_in_bytes
from lamina.store.layout import StoredBlock, Unit
from lamina.store.stream import Stream, StreamStats

#: Of the memory that is free, what `resident: auto` takes.
_SHARE_OF_FREE_MEMORY = 0.5


class OnDemandSource:
    """Weights of a store, read when they are needed and kept within a budget.

    Dense parts come first, since every token needs them; what is left of the budget keeps the
    experts that were used last.

    Args:
        budget: bytes of decoded weights to keep.
    """

    def __init__(self, model: Model, budget: int):
        self._dtype, self._device = model.dtype, model.device
        self._blocks = {block.name: block for block in model.store.blocks}
        self._store_bytes = model.store.total_bytes
        sizes = {name: _decoded_bytes(block.dense, self._dtype) for name, block in self._items()}
        self._kept_dense: dict[str, dict[str, Tensor] | None] = {}
        left = budget
        for name, size in sizes.items():
            # The embedding and the head are kept at any rate: they are read at both ends of a pass.
            if size <= left or self._blocks[name].kind in ("embed", "head"):
                self._kept_dense[name] = None
                left -= size
        self._expert_budget = max(0, left)
        self._experts: OrderedDict[tuple[str, int], ExpertWeights] = OrderedDict()
        self._expert_bytes = 0
        # Two rings: dense parts are announced for a whole pass, experts once a block has routed.
        largest = max(unit.nbytes for unit in model.store.units())
        self._dense_stream = Stream(model.store, ring_bytes=2 * largest)
        self._expert_stream = Stream(model.store, ring_bytes=8 * largest)

    def _items(self) -> Iterator[tuple[str, StoredBlock]]:
        yield from self._blocks.items()

    def close(self) -> None:
        self._dense_stream.close()
        self._expert_stream.close()

    @property
    def store_bytes(self) -> int:
        return self._store_bytes

    def take_stats(self) -> StreamStats:
        dense, experts = self._dense_stream.take_stats(), self._expert_stream.take_stats()
        return StreamStats(
            bytes_read=dense.bytes_read + experts.bytes_read,
            seconds_waited=dense.seconds_waited + experts.seconds_waited,
        )

    def begin(self, walk: Walk, *, then: Walk | None) -> None:
        self._dense_stream.clear()
        self._dense_stream.schedule(
            block.dense for name, block in self._items() if self._kept_dense.get(name) is None
        )

    def routed(self, block: Block, experts: Sequence[int]) -> None:
        stored = self._blocks[block.name]
        self._expert_stream.clear()
        self._expert_stream.schedule(
            stored.experts[expert]
            for expert in experts
            if (block.name, expert) not in self._experts
        )

    @contextmanager
    def dense(self, block: Block) -> Iterator[Mapping[str, Tensor]]:
        kept = self._kept_dense.get(block.name)
        if kept is not None:
            yield kept
            return
        unit = self._blocks[block.name].dense
        with self._dense_stream.take(unit) as loaded:
            tensors = loaded.tensors(self._dtype)
            if block.name in self._kept_dense:
                kept = {name: t.to(self._device, copy=True) for name, t in tensors.items()}
                self._kept_dense[block.name] = kept
                tensors = kept
            yield tensors

    @contextmanager
    def expert(self, block: Block, expert: int) -> Iterator[ExpertWeights]:
        key = (block.name, expert)
        if key in self._experts:
            self._experts.move_to_end(key)
            yield self._experts[key]
            return
        unit = self._blocks[block.name].experts[expert]
        size = _decoded_bytes(unit, self._dtype)
        with self._expert_stream.take(unit) as loaded:
            tensors = loaded.tensors(self._dtype)
            keep = size <= self._expert_budget
            weights = ExpertWeights(
                tensors["gate_up_proj"].to(self._device, copy=keep),
                tensors["down_proj"].to(self._device, copy=keep),
            )
            if keep:
                self._experts[key] = weights
                self._expert_bytes += size
                while self._expert_bytes > self._expert_budget:
                    (name, number), _ = self._experts.popitem(last=False)
                    evicted = self._blocks[name].experts[number]
                    self._expert_bytes -= _decoded_bytes(evicted, self._dtype)
            yield weights


def _decoded_bytes(unit: Unit, dtype: torch.dtype) -> int:
    return sum(torch.Size(tensor.shape).numel() for tensor in unit.tensors) * dtype.itemsize


class Decoder:
    """Runs sequences through a model with a KV cache.

    Args:
        adapter: what was tuned, or None for the base model.
    """

    def __init__(self, model: Model, adapter: Adapter | None):
        self.model = model
        self.source = OnDemandSource(model, _budget(model))
        self.runner = BlockRunner(model.family, self.source, adapter, model.recipe.group_tokens)
        self._embed, *self._body, self._head = model.family.blocks

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.source.close()

    @torch.no_grad()
    def next_logits(self, input_ids_T: Tensor, cache: CachedAttention) -> Tensor:
        """One pass: the tokens join the cache, and the logits after each sequence's last one come
        back, `[N, V]`, fp32.

        Args:
            input_ids_T: the new tokens of all sequences of the cache, end to end.
        """
        self.source.begin("forward", then=None)
        with self.source.dense(self._embed) as embed:
            embedding_VH = embed["embed_tokens"]
            x_TH = embedding_VH[input_ids_T.to(embedding_VH.device)].to(self.model.device)
        group = Group(slice(0, x_TH.shape[0]), cache)
        for block in self._body:
            x_TH, _ = self.runner.forward(block, x_TH, [group])
        x_NH = x_TH[cache.last_tokens_N]
        with self.source.dense(self._head) as tensors:
            n_NH = self.model.family.norm(BlockWeights(self._head, tensors, None, None), x_NH)
            head_VH = tensors.get("lm_head", embedding_VH)
            logits_NV = (n_NH @ head_VH.T).float()
        cache.advance()
        return logits_NV


def _budget(model: Model) -> int:
    if model.recipe.resident != "auto":
        return size_in_bytes(model.recipe.resident, model.store.total_bytes)
    if model.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(model.device)
    else:
        free = psutil.virtual_memory().available
    return int(free * _SHARE_OF_FREE_MEMORY)
