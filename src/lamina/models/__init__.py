"""The model families, found by transformers' `model_type`."""

from __future__ import annotations

import copy
from typing import Any

from lamina.errors import CheckpointError
from lamina.models.common import Family
from lamina.models.llama4 import Llama4
from lamina.models.mixtral import Mixtral

FAMILIES: tuple[type[Any], ...] = (Mixtral, Llama4)


def family_class(model_type: str) -> type[Any]:
    """The family that serves a `model_type`.

    Raises:
        CheckpointError: none does.
    """
    for candidate in FAMILIES:
        if model_type in candidate.model_types:
            return candidate
    known = ", ".join(name for family in FAMILIES for name in family.model_types)
    raise CheckpointError(
        f"model_type {model_type!r} isn't one that Lamina tunes", hint=f"Model types: {known}."
    )


def load_family(config: dict[str, Any]) -> Family:
    """The family of a model, from the contents of its `config.json`.

    Raises:
        CheckpointError: the family isn't known, or the config asks for what isn't built.
    """
    from transformers import AutoConfig

    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        raise CheckpointError("config.json has no model_type, so the model's family isn't known")
    cls = family_class(model_type)
    try:
        parsed = AutoConfig.for_model(**_normalized(config))
    except CheckpointError:
        raise
    except Exception as error:  # transformers validates strictly, with errors of many types
        raise CheckpointError(f"config.json can't be used: {error}") from error
    family: Family = cls(parsed)
    return family


def _normalized(config: dict[str, Any]) -> dict[str, Any]:
    """Released Llama 4 configs write `attn_temperature_tuning` as 4 and `floor_scale` as 8192.0,
    which transformers' strict configs refuse."""
    config = copy.deepcopy(config)
    text = config.get("text_config", config)
    if isinstance(text.get("attn_temperature_tuning"), int):
        text["attn_temperature_tuning"] = bool(text["attn_temperature_tuning"])
    if isinstance(text.get("floor_scale"), float) and text["floor_scale"].is_integer():
        text["floor_scale"] = int(text["floor_scale"])
    return config
