"""One visit of a block: its weights as a family sees them, and forward and backward through it.

Attention and dense blocks run over groups of whole sequences, which bounds their memory. So does a
mixture block but for its routed experts: these run over all tokens of the step, one at a time.

Shapes: T = tokens of the step, G = tokens of a group, H = hidden size, K = experts a token goes to,
E = experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import torch
import torch.nn.functional as F
from torch import Tensor

from lamina.engine.sources import WeightSource
from lamina.lora.adapter import Adapter, BlockAdapter, LoraSettings
from lamina.lora.experts import Dispatch, ExpertsLora, Take, experts_backward, experts_forward
from lamina.lora.linear import Dropout, Pair, lora_linear
from lamina.models.common import AttentionCore, Family, Routing
from lamina.models.spec import Block


@dataclass(frozen=True)
class Group:
    """Whole sequences that go through a block together.

    Args:
        tokens: which of the step's they are.
        core: their attention core, which also takes the filling for a sequence.
        filling: rows of zeros behind the tokens, so that matrices see few shapes: a kernel is
            compiled for each. What they give is dropped; their gradients are zero.
    """

    tokens: slice
    core: AttentionCore
    filling: int = 0

    def of(self, x_TX: Tensor) -> Tensor:
        """The group's rows of a tensor of the step, filled up."""
        x_GX = x_TX[self.tokens]
        return F.pad(x_GX, (0, 0, 0, self.filling)) if self.filling else x_GX

    def drop(self, x_GX: Tensor) -> Tensor:
        """Without the filling."""
        return x_GX[: len(x_GX) - self.filling] if self.filling else x_GX


@dataclass(frozen=True)
class AuxLoss:
    """What the auxiliary loss adds to the gradient of every token's router probabilities, `[E]`."""

    dprobs_E: Tensor


def seed_of(*parts: int) -> int:
    """A seed of 48 bits that names a place, the same on every machine."""
    digest = blake2b(b"".join(part.to_bytes(8, "little") for part in parts), digest_size=6)
    return int.from_bytes(digest.digest(), "little")


