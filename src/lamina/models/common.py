"""What the families share: the norm, rotary embeddings, the attention core, and what a family is.

Shapes: T = tokens (of all sequences, end to end), H = hidden size, A = query heads, K = key/value
heads, D = head dimension, E = experts, V = vocabulary, N = sequences, S = tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lamina.errors import CheckpointError
from lamina.models.spec import Block


class Weights(Protocol):
    """One block's weights, as the engine hands them to a family."""

    def plain(self, name: str) -> Tensor:
        """A tensor that is never quantized (a norm, the router, the embedding)."""
        ...

    def linear(self, name: str, x: Tensor) -> Tensor:
        """`x [..., in] -> [..., out]` through the matrix of that name and its adapter."""
        ...

    def topk(self, scores_TE: Tensor, k: int) -> Tensor:
        """Indices `[T, k]` of the largest scores. In a recompute: those chosen in the forward, so
        that a tie can't send a token to another expert."""
        ...


class AttentionCore(Protocol):
    """Causal attention within sequences, for tokens whose sequences only it knows."""

    position_ids_T: Tensor

    def __call__(
        self,
        layer: int,
        q_TAD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        *,
        scale: float,
        chunk_size: int | None = None,
    ) -> Tensor:
        """Attention of each token over its own sequence up to itself, `[T, A, D]`.

        Args:
            chunk_size: attend only inside the chunk of that many positions that the token is in
                (Llama 4), or None.
        """
        ...


@dataclass(frozen=True)
class Routing:
    """Where a mixture block sends its tokens.

    Args:
        x_TH: the experts' input, before any scaling by the routing weight.
        indices_TK: the chosen experts.
        weights_TK: each choice's weight, differentiable.
        probs_TE: the router's probabilities over all experts, for the auxiliary loss, or None in
            families that have none.
    """

    x_TH: Tensor
    indices_TK: Tensor
    weights_TK: Tensor
    probs_TE: Tensor | None = None


class Family(Protocol):
    """The mathematics and the names of one model family."""

    #: transformers' `model_type`s that it serves.
    model_types: ClassVar[tuple[str, ...]]
    #: what a release may put before the checkpoint keys of `spec.Part`.
    checkpoint_prefixes: ClassVar[tuple[str, ...]]
    #: the routing weight multiplies the expert's input (Llama 4), not its output (Mixtral).
    weights_scale_input: ClassVar[bool]

    #: transformers' config of the language model.
    config: Any
    blocks: tuple[Block, ...]
    num_experts_per_tok: int

    def attention(self, block: Block, w: Weights, x_TH: Tensor, core: AttentionCore) -> Tensor:
        """The attention block: `x -> x + attention(norm(x))`."""
        ...

    def mlp(self, block: Block, w: Weights, x_TH: Tensor) -> Tensor:
        """The dense block: `x -> x + mlp(norm(x))`."""
        ...

    def route(self, block: Block, w: Weights, x_TH: Tensor) -> Routing:
        """A mixture block's norm and router."""
        ...

    def combine(self, block: Block, w: Weights, x_TH: Tensor, routing: Routing) -> Tensor:
        """A mixture block's output but for its routed experts, which are added to it: the residual,
        and the shared expert where there is one."""
        ...

    def norm(self, w: Weights, x_TH: Tensor) -> Tensor:
        """The norm before the head."""
        ...


