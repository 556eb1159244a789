"""What a run can be told, typed: the only place where a default stands.

A recipe is flat, and its keys are this field's usual names (transformers, PEFT, TRL). The help text
of a key stands beside its default and is what `lamina recipes show` prints.

The recipe checks what can be known without a model: types, ranges, and keys that contradict each
other. Which modules `target_modules` names, and whether sizes fit, is for those who see the model.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

__all__ = ["Recipe", "choices", "conflicts", "size_in_bytes"]

_UNITS = {
    "": 1,
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*|%)\s*")


def size_in_bytes(text: str, whole: int | None = None) -> int:
    """The bytes that a size such as `512MiB`, `1.5GB`, `4096` or `25%` stands for.

    Args:
        whole: the bytes that a percentage is of.

    Raises:
        ValueError: `text` isn't a size, or is a percentage and there is no `whole`.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a size")
    number, unit = float(match[1]), match[2].lower()
    if unit == "%":
        if whole is None:
            raise ValueError(f"{text!r} is a percentage, and nothing is known that it could be of")
        return int(whole * number / 100)
    if unit not in _UNITS:
        raise ValueError(f"{text!r} is not a size: there is no unit {match[2]!r}")
    return int(number * _UNITS[unit])


def _size(value: object) -> object:
    """A whole number of bytes is taken for a size too."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _is_size(value: str) -> str:
    try:
        size_in_bytes(value, whole=1)
    except ValueError:
        raise ValueError("must be a size such as 512MiB, 4GB or 25%") from None
    return value


def _is_budget(value: str) -> str:
    try:
        return value if value == "auto" else _is_size(value)
    except ValueError:
        raise ValueError("must be auto, or a size such as 512MiB, 4GB or 25%") from None


def _targets(value: object) -> object:
    """`a,b` is a list too, so that an override needs no brackets."""
    if isinstance(value, str):
        names: list[object] = [name.strip() for name in value.split(",")]
    elif isinstance(value, list | tuple):
        names = list(value)
    else:
        names = [value]
    if not all(isinstance(name, str) and name for name in names):
        raise ValueError("must be the name of a module, a list of such names, or all-linear")
    if not names:
        raise ValueError("names no module, so there would be nothing to train")
    return names[0] if isinstance(value, str) and len(names) == 1 else names


def _path(value: object) -> object:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _files(value: object) -> object:
    if value is None:
        return None
    files = [_path(file) for file in (value if isinstance(value, list | tuple) else [value])]
    if not all(isinstance(file, str) and file for file in files):
        raise ValueError("must be a file, or a list of files")
    if not files:
        raise ValueError("names no file")
    return files


Size = Annotated[str, BeforeValidator(_size), AfterValidator(_is_size)]
Budget = Annotated[str, BeforeValidator(_size), AfterValidator(_is_budget)]
Targets = Annotated[str | list[str], BeforeValidator(_targets)]
Files = Annotated[list[str] | None, BeforeValidator(_files)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[PositiveFloat, Field(allow_inf_nan=False)]
Name = Annotated[str, Field(min_length=1), BeforeValidator(_path)]


class Recipe(BaseModel):
    """Everything that decides a run, but for the data. Immutable; equal recipes give equal runs."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    description: str = Field(
        default="",
        description="What this recipe is for, and for whom.",
    )
    status: Literal["tested", "untried"] = Field(
        default="untried",
        description="tested: a run of it has been measured on the hardware it names. untried: none "
        "has.",
    )

    # The model and its store
    model: Name = Field(
        description="What is tuned: a folder with a checkpoint, a name on the hub, or one of the "
        "small models that need no download, mini-mixtral and mini-maverick.",
    )
    store: Name | None = Field(
        default=None,
        description="The folder of the prepared weights. null: stores/<model>-<codec> under "
        "$LAMINA_HOME, or under ~/.cache/lamina.",
    )
    codec: Literal["nf4", "int8", "bf16"] = Field(
        default="nf4",
        description="How the store holds the large matrices: nf4 (4.25 bits a weight), int8, or "
        "bf16 (lossless).",
    )
    dtype: Literal["bfloat16", "float32"] = Field(
        default="bfloat16",
        description="What is computed in. LoRA's own weights are kept in float32 either way.",
    )

    # LoRA
    r: PositiveInt = Field(
        default=16,
        description="LoRA's rank.",
    )
    lora_alpha: PositiveInt = Field(
        default=32,
        description="What LoRA adds is multiplied by lora_alpha / r.",
    )
    lora_dropout: Fraction = Field(
        default=0.0,
        description="The share of LoRA's inputs that is dropped while training.",
    )
    use_rslora: bool = Field(
        default=False,
        description="Multiply by lora_alpha / sqrt(r) instead.",
    )
    target_modules: Targets = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj"],
        description="What is adapted: ends of module names as transformers spells them (q_proj, "
        "self_attn.q_proj, shared_expert.down_proj, experts.gate_up_proj, experts.down_proj), or "
        "all-linear for everything, routed experts included, but the router.",
    )
    train_router: bool = Field(
        default=False,
        description="Train the routers' weights too.",
    )
    router_aux_loss_coef: NonNegative = Field(
        default=0.0,
        description="The weight of Mixtral's load-balancing loss; 0: none.",
    )

    # The optimizer
    learning_rate: Positive = Field(
        default=2e-4,
        description="The highest learning rate, reached after the warm-up.",
    )
    lr_scheduler_type: Literal["cosine", "linear", "constant"] = Field(
        default="cosine",
        description="How the learning rate goes on after the warm-up: down to 0 (cosine, linear), "
        "or constant.",
    )
    warmup_steps: NonNegativeInt | None = Field(
        default=None,
        description="Steps until the learning rate is reached. null: warmup_ratio says it.",
    )
    warmup_ratio: Fraction = Field(
        default=0.03,
        description="The same as a share of all steps; without effect where warmup_steps is given.",
    )
    weight_decay: NonNegative = Field(
        default=0.0,
        description="AdamW's decoupled weight decay.",
    )
    optim: Literal["adamw_8bit", "adamw_4bit", "adamw"] = Field(
        default="adamw_8bit",
        description="AdamW with states in 8 or 4 bits, or in float32.",
    )
    adam_beta1: Fraction = Field(
        default=0.9,
        description="AdamW's decay of the mean of gradients.",
    )
    adam_beta2: Fraction = Field(
        default=0.999,
        description="AdamW's decay of the mean of squared gradients.",
    )
    adam_epsilon: Positive = Field(
        default=1e-8,
        description="AdamW's guard against division by zero.",
    )
    max_grad_norm: PositiveFloat = Field(
        default=1.0,
        description="Gradients whose norm over all of them is larger are scaled down to it; .inf: "
        "never.",
    )

    # The amount of work
    tokens_per_step: PositiveInt = Field(
        default=16384,
        description="Tokens of one optimizer step, in whole sequences. Weights are read twice a "
        "step whatever its size: the more tokens, the less the reads weigh.",
    )
    max_steps: PositiveInt | None = Field(
        default=None,
        description="Optimizer steps of the run, going round the data as often as it takes. null: "
        "epochs says it.",
    )
    epochs: PositiveInt = Field(
        default=1,
        description="Passes over the data; without effect where max_steps is given.",
    )
    max_length: PositiveInt = Field(
        default=2048,
        description="The longest sequence, in tokens.",
    )
    seed: NonNegativeInt = Field(
        default=42,
        description="The seed of LoRA's first weights, of the order of the data and of dropout.",
    )

    # Memory
    group_tokens: PositiveInt = Field(
        default=4096,
        description="Tokens that go through a matrix at a time (in attention, whole sequences): "
        "bounds the memory of activations, changes no result.",
    )
    ram: Size | None = Field(
        default=None,
        description="The most of the host's memory that a run may take; null for what there is. "
        "A run that is planned to take more is refused.",
    )
    vram: Size | None = Field(
        default=None,
        description="The same for the GPU's memory, which is held to it.",
    )
    float8_boundaries: bool = Field(
        default=False,
        description="Keep the blocks' inputs as 8-bit floats from the forward to the backward: "
        "half the memory, gradients a few percent off.",
    )
    logits: Size = Field(
        default="256MiB",
        description="Memory for the logits of a chunk of tokens, as bytes or as a share of the "
        "store.",
    )
    ring: Size = Field(
        default="512MiB",
        description="Memory for weights that are read ahead, as bytes or as a share of the store.",
    )
    cache: Size = Field(
        default="25%",
        description="Memory for weights that are kept from one use to the next, as bytes or as a "
        "share of the store.",
    )
    resident: Budget = Field(
        default="auto",
        description="Memory for the weights that generate and chat keep, as bytes or as a share of "
        "the store; auto: all that every token needs, where it fits.",
    )

    # How data is understood
    mask: Literal["assistant", "last", "flagged", "all"] = Field(
        default="assistant",
        description="What is learned of a conversation: assistant turns, the last one only, those "
        "flagged, or every token.",
    )
    too_long: Literal["drop", "truncate", "split"] = Field(
        default="drop",
        description="What happens to what is longer than max_length.",
    )
    data_format: str | None = Field(
        default=None,
        description="The shape of the data's rows (see lamina data detect). null: found row by "
        "row.",
    )
    data_columns: dict[str, str] | None = Field(
        default=None,
        description="What the columns of that shape are called in the data, e.g. {user: question, "
        "assistant: answer}.",
    )
    text_rows: Literal["document", "paragraph", "line"] = Field(
        default="document",
        description="What a row of a plain text file is.",
    )

    # Data, where the recipe belongs to it
    data: Files = Field(
        default=None,
        description="Files to train on, seen from the working folder; --data goes before them.",
    )
    eval_data: Files = Field(
        default=None,
        description="Files whose loss is measured and never trained on; --eval-data goes before "
        "them.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        found = conflicts(dict(self))
        if found:
            raise ValueError("; ".join(found))
        return self


def choices(key: str) -> tuple[str, ...]:
    """The values that a key can have, of a key that has a list of them."""
    return get_args(Recipe.model_fields[key].annotation)


def conflicts(values: Mapping[str, Any], skip: Collection[str] = ()) -> list[str]:
    """Sentences on the keys that contradict each other.

    Args:
        values: every key of a recipe with a value of its type.
        skip: keys whose values are wrong already, so that nothing is said about them twice.
    """
    found = []
    if not {"tokens_per_step", "max_length"} & set(skip) and (
        values["tokens_per_step"] < values["max_length"]
    ):
        found.append(
            f"`tokens_per_step` is {values['tokens_per_step']}, which can't hold one sequence of "
            f"`max_length` {values['max_length']}"
        )
    if not {"warmup_steps", "max_steps"} & set(skip) and (
        None not in (values["warmup_steps"], values["max_steps"])
        and values["warmup_steps"] > values["max_steps"]
    ):
        found.append(
            f"`warmup_steps` is {values['warmup_steps']}, more than all the {values['max_steps']} "
            "steps of `max_steps`"
        )
    return found
