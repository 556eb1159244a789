"""One optimizer step's gradients, layer-major: every block sees all tokens of the step, once
forward and once back.

Shapes: T = tokens of the step, L = tokens that carry loss, H = hidden size, E = experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lamina.data.batches import Batch
from lamina.engine import heap
from lamina.engine.blocks import AuxLoss, BlockRunner, BlockWeights, Group, RoutingRecord
from lamina.engine.boundaries import Boundaries
from lamina.engine.head import logits, logprobs
from lamina.engine.sources import Walk, WeightSource
from lamina.lora.adapter import Adapter
from lamina.models.common import Family, RaggedAttention

#: Log probabilities `[L]` in; the loss and each log probability's weight in it `[L]` out.
Objective = Callable[[Tensor], tuple[Tensor, Tensor]]


def sft(logp_L: Tensor) -> tuple[Tensor, Tensor]:
    """Mean negative log likelihood over the step's loss-carrying tokens."""
    count = max(1, logp_L.numel())
    return -logp_L.sum() / count, torch.full_like(logp_L, -1.0 / count)


@dataclass(frozen=True)
class StepResult:
    """Losses of a step.

    Args:
        loss: the objective, without the auxiliary loss.
        aux_loss: the router's auxiliary loss as transformers defines it, before its coefficient;
            None in families without one.
        logp_L: the log probability of each loss-carrying token.
    """

    loss: float
    aux_loss: float | None
    logp_L: Tensor


#: A group's tokens are filled up to a multiple of this.
_ROWS = 64


