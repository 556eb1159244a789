"""What the tests of `lamina data` share: a tokenizer of bytes, rows, and a way to run commands."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.rows import Lamina, WriteRows

from lamina.cli.main import main

#: ChatML: each turn between two marks.
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer: a token for each byte, and three marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {piece: number for number, piece in enumerate([*marks, *letters])}
    core = Tokenizer(models.BPE(vocabulary, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(marks)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = TEMPLATE
    folder = tmp_path_factory.mktemp("bytes")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, new and empty."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def lamina(work: Path, capsys: pytest.CaptureFixture[str]) -> Lamina:
    def run(*words: str) -> tuple[int, str, str]:
        code = main(["data", *words])
        return (code, *capsys.readouterr())

    return run


@pytest.fixture
def write_rows(work: Path) -> WriteRows:
    """Write rows (objects, or lines as str or bytes) to a file of JSON lines."""

    def write(name: str, rows: Iterable[Any]) -> Path:
        lines = [
            row
            if isinstance(row, bytes)
            else (row if isinstance(row, str) else json.dumps(row)).encode()
            for row in rows
        ]
        path = work / name
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        return path

    return write