def rms_norm(x_TH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm (arXiv 1910.07467) in fp32, scaled in the input's type, as in
    transformers' `MixtralRMSNorm` and `Llama4TextRMSNorm`."""
    x32_TH = x_TH.float()
    variance_T1 = x32_TH.pow(2).mean(-1, keepdim=True)
    return weight_H * (x32_TH * torch.rsqrt(variance_T1 + eps)).to(x_TH.dtype)


def l2_norm(x: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm without a weight, as transformers' `Llama4TextL2Norm`."""
    x32 = x.float()
    return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


class RotaryEmbedding:
    """Angles of rotary embeddings (arXiv 2104.09864), for every RoPE type of transformers whose
    frequencies don't depend on the sequence's length.

    Raises:
        CheckpointError: the config asks for a type that isn't known.
    """

    def __init__(self, config: Any):
        parameters = config.rope_parameters
        rope_type = parameters.get("rope_type", "default")
        if rope_type == "default":
            dim = config.head_dim or config.hidden_size // config.num_attention_heads
            exponent = torch.arange(0, dim, 2, dtype=torch.float32) / dim
            self.inv_freq, self.scaling = 1.0 / (parameters["rope_theta"] ** exponent), 1.0
        elif rope_type in ("linear", "llama3", "yarn"):
            self.inv_freq, self.scaling = ROPE_INIT_FUNCTIONS[rope_type](config)
        else:
            raise CheckpointError(
                f"config.json asks for rotary embeddings of type {rope_type!r}, "
                "whose frequencies change with the sequence's length",
                hint="Types that work: default, linear, llama3, yarn.",
            )

    def angles(self, position_ids_T: Tensor) -> Tensor:
        """`[T, D/2]`, fp32."""
        inv_freq: Tensor = self.inv_freq.to(position_ids_T.device)
        return position_ids_T[:, None].float() * inv_freq


def rotate_half_split(x_TAD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotary embedding of pairs `(i, i + D/2)` (Llama, Mixtral)."""
    first, second = x_TAD.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x_TAD * cos_TD[:, None, :] + rotated * sin_TD[:, None, :]


def rotate_interleaved(x_TAD: Tensor, freqs_cis_TD: Tensor) -> Tensor:
    """Rotary embedding of pairs `(2i, 2i + 1)`, in complex64 (Llama 4)."""
    pairs = torch.view_as_complex(x_TAD.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * freqs_cis_TD[:, None, :]).flatten(-2).type_as(x_TAD)


#: Queries that `_blocked_attention` takes at a time.
_QUERY_BLOCK = 64


def _blocked_attention(q_NSAD: Tensor, k_NSKD: Tensor, v_NSKD: Tensor, scale: float) -> Tensor:
    """Causal attention in matrix products over blocks of queries and the keys up to them.

    PyTorch's fused kernel runs at a small part of a CPU's bf16 matrix rate; this takes 0.4 times
    its time, forward and backward (docs/log.md). B = sequences x key/value heads, G = query heads
    a key/value head.
    """
    n, s, a, d = q_NSAD.shape
    heads = k_NSKD.shape[2]
    q_BGSD = (q_NSAD * scale).unflatten(2, (heads, a // heads)).permute(0, 2, 3, 1, 4)
    q_BGSD = q_BGSD.reshape(n * heads, a // heads, s, d)
    k_BDS = k_NSKD.permute(0, 2, 3, 1).reshape(n * heads, d, s)
    v_BSD = v_NSKD.transpose(1, 2).reshape(n * heads, s, d)
    block = min(_QUERY_BLOCK, s)
    future = torch.full((block, block), -torch.inf, dtype=q_NSAD.dtype, device=q_NSAD.device)
    future.triu_(1)
    outputs: list[Tensor] = []
    for start in range(0, s, block):
        size = min(block, s - start)
        rows = q_BGSD[:, :, start : start + size].reshape(n * heads, -1, d)
        scores = torch.bmm(rows, k_BDS[:, :, : start + size]).unflatten(1, (a // heads, size))
        scores[..., start:] += future[:size, :size]
        probs = torch.softmax(scores, dim=-1).flatten(1, 2)
        output = torch.bmm(probs, v_BSD[:, : start + size])
        outputs.append(output.unflatten(1, (a // heads, size)))
    out_BGSD = torch.cat(outputs, dim=2).view(n, heads, a // heads, s, d)
    return out_BGSD.permute(0, 3, 1, 2, 4).flatten(2, 3)


def causal_attention(q_NSAD: Tensor, k_NSKD: Tensor, v_NSKD: Tensor, scale: float) -> Tensor:
    """Causal attention of sequences of one length, `[N, S, A, D]`, with grouped key/value heads."""
    if q_NSAD.device.type == "cpu":
        return _blocked_attention(q_NSAD, k_NSKD, v_NSKD, scale)
    out_NASD = F.scaled_dot_product_attention(
        q_NSAD.transpose(1, 2),
        k_NSKD.transpose(1, 2),
        v_NSKD.transpose(1, 2),
        is_causal=True,
        scale=scale,
        enable_gqa=q_NSAD.shape[2] != k_NSKD.shape[2],
    )
    return out_NASD.transpose(1, 2)


class RaggedAttention:
    """The attention core of training: whole sequences lie end to end, nothing is padded.

    Chunked attention is causal attention over chunks: a sequence is cut where its positions reach a
    multiple of the chunk's size. Sequences (or chunks) of about one length go through one call: the
    shorter ones run on into the tokens that follow, which a causal mask keeps from being seen, and
    what these give is dropped. So there are few shapes, and kernels are compiled for a shape.

    Args:
        lengths: tokens of each sequence.
        position_ids_T: positions, counted from 0 in each sequence.
    """

    def __init__(self, lengths: Sequence[int], position_ids_T: Tensor):
        self.lengths = tuple(lengths)
        self.position_ids_T = position_ids_T

    def _pieces(self, chunk_size: int | None) -> list[int]:
        if chunk_size is None:
            return list(self.lengths)
        return [
            min(chunk_size, length - start)
            for length in self.lengths
            for start in range(0, length, chunk_size)
        ]

    def __call__(
        self,
        layer: int,
        q_TAD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        *,
        scale: float,
        chunk_size: int | None = None,
    ) -> Tensor:
        pieces = self._pieces(chunk_size)
        if len(set(pieces)) == 1 and pieces[0] == _rounded(pieces[0]):
            shape = (len(pieces), pieces[0])
            q, k, v = (tensor.unflatten(0, shape) for tensor in (q_TAD, k_TKD, v_TKD))
            return causal_attention(q, k, v, scale).flatten(0, 1)

        starts: dict[int, list[tuple[int, int]]] = {}
        start = 0
        for length in pieces:
            starts.setdefault(_rounded(length), []).append((start, length))
            start += length
        outputs: list[Tensor] = []
        order: list[Tensor] = []
        for length, places in starts.items():
            # Beyond the last token there is nothing to run into: it stands in for what follows.
            index = torch.tensor([at for at, _ in places])[:, None] + torch.arange(length)
            index_P = index.flatten().clamp_max_(start - 1).to(q_TAD.device)
            shape = (len(places), length)
            q, k, v = (tensor[index_P].unflatten(0, shape) for tensor in (q_TAD, k_TKD, v_TKD))
            out = causal_attention(q, k, v, scale)
            outputs += [out[row, :real] for row, (_, real) in enumerate(places)]
            order += [torch.arange(at, at + real) for at, real in places]
        inverse = torch.argsort(torch.cat(order)).to(q_TAD.device)
        return torch.cat(outputs)[inverse]


def _rounded(length: int) -> int:
    """The next of the few lengths that attention is called with."""
    step = 16 if length <= _QUERY_BLOCK else _QUERY_BLOCK
    return -(-length // step) * step


class CachedAttention:
    """The attention core of decoding: keys and values of earlier tokens are kept.

    A call serves either the prompt (whole sequences end to end, as in training) or one new token of
    every sequence. The cache is `[N, S, K, D]` a layer, filled up to each sequence's length.

    Args:
        lengths: tokens of each prompt.
        max_length: tokens that any sequence may reach.

    Attributes:
        last_tokens_N: the place of each sequence's last token among those of the pass.
    """

    def __init__(self, lengths: Sequence[int], max_length: int, device: torch.device):
        self.device = device
        self.max_length = max_length
        self.lengths_N = torch.zeros(len(lengths), dtype=torch.int64)
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._new = tuple(lengths)
        self._set_positions()

    def _set_positions(self) -> None:
        positions = [
            torch.arange(start, start + new)
            for start, new in zip(self.lengths_N.tolist(), self._new, strict=True)
        ]
        self.position_ids_T = torch.cat(positions).to(self.device)
        self.last_tokens_N = (torch.tensor(self._new).cumsum(0) - 1).to(self.device)
        self._row_T = torch.repeat_interleave(
            torch.arange(len(self._new)), torch.tensor(self._new)
        ).to(self.device)

    def advance(self) -> None:
        """The tokens of the last pass are in the cache now; the next pass brings one a sequence."""
        self.lengths_N += torch.tensor(self._new)
        self._new = (1,) * len(self._new)
        self._set_positions()

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these sequences only (the others have ended). Between passes only."""
        index = torch.tensor(rows, dtype=torch.int64)
        on_device = index.to(self.device)
        self._keys = {layer: keys[on_device] for layer, keys in self._keys.items()}
        self._values = {layer: values[on_device] for layer, values in self._values.items()}
        self.lengths_N = self.lengths_N[index]
        self._new = tuple(self._new[row] for row in rows)
        self._set_positions()

    def __call__(
        self,
        layer: int,
        q_TAD: Tensor,
        k_TKD: Tensor,
        v_TKD: Tensor,
        *,
        scale: float,
        chunk_size: int | None = None,
    ) -> Tensor:
        if layer not in self._keys:
            shape = (len(self._new), self.max_length, *k_TKD.shape[1:])
            # Zeros, not empty: masked places are multiplied by zero, which must not meet a NaN.
            self._keys[layer] = k_TKD.new_zeros(shape)
            self._values[layer] = k_TKD.new_zeros(shape)
        keys, values = self._keys[layer], self._values[layer]
        keys[self._row_T, self.position_ids_T] = k_TKD
        values[self._row_T, self.position_ids_T] = v_TKD
        if not bool(self.lengths_N.any()):
            ragged = RaggedAttention(self._new, self.position_ids_T)
            return ragged(layer, q_TAD, k_TKD, v_TKD, scale=scale, chunk_size=chunk_size)

        longest = int(self.lengths_N.max()) + 1
        place_S = torch.arange(longest, device=self.device)
        here_N1 = self.position_ids_T[:, None]
        mask_NS = place_S <= here_N1
        if chunk_size is not None:
            mask_NS &= place_S >= here_N1 // chunk_size * chunk_size
        out_NA1D = F.scaled_dot_product_attention(
            q_TAD[:, :, None],
            keys[:, :longest].transpose(1, 2),
            values[:, :longest].transpose(1, 2),
            attn_mask=mask_NS[:, None, None],
            scale=scale,
            enable_gqa=q_TAD.shape[1] != k_TKD.shape[1],
        )
        return out_NA1D.squeeze(2)