class Engine:
    """Forward and backward of whole optimizer steps through a model that may not fit in memory.

    Args:
        adapter: what is trained, or None for the base model.
        group_tokens: how many tokens at most go through a matrix at once (in attention, a longer
            sequence goes alone).
        logits_bytes: how much memory the head's logits may take.
        router_aux_loss_coef: weight of the auxiliary loss (families that have one).
        float8_boundaries: whether the blocks' inputs are kept as float8.
        on_block: called between blocks; what it raises leaves the step.
    """

    def __init__(
        self,
        family: Family,
        source: WeightSource,
        adapter: Adapter | None,
        *,
        device: torch.device | str = "cpu",
        group_tokens: int = 4096,
        logits_bytes: int = 256 << 20,
        router_aux_loss_coef: float = 0.0,
        float8_boundaries: bool = False,
        on_block: Callable[[], None] | None = None,
    ):
        self.family = family
        self.source = source
        self.adapter = adapter
        self.device = torch.device(device)
        self.group_tokens = group_tokens
        self.logits_bytes = logits_bytes
        self.router_aux_loss_coef = router_aux_loss_coef
        self._on_block = on_block
        self.runner = BlockRunner(family, source, adapter, group_tokens)
        self._embed, *self._body, self._head = family.blocks
        self._boundaries = Boundaries(len(self._body), self.device, float8=float8_boundaries)

    # --- the step

    def forward_backward(
        self,
        batch: Batch,
        objective: Objective = sft,
        *,
        seed: int | None = None,
        then: Walk | None = None,
    ) -> StepResult:
        """Add the step's gradients to the adapter's parameters.

        Args:
            seed: names the step, for LoRA dropout; None for none.
            then: the walk over the blocks that will follow, so that its reads may start early.
        """
        assert self.adapter is not None, "the base model alone has nothing to train"
        heap.trim()
        self.source.begin("step", then=then)
        groups = self._groups(batch)
        records: dict[int, RoutingRecord] = {}

        x_TH = self._embedded(batch)
        for place, block in enumerate(self._body):
            self._between_blocks()
            self._boundaries.put(place, x_TH)
            x_TH, record = self.runner.forward(block, x_TH, groups, seed)
            if record is not None:
                records[place] = record

        logp_L, dlogp_LH = self._logprobs(batch, x_TH, gradient=True)
        assert dlogp_LH is not None
        loss, weight_L = objective(logp_L)
        dx_TH = torch.zeros_like(x_TH)
        dx_TH[batch.loss_index_L.to(self.device)] = dlogp_LH.mul_(weight_L[:, None])
        del x_TH, dlogp_LH
        aux_loss, aux = self._aux(list(records.values()), batch.num_tokens)

        first = self._first_trained()
        for place in range(len(self._body) - 1, first - 1, -1):
            self._between_blocks()
            block = self._body[place]
            dx_TH = self.runner.backward(
                block,
                self._boundaries.take(place, batch.num_tokens),
                dx_TH,
                groups,
                record=records.pop(place, None),
                aux=aux,
                step_seed=seed,
                input_grad=place > first,
            )
        return StepResult(float(loss), aux_loss, logp_L)

    @torch.no_grad()
    def logprobs(self, batch: Batch, *, then: Walk | None = None) -> Tensor:
        """Log probabilities `[L]` of a batch's loss-carrying tokens, forward only."""
        x_TH = self.hidden(batch, then=then)
        return self._logprobs(batch, x_TH, gradient=False)[0]

    @torch.no_grad()
    def hidden(self, batch: Batch, *, then: Walk | None = None) -> Tensor:
        """Hidden states `[T, H]` before the last norm, forward only."""
        self.source.begin("forward", then=then)
        groups = self._groups(batch)
        x_TH = self._embedded(batch)
        for block in self._body:
            self._between_blocks()
            x_TH, _ = self.runner.forward(block, x_TH, groups)
        return x_TH

    @torch.no_grad()
    def logits(self, batch: Batch) -> Tensor:
        """Logits `[T, V]` of every token, fp32, forward only: they must fit in memory."""
        x_TH = self.hidden(batch)
        with self._head_weights() as (w, head_VH):
            return logits(x_TH, lambda x: self.family.norm(w, x), head_VH)

    # --- its parts

    def _between_blocks(self) -> None:
        if self._on_block is not None:
            self._on_block()

    def _groups(self, batch: Batch) -> list[Group]:
        positions_T = batch.position_ids_T.to(self.device)
        lengths = [b - a for a, b in pairwise(batch.cu_seqlens)]
        groups = []
        for group in batch.groups(self.group_tokens):
            tokens = slice(group.start, group.stop)
            lengths_N, positions_G = lengths[group.first : group.last], positions_T[tokens]
            filling = 0
            # On a GPU nothing is compiled for a shape.
            if self.device.type == "cpu" and group.num_tokens > _ROWS:
                filling = -group.num_tokens % _ROWS
            if filling:
                lengths_N = [*lengths_N, filling]
                positions_G = torch.cat([positions_G, torch.arange(filling)])
            groups.append(Group(tokens, RaggedAttention(lengths_N, positions_G), filling))
        return groups

    def _embedded(self, batch: Batch) -> Tensor:
        with self.source.dense(self._embed) as tensors:
            embedding_VH = tensors["embed_tokens"]
            return embedding_VH[batch.input_ids_T.to(embedding_VH.device)].to(self.device)

    def _logprobs(
        self, batch: Batch, x_TH: Tensor, *, gradient: bool
    ) -> tuple[Tensor, Tensor | None]:
        with self._head_weights() as (w, head_VH):
            return logprobs(
                x_TH[batch.loss_index_L.to(self.device)],
                batch.targets_L.to(self.device),
                lambda x: self.family.norm(w, x),
                head_VH,
                chunk_bytes=self.logits_bytes,
                gradient=gradient,
            )

    @contextmanager
    def _head_weights(self) -> Iterator[tuple[BlockWeights, Tensor]]:
        """The last norm's weights, and the head `[V, H]`."""
        with self.source.dense(self._head) as tensors, self.source.dense(self._embed) as embed:
            # Without a matrix of its own, the head is tied to the embedding.
            head_VH = tensors.get("lm_head", embed["embed_tokens"])
            yield BlockWeights(self._head, tensors, None, None), head_VH

    def _first_trained(self) -> int:
        """The place in the body of the first block that has something to train: the backward ends
        there."""
        assert self.adapter is not None
        for place, block in enumerate(self._body):
            if any(True for _ in self.adapter.blocks[block.name].parameters()):
                return place
        return len(self._body)

    def _aux(
        self, records: Sequence[RoutingRecord], num_tokens: int
    ) -> tuple[float | None, AuxLoss | None]:
        """The auxiliary loss of Switch Transformers (arXiv 2101.03961, eq. 4-6) as transformers'
        `load_balancing_loss_func` pools it over all layers, and its gradient."""
        sums = [record.probs_sum_E for record in records if record.probs_sum_E is not None]
        if not sums:
            return None, None
        probs_E = torch.stack(sums).sum(0)
        num_experts, pooled = probs_E.numel(), len(sums) * num_tokens
        chosen = torch.cat([record.indices_TK.flatten() for record in records])
        counts_E = torch.bincount(chosen, minlength=num_experts).to(probs_E.dtype)
        factor_E = num_experts * counts_E / pooled / pooled
        aux_loss = float((factor_E * probs_E).sum())
        if not self.router_aux_loss_coef:
            return aux_loss, None
        return aux_loss, AuxLoss(self.router_aux_loss_coef * factor_E)
