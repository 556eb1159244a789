"""The exact shapes of a model, from its config.json alone.

The family files in `models/` say the same, and bring torch and transformers along, seconds before
the first figure. A plan is asked for often and should answer at once, so it has its own short
description; `tests/plan/test_shapes.py` holds the two together, store bytes included.

The public configs of the library's models travel beside the recipes, so that a plan needs no
download and no gated access.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import lamina.recipe
from lamina.errors import CheckpointError
from lamina.recipe.places import store_folder
from lamina.recipe.schema import Recipe
from lamina.store.pieces import unit_layout

__all__ = [
    "BlockShape",
    "ExpertsShape",
    "Matrix",
    "ModelShape",
    "known_models",
    "model_shape",
    "shape_from_config",
]

Kind = Literal["embed", "attention", "mlp", "moe", "head"]

_LIBRARY = Path(lamina.recipe.__file__).parent / "library" / "models"


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix that may be quantized and adapted: `[out, in]`.

    Args:
        module: the module's full name in transformers.
        feeds_residual: a recompute skips it.
    """

    module: str
    out: int
    in_: int
    feeds_residual: bool = False

    @property
    def weights(self) -> int:
        return self.out * self.in_


@dataclass(frozen=True, slots=True)
class ExpertsShape:
    """The routed experts of a block: `gate_up [2I, H]` and `down [H, I]` each."""

    module: str
    count: int
    hidden: int
    intermediate: int

    @property
    def gate_up(self) -> Matrix:
        return Matrix(f"{self.module}.gate_up_proj", 2 * self.intermediate, self.hidden)

    @property
    def down(self) -> Matrix:
        return Matrix(f"{self.module}.down_proj", self.hidden, self.intermediate, True)

    @property
    def weights(self) -> int:
        """Weights of one expert."""
        return self.gate_up.weights + self.down.weights


@dataclass(frozen=True, slots=True)
class BlockShape:
    """One residual sublayer, or the embedding, or the head.

    Args:
        plain: the shapes of its tensors that are never quantized.
        chunk: of attention: how far back a token sees at most, or None.
    """

    name: str
    kind: Kind
    plain: tuple[tuple[int, ...], ...] = ()
    matrices: tuple[Matrix, ...] = ()
    experts: ExpertsShape | None = None
    chunk: int | None = None

    @property
    def plain_weights(self) -> int:
        return sum(math.prod(shape) for shape in self.plain)

    @property
    def matrix_weights(self) -> int:
        return sum(matrix.weights for matrix in self.matrices)

    def dense_bytes(self, codec: str) -> int:
        """What the dense unit takes in a store."""
        plain = [(shape, "bf16") for shape in self.plain]
        return _unit_bytes((*plain, *(((m.out, m.in_), codec) for m in self.matrices)))

    def expert_bytes(self, codec: str) -> int:
        """What one expert takes in a store; 0 if there is none."""
        if self.experts is None:
            return 0
        gate_up, down = self.experts.gate_up, self.experts.down
        return _unit_bytes((((gate_up.out, gate_up.in_), codec), ((down.out, down.in_), codec)))


@dataclass(frozen=True, slots=True, eq=False)
class ModelShape:
    """All that a plan wants to know of a model. Compared by identity: it is a key of caches.

    Args:
        model: its name.
        top_k: experts that a token goes to.
        scale_input: a routing weight multiplies an expert's input, not its output.
        tied: the head is the embedding.
        extra_parameters: those of the checkpoint that training doesn't use (a vision tower).
    """

    model: str
    model_type: str
    hidden: int
    vocab: int
    heads: int
    kv_heads: int
    head_dim: int
    top_k: int
    scale_input: bool
    tied: bool
    max_positions: int
    blocks: tuple[BlockShape, ...]
    extra_parameters: int = 0

    @property
    def body(self) -> tuple[BlockShape, ...]:
        """The blocks between embedding and head."""
        return self.blocks[1:-1]

    @property
    def parameters(self) -> int:
        """Those of the language model."""
        return sum(
            block.plain_weights
            + block.matrix_weights
            + (block.experts.count * block.experts.weights if block.experts else 0)
            for block in self.blocks
        )

    def store_bytes(self, codec: str) -> int:
        """The bytes of all units: what reading every weight once reads."""
        return sum(_unit_sizes(self, codec))

    def unit_sizes(self, codec: str) -> tuple[int, ...]:
        """The bytes of each unit, in the store's order."""
        return _unit_sizes(self, codec)

    def largest_unit(self, codec: str) -> int:
        """The largest unit that is streamed."""
        return max(_unit_sizes(self, codec)[1:-1])

    @property
    def extra_bytes(self) -> int:
        """Tensors that a store carries verbatim, in bf16."""
        return 2 * self.extra_parameters

    @property
    def checkpoint_bytes(self) -> int:
        """A checkpoint in bf16."""
        return 2 * (self.parameters + self.extra_parameters)


