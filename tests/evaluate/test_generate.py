"""Text from a tiny model, with and without an adapter, against transformers and PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tests.engine.conftest import chats, checkpoints, stores, tiny_recipe
from transformers import AutoModelForCausalLM

from lamina.engine.loop import tune
from lamina.evaluate.generate import Generator

__all__ = ["chats", "checkpoints", "stores"]  # fixtures

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

PROMPTS = [
    [{"role": "user", "content": "Hi"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Count to 30, please"},
    ],
    [
        {"role": "user", "content": "Say the number 3."},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "And the next one? " * 5},
    ],
]


def greedy(model: Any, prompt: list[int], tokens: int) -> list[int]:
    """Tokens one by one, each from a pass over everything before it."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            ids.append(int(logits.argmax()))
            if ids[-1] == 2:
                break
    return ids[len(prompt) :]


@pytest.mark.parametrize("name", ["mixtral", "llama4"])
def test_greedy_text_equals_transformers(
    name: str, checkpoints: dict[str, Path], stores: Path, chats: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(name, checkpoints, stores, max_steps=6)
    run = tune(recipe, data=[chats], out=tmp_path / "run").run
    base = AutoModelForCausalLM.from_pretrained(checkpoints[name], dtype=torch.float32).eval()
    answers = {}
    for adapter in (False, True):
        model = PeftModel.from_pretrained(base, run / "adapter").eval() if adapter else base
        with Generator(run, adapter=adapter) as generator:
            pieces: dict[int, str] = {}

            def listen(place: int, text: str, pieces: dict[int, str] = pieces) -> None:
                pieces[place] = pieces.get(place, "") + text

            completions = generator.generate(PROMPTS, max_new_tokens=9, on_token=listen)
            renderer = generator._model.renderer
            for place, (prompt, completion) in enumerate(zip(PROMPTS, completions, strict=True)):
                ids = renderer.prompt(prompt)
                assert completion.prompt_tokens == len(ids)
                assert completion.token_ids == greedy(model, ids, 9)
                assert pieces.get(place, "") == completion.text
            answers[adapter] = [completion.token_ids for completion in completions]
    assert answers[False] != answers[True]


def test_only_routed_experts_are_read(
    checkpoints: dict[str, Path], stores: Path, chats: Path, tmp_path: Path
) -> None:
    """Without memory to keep weights in, a token of one sequence reads all dense parts but only the
    experts that it is routed to."""
    recipe = tiny_recipe("mixtral", checkpoints, stores, max_steps=1, resident="0")
    run = tune(recipe, data=[chats], out=tmp_path / "run").run
    with Generator(run) as generator:
        blocks = [b for b in generator._model.store.blocks if b.kind not in ("embed", "head")]
        generator.generate(PROMPTS[:1], max_new_tokens=5)
        dense = sum(block.dense.nbytes for block in blocks)
        routed = sum(2 * block.experts[0].nbytes for block in blocks if block.experts)
        assert generator.stats.bytes_per_token <= (dense + routed) * 1.3  # read-ahead included
        assert generator.stats.bytes_per_token >= dense + routed - 1
    kept = tiny_recipe("mixtral", checkpoints, stores, max_steps=1, resident="1GiB")
    run = tune(kept, data=[chats], out=tmp_path / "kept").run
    with Generator(run) as generator:
        generator.generate(PROMPTS, max_new_tokens=5)
        generator.generate(PROMPTS, max_new_tokens=5)
        assert generator.stats.bytes_read == 0


def test_sampling_is_seeded(checkpoints: dict[str, Path], stores: Path, tmp_path: Path) -> None:
    with Generator(stores / "mixtral") as generator:
        texts = [
            generator.generate(PROMPTS, max_new_tokens=8, temperature=1.0, top_p=0.9, seed=seed)
            for seed in (1, 1, 2)
        ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
