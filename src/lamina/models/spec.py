"""What a model is made of, for those who store, stream or train it: blocks, their weights, and the
places in a checkpoint where these come from.

A *block* is one residual sublayer (attention, dense feed-forward, mixture of experts), or the
embedding, or the head. Its weights come in two sorts: the *dense* part (norms, router, matrices
of attention and shared expert) and the routed experts. Both are described here by name and shape.

E = experts, H = hidden size, I = an expert's intermediate size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

BlockKind = Literal["embed", "attention", "mlp", "moe", "head"]


@dataclass(frozen=True)
class Part:
    """Rows of a matrix, in a checkpoint.

    A matrix is the concatenation, along dimension 0, of its parts.

    Args:
        key: the checkpoint's tensor name, without the prefix that its release may put before it.
        index: which slice along dimension 0 of a stacked `[E, ...]` tensor, or None for all of it.
        transpose: whether the checkpoint holds the slice as `[in, out]`.
    """

    key: str
    index: int | None = None
    transpose: bool = False


#: Alternatives, in order of preference: the first whose keys are all in the checkpoint is taken.
Sources = tuple[tuple[Part, ...], ...]


@dataclass(frozen=True)
class Plain:
    """A tensor that is never quantized (norm, router, embedding)."""

    name: str
    shape: tuple[int, ...]
    sources: Sources


@dataclass(frozen=True)
class Linear:
    """A matrix `[out_features, in_features]` that may be quantized and adapted.

    Args:
        name: its name inside the block, e.g. `q_proj` or `shared_expert.down_proj`.
        module: the full module name in transformers, e.g. `model.layers.3.self_attn.q_proj`.
        feeds_residual: its output only goes into the residual sum, so a recompute can skip it.
    """

    name: str
    module: str
    out_features: int
    in_features: int
    sources: Sources
    feeds_residual: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        return (self.out_features, self.in_features)


@dataclass(frozen=True)
class Experts:
    """The routed experts of a block: for each, `gate_up_proj [2I, H]` (gate first) and
    `down_proj [H, I]`.

    Args:
        module: the transformers module that holds the stacked parameters,
            e.g. `model.layers.3.mlp.experts`.
        router, router_module: the router's name among the block's plain tensors, and its module.
        transposed: transformers (and so PEFT) keeps the stacked parameters as `[E, in, out]`.
        gate_up_sources, down_sources: the sources of expert e.
    """

    module: str
    router: str
    router_module: str
    num_experts: int
    hidden_size: int
    intermediate_size: int
    transposed: bool
    gate_up_sources: Callable[[int], Sources]
    down_sources: Callable[[int], Sources]

    @property
    def gate_up_shape(self) -> tuple[int, int]:
        return (2 * self.intermediate_size, self.hidden_size)

    @property
    def down_shape(self) -> tuple[int, int]:
        return (self.hidden_size, self.intermediate_size)


@dataclass(frozen=True)
class Block:
    """One unit of streaming, of boundary storage and of recompute.

    Args:
        name: unique in the model and fit for a file name, e.g. `layers.3.self_attn`.
        layer: the layer's index, or None for the embedding and the head.
    """

    name: str
    kind: BlockKind
    layer: int | None
    plain: tuple[Plain, ...] = ()
    linears: tuple[Linear, ...] = ()
    experts: Experts | None = None

    def linear(self, name: str) -> Linear:
        """The linear of that name.

        Raises:
            KeyError: there is none.
        """
        for linear in self.linears:
            if linear.name == name:
                return linear
        raise KeyError(f"{self.name} has no linear {name!r}")


def norm_weight(name: str, module: str, size: int) -> Plain:
    """The weight `[size]` of a norm."""
    return Plain(name, (size,), ((Part(f"{module}.weight"),),))


def embed_block(config: Any) -> Block:
    """The embedding, `[V, H]`."""
    shape = (config.vocab_size, config.hidden_size)
    embed = Plain("embed_tokens", shape, ((Part("model.embed_tokens.weight"),),))
    return Block("embed_tokens", "embed", None, plain=(embed,))


def head_block(config: Any) -> Block:
    """The last norm and the head `[V, H]`, which is left out where it is tied to the embedding."""
    plain = [norm_weight("norm", "model.norm", config.hidden_size)]
    if not config.tie_word_embeddings:
        shape = (config.vocab_size, config.hidden_size)
        plain.append(Plain("lm_head", shape, ((Part("lm_head.weight"),),)))
    return Block("lm_head", "head", None, plain=tuple(plain))