@lru_cache(maxsize=64)
def _unit_sizes(shape: ModelShape, codec: str) -> tuple[int, ...]:
    sizes: list[int] = []
    for block in shape.blocks:
        sizes.append(block.dense_bytes(codec))
        if block.experts is not None:
            sizes += [block.expert_bytes(codec)] * block.experts.count
    return tuple(sizes)


@lru_cache(maxsize=1024)
def _unit_bytes(tensors: tuple[tuple[tuple[int, ...], str], ...]) -> int:
    """The size of a store's unit with these tensors (shape, codec)."""
    return unit_layout([("", shape, codec) for shape, codec in tensors]).nbytes


# --- where a config comes from


@lru_cache
def known_models() -> dict[str, Path]:
    """The models whose shapes travel with the package, by name."""
    return {path.stem.replace("--", "/"): path for path in sorted(_LIBRARY.glob("*.json"))}


def model_shape(recipe: Recipe) -> ModelShape:
    """The shape of a recipe's model: of a folder, of a library model, of its store, or of the hub's
    cache. Nothing is downloaded.

    Raises:
        CheckpointError: this machine knows no config of it, or it is of a family that isn't built.
    """
    folder = Path(recipe.model).expanduser()
    if (folder / "config.json").is_file():
        return shape_from_config(recipe.model, _read(folder / "config.json"))
    known = known_models().get(recipe.model)
    if known is not None:
        facts = _read(known)
        return shape_from_config(recipe.model, facts["config"], facts["extra_parameters"])
    stored = store_folder(recipe.model, recipe.codec, recipe.store) / "config.json"
    if stored.is_file():
        return shape_from_config(recipe.model, _read(stored))
    if folder.is_dir():
        raise CheckpointError(
            f"{recipe.model}: this folder has no config.json",
            hint="A checkpoint is a folder with config.json and *.safetensors, as transformers "
            "writes it.",
        )
    cached = _cached_config(recipe.model)
    if cached is not None:
        return shape_from_config(recipe.model, _read(cached))
    raise CheckpointError(
        f"{recipe.model}: its shape isn't known on this machine",
        hint="Put the model's config.json into a folder and give model=FOLDER. Known without a "
        f"download: {', '.join(known_models())}.",
    )


def _cached_config(model: str) -> Path | None:
    if model.count("/") != 1 or model[0] in "./~":
        return None
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model, "config.json")
    return Path(cached) if isinstance(cached, str) else None


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror or error}") from error
    except ValueError as error:
        raise CheckpointError(f"{path} isn't JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} isn't a JSON object")
    return value


# --- the families


def shape_from_config(
    model: str, config: Mapping[str, Any], extra_parameters: int = 0
) -> ModelShape:
    """The shape that a config.json describes.

    Raises:
        CheckpointError: its family isn't known, or keys are missing or no positive whole numbers;
            all of them are named.
    """
    model_type = config.get("model_type")
    text = config.get("text_config", config) if model_type == "llama4" else config
    if model_type == "mixtral":
        family: _Family = _Mixtral(text)
    elif model_type in ("llama4", "llama4_text"):
        family = _Llama4(text, "language_model." if model_type == "llama4" else "")
    else:
        raise CheckpointError(
            f"{model}: model_type {model_type!r} isn't one that Lamina tunes",
            hint="Model types: mixtral, llama4, llama4_text.",
        )
    if family.problems:
        raise CheckpointError(
            f"{model}: config.json can't be planned with", problems=family.problems
        )
    hidden, vocab = family.n["hidden_size"], family.n["vocab_size"]
    tied = bool(text.get("tie_word_embeddings", False))
    head = ((hidden,),) if tied else ((hidden,), (vocab, hidden))
    return ModelShape(
        model=model,
        model_type=str(model_type),
        hidden=hidden,
        vocab=vocab,
        heads=family.n["num_attention_heads"],
        kv_heads=family.n["num_key_value_heads"],
        head_dim=family.head_dim,
        top_k=family.n["num_experts_per_tok"],
        scale_input=family.scale_input,
        tied=tied,
        max_positions=family.n["max_position_embeddings"],
        blocks=(
            BlockShape("embed_tokens", "embed", ((vocab, hidden),)),
            *family.body(),
            BlockShape("lm_head", "head", head),
        ),
        extra_parameters=extra_parameters,
    )


