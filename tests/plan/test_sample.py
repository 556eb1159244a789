"""How much data there is, from a sample of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lamina.data.template import Renderer
from lamina.errors import DataError
from lamina.plan import sample
from lamina.plan.hardware import described_machine
from lamina.plan.plan import make_plan
from lamina.plan.run import Prices, estimate_run
from lamina.plan.sample import DataSize, measure_data
from lamina.plan.shapes import model_shape
from lamina.recipe.load import load_recipe
from lamina.recipe.schema import Recipe

PRICES = Prices(kwh=0.25, hour=2.0, watts=400)


@pytest.fixture(scope="module")
def renderer(tmp_path_factory: pytest.TempPathFactory) -> Renderer:
    """A tokenizer of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<end>": 1, "a": 2}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return Renderer(
        PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", unk_token="<unk>")
    )


def texts(folder: Path, lengths: list[int]) -> Path:
    path = folder / "texts.jsonl"
    rows = [json.dumps({"text": " ".join(["a"] * n)}) for n in lengths]
    path.write_text("".join(f"{row}\n" for row in rows))
    return path


def recipe(**changes: Any) -> Recipe:
    return load_recipe("mini-mixtral", {"max_length": 64, "tokens_per_step": 256} | changes)


def test_tokens_are_counted(tmp_path: Path, renderer: Renderer) -> None:
    size = measure_data([texts(tmp_path, [9, 19, 29])], recipe(), renderer)

    assert (size.rows, size.sampled, size.tokenized) == (3, 3, True)
    assert size.tokens == 10 + 20 + 30  # each with an end
    assert size.sequences.longest == 30
    # By tokens: what attention sees.
    assert size.sequences.mean == (100 + 400 + 900) // 60
    assert size.sequences.learned == pytest.approx(57 / 60, abs=0.06)


def test_a_sample_stands_for_the_rest(
    tmp_path: Path, renderer: Renderer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample, "_SAMPLE", 10)

    size = measure_data([texts(tmp_path, [9] * 95)], recipe(), renderer)

    assert (size.rows, size.sampled, size.tokens) == (95, 10, 950)


@pytest.mark.parametrize(("policy", "tokens"), [("drop", 10), ("truncate", 74), ("split", 110)])
def test_long_rows(tmp_path: Path, renderer: Renderer, policy: str, tokens: int) -> None:
    size = measure_data([texts(tmp_path, [9, 99])], recipe(too_long=policy), renderer)

    assert size.tokens == tokens
    assert size.too_long == 0.5
    assert size.sequences.longest <= 64


def test_without_a_tokenizer_characters_count(tmp_path: Path) -> None:
    size = measure_data([texts(tmp_path, [50])], recipe(), None)

    assert not size.tokenized
    assert size.tokens == len(json.dumps({"text": " ".join(["a"] * 50)})) // 4


def test_data_that_cannot_be_used(tmp_path: Path, renderer: Renderer) -> None:
    path = tmp_path / "odd.jsonl"
    path.write_text('{"nothing": 1}\n')
    with pytest.raises(DataError, match="no row can be used"):
        measure_data([path], recipe(), renderer)
    with pytest.raises(DataError, match="more tokens than max_length"):
        measure_data([texts(tmp_path, [999])], recipe(), renderer)


def run(size: DataSize, **changes: Any) -> Any:
    one = recipe(**changes)
    machine = described_machine(None, ram=16 << 30)
    return estimate_run(make_plan(one, model_shape(one), machine), size, PRICES)


def test_steps_and_hours(tmp_path: Path, renderer: Renderer) -> None:
    size = measure_data([texts(tmp_path, [9] * 10_000)], recipe(), renderer)
    one, two, half = run(size), run(size, epochs=2), run(size, max_steps=200)

    # 10 tokens each: 25 or 26 sequences a step.
    assert 385 <= one.steps_per_epoch <= 401
    assert two.steps == 2 * one.steps
    assert two.hours == pytest.approx(2 * one.hours)
    assert half.steps == 200
    assert half.hours == pytest.approx(one.hours * 200 / one.steps)
    assert one.energy == pytest.approx(one.hours * 0.4)
    assert one.electricity == pytest.approx(one.energy * 0.25)
    assert one.rent == pytest.approx(one.hours * 2)
    assert one.smaller is None


def test_few_steps_are_warned_of(tmp_path: Path, renderer: Renderer) -> None:
    size = measure_data([texts(tmp_path, [9] * 5000)], recipe(), renderer)

    found = run(size, tokens_per_step=8192)

    assert found.steps_per_epoch == 7
    assert found.smaller.tokens_per_step == 768
    assert found.smaller.steps_per_epoch >= 50
    assert found.smaller.hours >= found.hours
