"""From a name to a renderer: the same one whatever a model is named by, without its weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lamina.data.messages import Conversation, Message
from lamina.data.template import Renderer
from lamina.engine.model import open_model
from lamina.engine.renderer import load_renderer, open_renderer
from lamina.errors import CheckpointError, LaminaError, StoreError
from lamina.recipe.load import save_recipe
from lamina.recipe.schema import Recipe

CHAT = Conversation([Message("user", "Hi"), Message("assistant", "Hello!")])


def written(renderer: Renderer) -> tuple[list[int], list[bool], frozenset[int]]:
    (sample,) = renderer.render(CHAT)
    return sample.input_ids.tolist(), sample.loss_mask.tolist(), renderer.stop_ids


def test_a_model_has_one_renderer_by_every_name(recipe: Recipe, tmp_path: Path) -> None:
    assert recipe.store is not None
    run = tmp_path / "run"
    run.mkdir()
    save_recipe(recipe, run / "recipe.yaml")

    expected = written(open_model(recipe).renderer)

    names = (recipe, str(run), str(run / "recipe.yaml"), recipe.store, recipe.model)
    assert [written(open_renderer(name)) for name in names] == [expected] * len(names)
    assert 2 in expected[2]  # generation_config.json says so


def test_no_weight_is_opened(recipe: Recipe, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert recipe.store is not None
    shutil.copytree(recipe.store, store, ignore=shutil.ignore_patterns("blocks", "*.safetensors"))
    bare = recipe.model_copy(update={"store": str(store), "model": "owner/name"})

    assert written(open_renderer(bare)) == written(open_renderer(recipe))


def test_the_mask_is_the_recipe_s_unless_another_is_given(recipe: Recipe) -> None:
    everything = recipe.model_copy(update={"mask": "all"})

    assert open_renderer(recipe).mask == "assistant"
    assert open_renderer(everything).mask == "all"
    assert open_renderer(everything, mask="last").mask == "last"
    assert open_renderer(recipe.model).mask == "assistant"


def test_what_has_no_renderer_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAMINA_HOME", str(tmp_path / "home"))
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("mini-mixtrel", "there is no such model; did you mean mini-mixtral?"),
        (str(tmp_path / "emty"), f"there is no such model; did you mean {tmp_path / 'empty'}?"),
        (str(tmp_path / "empty"), "holds no tokenizer"),
    ):
        with pytest.raises(CheckpointError) as caught:
            open_renderer(name)
        assert message in caught.value.message
    with pytest.raises(LaminaError, match="no such file"):
        open_renderer(str(tmp_path / "none.yaml"))

    (tmp_path / "empty" / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="its tokenizer can't be loaded"):
        load_renderer(tmp_path / "empty")
    (tmp_path / "empty" / "store.json").write_text("{}")
    with pytest.raises(StoreError, match="its tokenizer can't be loaded"):
        load_renderer(tmp_path / "empty")
