"""The shapes of a plan are those of the families, for every model whose config travels along."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests import reference

from lamina.errors import CheckpointError
from lamina.models import load_family
from lamina.models.spec import Block
from lamina.plan.shapes import (
    BlockShape,
    ModelShape,
    known_models,
    model_shape,
    shape_from_config,
)
from lamina.recipe.load import load_recipe, recipe_names
from lamina.store.layout import plan_block

MAVERICK = "meta-llama/Llama-4-Maverick-17B-128E-Instruct"
SCOUT = "meta-llama/Llama-4-Scout-17B-16E-Instruct"
MIXTRAL = "mistralai/Mixtral-8x22B-Instruct-v0.1"


def facts(model: str) -> dict[str, Any]:
    read: dict[str, Any] = json.loads(known_models()[model].read_text())
    return read


def same(shape: BlockShape, block: Block) -> None:
    assert (shape.name, shape.kind) == (block.name, block.kind)
    assert shape.plain == tuple(plain.shape for plain in block.plain)
    assert [(m.module, m.out, m.in_, m.feeds_residual) for m in shape.matrices] == [
        (m.module, m.out_features, m.in_features, m.feeds_residual) for m in block.linears
    ]
    if block.experts is None:
        assert shape.experts is None
        return
    assert shape.experts is not None
    experts = shape.experts
    assert (experts.module, experts.count) == (block.experts.module, block.experts.num_experts)
    assert (experts.gate_up.out, experts.gate_up.in_) == block.experts.gate_up_shape
    assert (experts.down.out, experts.down.in_) == block.experts.down_shape


def compare(shape: ModelShape, config: dict[str, Any]) -> None:
    family = load_family(config)
    for mine, theirs in zip(shape.blocks, family.blocks, strict=True):
        same(mine, theirs)
    assert shape.top_k == family.num_experts_per_tok
    assert shape.scale_input == family.weights_scale_input
    text = family.config
    assert (shape.hidden, shape.vocab) == (text.hidden_size, text.vocab_size)
    assert (shape.heads, shape.kv_heads) == (text.num_attention_heads, text.num_key_value_heads)
    if "layer_types" in text.to_dict() and shape.model_type.startswith("llama4"):
        chunks = [block.chunk for block in shape.body if block.kind == "attention"]
        chunked = [kind == "chunked_attention" for kind in text.layer_types]
        assert [chunk is not None for chunk in chunks] == chunked


@pytest.mark.parametrize("model", known_models())
def test_shapes_are_the_familys(model: str) -> None:
    found = facts(model)

    compare(shape_from_config(model, found["config"], found["extra_parameters"]), found["config"])


@pytest.mark.parametrize("codec", ["nf4", "int8", "bf16"])
@pytest.mark.parametrize("model", known_models())
def test_units_are_the_stores(model: str, codec: str) -> None:
    """Of the first layers: the rest is like them."""
    config = facts(model)["config"]
    shape, family = shape_from_config(model, config), load_family(config)

    for i in (0, 1, 2, 4, len(family.blocks) - 1):
        layout = plan_block(i, family.blocks[i], codec)
        assert shape.blocks[i].dense_bytes(codec) == layout.dense.nbytes
        expert = layout.experts.nbytes if layout.experts else 0
        assert shape.blocks[i].expert_bytes(codec) == expert


@pytest.mark.parametrize("build", [reference.tiny_mixtral, reference.tiny_llama4])
def test_odd_sizes(build: Any, tmp_path: Path) -> None:
    """As transformers writes a config, with sizes that no block of 64 divides."""
    build().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    shape = model_shape(load_recipe("mini-mixtral", {"model": str(tmp_path)}))

    compare(shape, config)
    for i, block in enumerate(load_family(config).blocks):
        for codec in ("nf4", "int8", "bf16"):
            layout = plan_block(i, block, codec)
            assert shape.blocks[i].dense_bytes(codec) == layout.dense.nbytes
            if layout.experts:
                assert shape.blocks[i].expert_bytes(codec) == layout.experts.nbytes


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (MAVERICK, 401_583_781_376),
        (SCOUT, 108_641_793_536),
        (MIXTRAL, 140_630_071_296),
        ("mistralai/Mixtral-8x7B-Instruct-v0.1", 46_702_792_704),
    ],
)
def test_parameters_are_those_published(model: str, parameters: int) -> None:
    found = facts(model)
    shape = shape_from_config(model, found["config"], found["extra_parameters"])

    assert shape.parameters + shape.extra_parameters == parameters


@pytest.mark.parametrize("name", recipe_names())
def test_every_library_recipe_can_be_planned(name: str) -> None:
    assert load_recipe(name).model in known_models()


def test_a_folder_goes_before_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = facts("mini-mixtral")["config"] | {"num_hidden_layers": 2}
    folder = tmp_path / "mini-mixtral"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))

    assert len(model_shape(load_recipe("mini-mixtral")).body) == 4


@pytest.mark.parametrize(
    ("config", "problems"),
    [
        ({"model_type": "gpt2"}, []),
        ({"model_type": "mixtral", "hidden_size": -1}, ["hidden_size", "vocab_size"]),
        ({"model_type": "llama4", "text_config": {}}, ["attention_chunk_size", "vocab_size"]),
    ],
)
def test_configs_that_cannot_be_planned(config: dict[str, Any], problems: list[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        shape_from_config("x", config)

    for problem in problems:
        assert any(problem in sentence for sentence in caught.value.problems)


@pytest.mark.parametrize(
    ("text", "message"),
    [("[]", "isn't a JSON object"), ("{", "isn't JSON"), (None, "has no config.json")],
)
def test_folders_that_cannot_be_planned(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)

    with pytest.raises(CheckpointError, match=message):
        model_shape(load_recipe("mini-mixtral", {"model": str(tmp_path)}))


def test_an_unknown_model_names_the_known_ones() -> None:
    with pytest.raises(CheckpointError) as caught:
        model_shape(load_recipe("mini-mixtral", {"model": "nobody/nothing"}))

    assert MAVERICK in str(caught.value)