class BlockWeights:
    """The weights of one block for one group of tokens (`models.common.Weights`).

    Args:
        recompute: the pass is a recompute for gradients: outputs that only feed the residual sum
            are left out, and `indices_GK`, the forward's routing, is replayed.
        seed: names the step, the block and the group, for LoRA dropout; None outside training.
    """

    def __init__(
        self,
        block: Block,
        tensors: Mapping[str, Tensor],
        adapter: BlockAdapter | None,
        settings: LoraSettings | None,
        *,
        recompute: bool = False,
        indices_GK: Tensor | None = None,
        seed: int | None = None,
    ):
        self._block = block
        self._tensors = tensors
        self._adapter = adapter
        self._settings = settings
        self._recompute = recompute
        self._indices_GK = indices_GK
        self._seed = seed

    def plain(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        experts, adapter = self._block.experts, self._adapter
        if experts is not None and adapter is not None and name == experts.router:
            return tensor if adapter.router is None else adapter.router.to(tensor.dtype)
        return tensor

    def linear(self, name: str, x: Tensor) -> Tensor:
        skip = self._recompute and self._block.linear(name).feeds_residual
        return lora_linear(x, self._tensors[name], self._pair(name), skip_output=skip)

    def _pair(self, name: str) -> Pair | None:
        if self._adapter is None or self._settings is None:
            return None
        factors = self._adapter.linears.get(name)
        if factors is None:
            return None
        dropout = None
        if self._seed is not None and self._settings.lora_dropout:
            place = [linear.name for linear in self._block.linears].index(name)
            dropout = Dropout(self._settings.lora_dropout, seed_of(self._seed, place))
        return Pair(factors.a, factors.b, self._settings.scaling, dropout)

    def topk(self, scores_TE: Tensor, k: int) -> Tensor:
        if self._indices_GK is not None:
            return self._indices_GK
        return torch.topk(scores_TE, k, dim=-1).indices


@dataclass
class RoutingRecord:
    """What a mixture block's forward decides: the indices that the backward replays, and the router
    probabilities summed over tokens (where the family has an auxiliary loss)."""

    indices_TK: Tensor
    probs_sum_E: Tensor | None


class BlockRunner:
    """Runs the blocks of a family, with or without an adapter, forward and backward.

    Args:
        group_tokens: how many of an expert's tokens go through it at once.
    """

    def __init__(
        self, family: Family, source: WeightSource, adapter: Adapter | None, group_tokens: int
    ):
        self.family = family
        self.group_tokens = group_tokens
        self.source = source
        self.adapter = adapter
        self._places = {block.name: place for place, block in enumerate(family.blocks)}

    def _weights(
        self,
        block: Block,
        tensors: Mapping[str, Tensor],
        *,
        recompute: bool = False,
        indices_GK: Tensor | None = None,
        seed: int | None = None,
    ) -> BlockWeights:
        adapter = self.adapter.blocks[block.name] if self.adapter else None
        settings = self.adapter.settings if self.adapter else None
        return BlockWeights(
            block,
            tensors,
            adapter,
            settings,
            recompute=recompute,
            indices_GK=indices_GK,
            seed=seed,
        )

    def _experts_lora(self, block: Block, seed: int | None) -> ExpertsLora:
        if self.adapter is None:
            return ExpertsLora()
        gate_up, down = self.adapter.blocks[block.name].stacked(
            self.adapter.settings, training=seed is not None
        )
        return ExpertsLora(gate_up, down, seed or 0)

    def _seed(self, step_seed: int | None, block: Block, group: int) -> int | None:
        if step_seed is None:
            return None
        return seed_of(step_seed, self._places[block.name], group)

    def _take(self, block: Block) -> Take:
        return lambda expert: self.source.expert(block, expert)

    # --- forward

    @torch.no_grad()
    def forward(
        self, block: Block, x_TH: Tensor, groups: Sequence[Group], step_seed: int | None = None
    ) -> tuple[Tensor, RoutingRecord | None]:
        """A block's output, and where a mixture sent its tokens."""
        with self.source.dense(block) as tensors:
            if block.kind == "moe":
                return self._forward_moe(block, tensors, x_TH, groups, step_seed)
            return self._grouped(block, tensors, x_TH, groups, step_seed), None

    def _grouped(
        self,
        block: Block,
        tensors: Mapping[str, Tensor],
        x_TH: Tensor,
        groups: Sequence[Group],
        step_seed: int | None,
    ) -> Tensor:
        out_TH = torch.empty_like(x_TH)
        for number, group in enumerate(groups):
            w = self._weights(block, tensors, seed=self._seed(step_seed, block, number))
            out_TH[group.tokens] = group.drop(self._sublayer(block, w, group.of(x_TH), group))
        return out_TH

    def _sublayer(self, block: Block, w: BlockWeights, x_GH: Tensor, group: Group) -> Tensor:
        if block.kind == "attention":
            return self.family.attention(block, w, x_GH, group.core)
        return self.family.mlp(block, w, x_GH)

    def _forward_moe(
        self,
        block: Block,
        tensors: Mapping[str, Tensor],
        x_TH: Tensor,
        groups: Sequence[Group],
        step_seed: int | None,
    ) -> tuple[Tensor, RoutingRecord]:
        assert block.experts is not None
        out_TH, routings = torch.empty_like(x_TH), []
        probs_sum_E: Tensor | None = None
        for number, group in enumerate(groups):
            w = self._weights(block, tensors, seed=self._seed(step_seed, block, number))
            x_GH = group.of(x_TH)
            routing = self.family.route(block, w, x_GH)
            out_TH[group.tokens] = group.drop(self.family.combine(block, w, x_GH, routing))
            if routing.probs_TE is not None:
                group_sum_E = group.drop(routing.probs_TE).sum(0)
                probs_sum_E = group_sum_E if probs_sum_E is None else probs_sum_E + group_sum_E
            routings.append(_without_filling(routing, group))
        n_TH, indices_TK, weights_TK = _joined(routings)
        dispatch = Dispatch.of(indices_TK, block.experts.num_experts)
        self.source.routed(block, list(dispatch.ranges))
        experts_forward(
            n_TH,
            dispatch,
            weights_TK,
            self._take(block),
            self._experts_lora(block, self._seed(step_seed, block, len(groups))),
            out_TH,
            scale_input=self.family.weights_scale_input,
            most_rows=self.group_tokens,
        )
        return out_TH, RoutingRecord(indices_TK, probs_sum_E)

    # --- backward

    def backward(
        self,
        block: Block,
        x_TH: Tensor,
        dout_TH: Tensor,
        groups: Sequence[Group],
        *,
        record: RoutingRecord | None = None,
        aux: AuxLoss | None = None,
        step_seed: int | None = None,
        input_grad: bool = True,
    ) -> Tensor:
        """Recompute a block from its input and differentiate it; the adapter's gradients are added
        to its parameters' `.grad`.

        Args:
            dout_TH: the gradient of the block's output. It is overwritten.
            record: what the forward decided, for a mixture.
            input_grad: whether the gradient of the input is needed.

        Returns:
            the gradient of the block's input (meaningless without `input_grad`).
        """
        with self.source.dense(block) as tensors:
            if block.kind == "moe":
                assert record is not None
                return self._backward_moe(
                    block, tensors, x_TH, dout_TH, groups, record, aux, step_seed
                )
            for number, group in enumerate(groups):
                w = self._weights(
                    block, tensors, recompute=True, seed=self._seed(step_seed, block, number)
                )
                x_GH = group.of(x_TH).detach().requires_grad_(input_grad)
                with torch.enable_grad():
                    y_GH = self._sublayer(block, w, x_GH, group)
                if not y_GH.requires_grad:
                    continue
                torch.autograd.backward([y_GH], [group.of(dout_TH)])
                if x_GH.grad is not None:
                    dout_TH[group.tokens] = group.drop(x_GH.grad)
        return dout_TH

    def _backward_moe(
        self,
        block: Block,
        tensors: Mapping[str, Tensor],
        x_TH: Tensor,
        dout_TH: Tensor,
        groups: Sequence[Group],
        record: RoutingRecord,
        aux: AuxLoss | None,
        step_seed: int | None,
    ) -> Tensor:
        assert block.experts is not None
        # 1. The experts' inputs again, then their gradients, over all tokens at once.
        with torch.no_grad():
            routings = [
                _without_filling(
                    self.family.route(
                        block,
                        self._weights(block, tensors, indices_GK=group.of(record.indices_TK)),
                        group.of(x_TH),
                    ),
                    group,
                )
                for group in groups
            ]
            n_TH, indices_TK, weights_TK = _joined(routings)
            del routings
            dispatch = Dispatch.of(indices_TK, block.experts.num_experts)
            self.source.routed(block, list(reversed(dispatch.ranges)))
            dn_TH, dweights_TK = experts_backward(
                n_TH,
                dispatch,
                weights_TK,
                self._take(block),
                self._experts_lora(block, self._seed(step_seed, block, len(groups))),
                dout_TH,
                scale_input=self.family.weights_scale_input,
                most_rows=self.group_tokens,
            )
            del n_TH
        # 2. The rest of the block, group by group, with what the experts pass back to it.
        for number, group in enumerate(groups):
            w = self._weights(
                block,
                tensors,
                recompute=True,
                indices_GK=group.of(record.indices_TK),
                seed=self._seed(step_seed, block, number),
            )
            x_GH = group.of(x_TH).detach().requires_grad_()
            with torch.enable_grad():
                routing = self.family.route(block, w, x_GH)
                y_GH = self.family.combine(block, w, x_GH, routing)
            outputs = [y_GH, routing.x_TH, routing.weights_TK]
            grads = [group.of(dout_TH), group.of(dn_TH), group.of(dweights_TK)]
            if aux is not None and routing.probs_TE is not None:
                probs_GE = group.drop(routing.probs_TE)
                outputs.append(probs_GE)
                grads.append(aux.dprobs_E.expand_as(probs_GE))
            torch.autograd.backward(outputs, grads)
            assert x_GH.grad is not None
            dout_TH[group.tokens] = group.drop(x_GH.grad)
        return dout_TH


def _without_filling(routing: Routing, group: Group) -> Routing:
    return Routing(
        group.drop(routing.x_TH), group.drop(routing.indices_TK), group.drop(routing.weights_TK)
    )


def _joined(routings: Sequence[Routing]) -> tuple[Tensor, Tensor, Tensor]:
    if len(routings) == 1:
        only = routings[0]
        return only.x_TH, only.indices_TK, only.weights_TK
    return (
        torch.cat([routing.x_TH for routing in routings]),
        torch.cat([routing.indices_TK for routing in routings]),
        torch.cat([routing.weights_TK for routing in routings]),
    )
