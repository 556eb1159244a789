"""Whole runs on a tiny model: what they write, that they repeat, and how they fail."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.engine.conftest import tiny_recipe

import lamina
from lamina.engine.loop import tune
from lamina.engine.run import RunFolder
from lamina.errors import LaminaError, RecipeError, StoreError, TrainingError
from lamina.evaluate.score import evaluate
from lamina.recipe.load import load_recipe, save_recipe
from lamina.recipe.schema import Recipe
from lamina.telemetry.events import EvalEvent, StartEvent, StepEvent, read_events


def test_a_run_learns_and_says_so(recipe: Recipe, chats: Path, tmp_path: Path) -> None:
    seen = []
    summary = tune(
        recipe.model_copy(update={"max_steps": 8}),
        data=[chats],
        eval_data=[chats],
        out=tmp_path / "run",
        on_event=seen.append,
    )
    run = RunFolder(tmp_path / "run")
    events = read_events(run.events_file)
    assert events == seen
    assert isinstance(events[0], StartEvent)
    steps = [event for event in events if isinstance(event, StepEvent)]
    assert [event.step for event in steps] == list(range(1, 9))
    assert all(event.total_steps == 8 for event in steps)
    assert all(event.tokens <= 256 for event in steps)
    assert all(0 < event.loss_tokens < event.tokens for event in steps)
    assert all(event.store_bytes_read > 0 for event in steps)
    before, after = (event.loss for event in events if isinstance(event, EvalEvent))
    assert (before, after) == (summary.eval_loss_before, summary.eval_loss_after)
    assert after < before - 0.5
    assert summary.tokens == sum(event.tokens for event in steps)
    assert json.loads(run.summary_file.read_text()) == summary.to_dict()
    # The run's own recipe and adapter give the same loss again.
    assert evaluate(run.path, [chats]).loss == pytest.approx(after, rel=1e-6)
    assert evaluate(run.path, [chats], adapter=False).loss == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_4bit", "adamw"])
def test_two_runs_with_one_seed_are_equal_byte_for_byte(
    recipe: Recipe, optim: str, chats: Path, tmp_path: Path
) -> None:
    files = []
    for name in ("one", "two"):
        settings = {"max_steps": 4, "lora_dropout": 0.1, "optim": optim}
        tune(recipe.model_copy(update=settings), data=[chats], out=tmp_path / name)
        files.append((tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]
    tune(recipe.model_copy(update=settings | {"seed": 1}), data=[chats], out=tmp_path / "three")
    other = (tmp_path / "three" / "adapter" / "adapter_model.safetensors").read_bytes()
    assert other != files[0]


def test_the_first_step_already_learns(recipe: Recipe, chats: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 10, "warmup_steps": 4, "lr_scheduler_type": "linear"}
    tune(recipe.model_copy(update=settings), data=[chats], out=tmp_path / "run")
    rates = [
        event.learning_rate / recipe.learning_rate
        for event in read_events(tmp_path / "run" / "events.jsonl")
        if isinstance(event, StepEvent)
    ]
    expected = [0.2, 0.4, 0.6, 0.8, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert rates == pytest.approx(expected)


def test_nothing_is_written_over_a_run(recipe: Recipe, chats: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "precious").write_text("!")
    with pytest.raises(LaminaError, match="isn't empty"):
        tune(recipe, data=[chats], out=tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["precious"]


def test_an_unknown_target_is_refused_before_the_run(
    recipe: Recipe, chats: Path, tmp_path: Path
) -> None:
    wrong = recipe.model_copy(update={"target_modules": ["q_porj", "o_proj", "gate"]})
    with pytest.raises(RecipeError) as caught:
        tune(wrong, data=[chats], out=tmp_path / "run")
    assert len(caught.value.problems) == 2
    assert "did you mean 'self_attn.q_proj'" in str(caught.value) or "q_proj" in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_ends_the_run(
    recipe: Recipe, chats: Path, tmp_path: Path
) -> None:
    wild = recipe.model_copy(update={"learning_rate": 1e30, "max_steps": 5, "warmup_steps": 0})
    with pytest.raises(TrainingError, match="step 2") as caught:
        tune(wild, data=[chats], out=tmp_path / "run")
    assert "chats.jsonl:" in str(caught.value)
    adapter = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in adapter.values())


def _flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def test_a_flipped_bit_is_found_before_an_update_uses_it(
    recipe: Recipe, stores: Path, chats: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(stores / "mixtral", broken)
    victim = sorted((broken / "blocks").iterdir())[-2]
    _flip(victim, victim.stat().st_size - 4096 * 3)
    damaged = recipe.model_copy(update={"store": str(broken)})
    with pytest.raises(StoreError) as caught:
        tune(damaged, data=[chats], out=tmp_path / "run")
    assert victim.name in str(caught.value)
    events = read_events(tmp_path / "run" / "events.jsonl")
    assert not [event for event in events if isinstance(event, StepEvent)]


def test_a_truncated_store_is_found_at_open(
    recipe: Recipe, stores: Path, chats: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(stores / "mixtral", broken)
    victim = sorted((broken / "blocks").iterdir())[2]
    os.truncate(victim, victim.stat().st_size - 4096)
    damaged = recipe.model_copy(update={"store": str(broken)})
    with pytest.raises(StoreError, match=victim.name):
        tune(damaged, data=[chats], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_store_of_another_model_is_refused(
    recipe: Recipe, checkpoints: dict[str, Path], stores: Path, chats: Path, tmp_path: Path
) -> None:
    other = recipe.model_copy(update={"model": str(checkpoints["llama4"])})
    with pytest.raises(StoreError, match="isn't that of") as caught:
        tune(other, data=[chats], out=tmp_path / "run")
    assert any("model_type" in problem for problem in caught.value.problems)


def test_a_store_of_the_other_small_model_is_refused(
    stores: Path, chats: Path, tmp_path: Path
) -> None:
    """Known without building either."""
    wrong = load_recipe("mini-maverick", {"store": str(stores / "mixtral"), "codec": "bf16"})
    with pytest.raises(StoreError, match="isn't that of mini-maverick"):
        tune(wrong, data=[chats], out=tmp_path / "run")


def test_an_adapter_of_another_shape_is_refused(
    recipe: Recipe, chats: Path, tmp_path: Path
) -> None:
    tune(recipe.model_copy(update={"max_steps": 1}), data=[chats], out=tmp_path / "run")
    config = tmp_path / "run" / "adapter" / "adapter_config.json"
    settings = json.loads(config.read_text())
    config.write_text(json.dumps(settings | {"r": 8}))
    with pytest.raises(lamina.AdapterError, match="doesn't fit") as caught:
        evaluate(tmp_path / "run", [chats])
    assert "has shape" in caught.value.problems[0]


def test_ctrl_c_leaves_a_loadable_adapter(
    checkpoints: dict[str, Path], stores: Path, chats: Path, tmp_path: Path
) -> None:
    long = tiny_recipe("llama4", checkpoints, stores, max_steps=100_000)
    save_recipe(long, tmp_path / "long.yaml")
    run = tmp_path / "run"
    command = [Path(sys.executable).with_name("lamina"), "tune", tmp_path / "long.yaml"]
    process = subprocess.Popen(
        [*command, "--data", chats, "--out", run],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        events = run / "events.jsonl"
        while not (events.exists() and events.read_text().count('"step"') > 2):
            assert process.poll() is None, process.stderr and process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    steps = [event for event in read_events(events) if isinstance(event, StepEvent)]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["interrupted"]
    assert summary["steps"] == len(steps) >= 2
    assert math.isfinite(evaluate(run, [chats]).loss)


def test_a_run_that_does_not_fit_is_refused_before_it_starts(
    recipe: Recipe, chats: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="doesn't fit") as caught:
        tune(recipe.model_copy(update={"ram": "200MB"}), data=[chats], out=tmp_path / "run")
    (problem,) = caught.value.problems
    assert "0.2 GB may be used" in problem
    assert not (tmp_path / "run").exists()


def test_a_run_remembers_what_was_planned(recipe: Recipe, chats: Path, tmp_path: Path) -> None:
    summary = tune(recipe.model_copy(update={"max_steps": 1}), data=[chats], out=tmp_path / "run")
    (start,) = (
        event
        for event in read_events(tmp_path / "run" / "events.jsonl")
        if isinstance(event, StartEvent)
    )
    assert start.planned_memory_bytes == summary.planned_memory_bytes > 0