class _Family:
    """The numbers of a config, and the blocks they give."""

    scale_input = False
    keys: tuple[str, ...] = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "num_local_experts",
        "num_experts_per_tok",
        "vocab_size",
        "max_position_embeddings",
    )

    def __init__(self, config: Mapping[str, Any]):
        self.config = config
        self.n: dict[str, int] = {}
        self.problems: list[str] = []
        for key in self.keys:
            value = config.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                self.n[key] = value
            else:
                what = "is missing" if value is None else f"is {value!r}, no positive whole number"
                self.problems.append(f"`{key}` {what}")

    @property
    def head_dim(self) -> int:
        given = self.config.get("head_dim")
        return int(given or self.n["hidden_size"] // self.n["num_attention_heads"])

    def body(self) -> Iterator[BlockShape]:
        raise NotImplementedError

    def _attention(self, layer: int, prefix: str, chunk: int | None) -> BlockShape:
        h, d = self.n["hidden_size"], self.head_dim
        q, kv = self.n["num_attention_heads"] * d, self.n["num_key_value_heads"] * d
        parent = f"{prefix}model.layers.{layer}.self_attn"
        matrices = (
            Matrix(f"{parent}.q_proj", q, h),
            Matrix(f"{parent}.k_proj", kv, h),
            Matrix(f"{parent}.v_proj", kv, h),
            Matrix(f"{parent}.o_proj", h, q, feeds_residual=True),
        )
        return BlockShape(f"layers.{layer}.self_attn", "attention", ((h,),), matrices, chunk=chunk)

    def _experts(self, module: str) -> ExpertsShape:
        n = self.n
        return ExpertsShape(
            module, n["num_local_experts"], n["hidden_size"], n["intermediate_size"]
        )

    def _moe_plain(self) -> tuple[tuple[int, ...], ...]:
        h = self.n["hidden_size"]
        return ((h,), (self.n["num_local_experts"], h))


class _Mixtral(_Family):
    def body(self) -> Iterator[BlockShape]:
        for layer in range(self.n["num_hidden_layers"]):
            yield self._attention(layer, "", None)
            experts = self._experts(f"model.layers.{layer}.mlp.experts")
            yield BlockShape(f"layers.{layer}.mlp", "moe", self._moe_plain(), experts=experts)


class _Llama4(_Family):
    scale_input = True
    keys = (*_Family.keys, "intermediate_size_mlp", "attention_chunk_size")

    def __init__(self, config: Mapping[str, Any], prefix: str):
        super().__init__(config)
        self.prefix = prefix

    def body(self) -> Iterator[BlockShape]:
        layers = self.n["num_hidden_layers"]
        # Without a list, every 4th layer has no RoPE and attends to everything.
        rope = self.config.get("no_rope_layers") or [(i + 1) % 4 != 0 for i in range(layers)]
        every = self.config.get("interleave_moe_layer_step") or 1
        mixtures = self.config.get("moe_layers") or range(every - 1, layers, every)
        for layer in range(layers):
            chunk = self.n["attention_chunk_size"] if rope[layer] else None
            yield self._attention(layer, self.prefix, chunk)
            yield self._feed_forward(layer, layer in mixtures)

    def _feed_forward(self, layer: int, mixture: bool) -> BlockShape:
        h, name = self.n["hidden_size"], f"layers.{layer}.feed_forward"
        parent = f"{self.prefix}model.{name}"
        inside = f"{parent}.shared_expert" if mixture else parent
        width = self.n["intermediate_size" if mixture else "intermediate_size_mlp"]
        matrices = (
            Matrix(f"{inside}.gate_proj", width, h),
            Matrix(f"{inside}.up_proj", width, h),
            Matrix(f"{inside}.down_proj", h, width, feeds_residual=True),
        )
        if not mixture:
            return BlockShape(name, "mlp", ((h,),), matrices)
        experts = self._experts(f"{parent}.experts")
        return BlockShape(name, "moe", self._moe_plain(), matrices, experts)
