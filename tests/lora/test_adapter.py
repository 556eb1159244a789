"""Targets, PEFT's format there and back, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import reference

from lamina.errors import AdapterError, RecipeError
from lamina.lora.adapter import Adapter, LoraSettings, check_targets
from lamina.models.common import Family


@pytest.fixture(scope="module", params=["mixtral", "llama4"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Family:
    model = {"mixtral": reference.tiny_mixtral, "llama4": reference.tiny_llama4}[request.param]()
    folder = tmp_path_factory.mktemp(request.param)
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    return reference.family_of(folder)


def adapter(family: Family, *targets: str, **settings: Any) -> Adapter:
    lora = LoraSettings(r=3, lora_alpha=6, target_modules=targets, **settings)
    made = Adapter(family, lora, seed=0, device="cpu")
    reference.randomize(made, None)
    return made


def targeted(made: Adapter) -> set[str]:
    names = set()
    for block, parts in made.blocks.items():
        names |= {f"{block}.{name}" for name in parts.linears}
        names |= {f"{block}.experts.gate_up_proj"} if parts.gate_up else set()
        names |= {f"{block}.experts.down_proj"} if parts.down else set()
    return names


def test_targets(family: Family) -> None:
    layers = family.config.num_hidden_layers
    assert targeted(adapter(family, "q_proj")) == {
        f"layers.{n}.self_attn.q_proj" for n in range(layers)
    }
    assert targeted(adapter(family, "model.layers.1.self_attn.v_proj")) == {
        "layers.1.self_attn.v_proj"
    }
    experts = targeted(adapter(family, "experts"))
    assert experts == targeted(adapter(family, "experts.gate_up_proj", "experts.down_proj"))
    assert experts == targeted(adapter(family, "gate_up_proj")) | targeted(
        adapter(family, "experts.down_proj")
    )
    everything = targeted(adapter(family, "all-linear"))
    assert everything > experts
    if "llama4_text" in type(family).model_types:
        dense = targeted(adapter(family, "down_proj"))
        # As in PEFT, where a module's name doesn't reach the experts' parameters.
        assert dense
        assert not any(".experts." in name for name in dense)
        shared = targeted(adapter(family, "shared_expert.down_proj"))
        assert shared < dense


def test_unknown_targets_are_all_named(family: Family) -> None:
    with pytest.raises(RecipeError) as caught:
        check_targets(family.blocks, ("q_porj", "o_proj", "expert"))
    assert len(caught.value.problems) == 2
    assert "did you mean" in caught.value.problems[0]
    assert "all-linear" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "targets", [("q_proj",), ("all-linear",), ("experts.down_proj",), ("experts.gate_up_proj",)]
)
def test_saved_and_loaded(family: Family, targets: tuple[str, ...], tmp_path: Path) -> None:
    made = adapter(family, *targets, use_rslora=True, train_router=True)
    for block in made.blocks.values():
        if block.router is not None:
            torch.nn.init.normal_(block.router)
    made.save(tmp_path, base_model="base")
    loaded = Adapter.load(family, tmp_path, device="cpu")
    assert loaded.settings.scaling == made.settings.scaling
    assert targeted(loaded) == targeted(made)
    ours, theirs = dict(made.tensors()), dict(loaded.tensors())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_what_does_not_fit_is_refused(family: Family, tmp_path: Path) -> None:
    adapter(family, "q_proj", "v_proj").save(tmp_path, base_model="base")
    weights = tmp_path / "adapter_model.safetensors"
    tensors = load_file(weights)
    first, second, third, *_ = tensors
    tensors["extra.lora_A.weight"] = torch.zeros(2)
    tensors[second] = torch.zeros(5, 5)
    tensors[third] = tensors[third] * torch.nan
    del tensors[first]
    save_file(tensors, weights)
    with pytest.raises(AdapterError) as caught:
        Adapter.load(family, tmp_path, device="cpu")
    text = "\n".join(caught.value.problems)
    assert f"{first} is missing" in text
    assert f"{second} has shape [5, 5]" in text
    assert f"{third} holds values that aren't finite" in text
    assert "extra.lora_A.weight belongs to nothing" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"peft_type": "IA3"}, "IA3"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"target_modules": ["nothing"]}, "nothing"),
    ],
)
def test_configs_that_cannot_be_computed_are_refused(
    family: Family, change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    adapter(family, "q_proj").save(tmp_path, base_model="base")
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(AdapterError, match=message):
        Adapter.load(family, tmp_path, device="cpu")


def test_damaged_files_are_refused(family: Family, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="can't be read"):
        Adapter.load(family, tmp_path, device="cpu")
    adapter(family, "q_proj").save(tmp_path, base_model="base")
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(AdapterError, match="can't be read"):
        Adapter.load(family, tmp_path, device="cpu")
