"""The small real models, for machines without a hub or a GPU: `mini-mixtral` and `mini-maverick`.

Both are *upcycled* from SmolLM2-135M-Instruct (Apache-2.0): its feed-forward becomes experts, the
rest is copied, so that they speak like their parent before any tuning. They are written as ordinary
checkpoints, with the key names of the real releases, and go through all that the giants go through.

What is unusual here:

* `mini-maverick` splits the parent's neurons in two: the first half is the shared expert, every
  routed expert is a noisy copy of the second. Llama 4 multiplies an expert's *input* by the sigmoid
  of its score, and silu isn't homogeneous, so no rescaling of weights undoes that. The router is
  drawn wide instead: the highest of 16 scores then nearly always saturates the sigmoid.
* Configurations and cards are written by hand and noise is made of whole numbers, so that nothing
  depends on a library's version or a machine's rounding: one parent always gives the same bytes.

H = hidden size, I = an expert's intermediate size, E = experts.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from lamina.errors import CheckpointError
from lamina.models.mini_parent import PARENT, Parent, find_parent, interleaved
from lamina.recipe.places import home

__all__ = ["MINI_MODEL_TYPES", "MINI_NAMES", "PARENT", "build_mini", "ensure_mini", "mini_path"]

#: Raised when the bytes that `build_mini` writes change, so that older copies are built again.
_VERSION = 1
_MARK = "mini.json"

#: Deviation of the noise that tells the experts of a layer apart, as a share of the matrix's own.
_EXPERT_NOISE = 0.01
#: Deviation of a uniform choice among 256 whole numbers.
_BITS_DEVIATION = math.sqrt((256**2 - 1) / 12)
#: Deviation of a router's logits on inputs that a norm has just brought to unit size (real inputs
#: give about half of it). Mixtral renormalizes, so any will do; Llama 4's must saturate a sigmoid.
_MIXTRAL_ROUTER = 1.0
_MAVERICK_ROUTER = 16.0
_SHARD_BYTES = 200 * 2**20

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Mini:
    """How a small model is made of its parent.

    Args:
        config: its `config.json` from its parent's.
        tensors: all its weights, in the order of the model.
        card: the paragraph of its card that says what was done.
    """

    config: Callable[[Mapping[str, Any]], dict[str, Any]]
    tensors: Callable[[Parent], Iterator[tuple[str, torch.Tensor]]]
    card: str


# ----------------------------------------------------------------------------------------------
# Where it lies


def mini_path(name: str) -> Path:
    """Where the small model of that name lies: `$LAMINA_HOME/models/<name>`, or below
    `~/.cache/lamina`.

    Raises:
        CheckpointError: there is no small model of that name.
    """
    _mini(name)
    return home() / "models" / name


def ensure_mini(name: str, *, progress: Progress | None = None) -> Path:
    """The folder of the small model, built at first use (10 s, 0.9 GB or 1.4 GB).

    Raises:
        CheckpointError: no such model, its parent can't be found, or the folder can't be written.
    """
    folder = mini_path(name)
    return folder if _is_current(name, folder) else build_mini(name, folder, progress=progress)


def build_mini(name: str, out: Path, *, progress: Progress | None = None) -> Path:
    """Write a small model as a transformers checkpoint into the folder `out`.

    The folder appears when it is complete. One that an earlier version built there is replaced;
    anything else is not touched.

    Args:
        name: `mini-mixtral` or `mini-maverick`.
        progress: called with the bytes of weights written and those to write.

    Returns:
        `out`.

    Raises:
        CheckpointError: no such model, its parent can't be found, `out` is taken or can't be
            written.
    """
    mini = _mini(name)
    out = Path(out)
    if out.exists() and not (out / _MARK).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(
            f"can't build {name} at {out}: something else is there",
            hint="Choose a folder that doesn't exist yet.",
        )
    parent = find_parent()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(out)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}-", suffix=".partial", dir=out.parent))
        try:
            work.chmod(0o755)
            _write(name, mini, parent, work, progress)
            _move_into_place(name, work, out)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"can't write {name} to {out}: {error.strerror or error}",
            hint="It needs 1.5 GB; LAMINA_HOME names another place.",
        ) from error
    return out


def _mini(name: str) -> _Mini:
    if name not in _MINIS:
        raise CheckpointError(
            f"there is no small model {name!r}", hint=f"There are {' and '.join(_MINIS)}."
        )
    return _MINIS[name]


def _mark(name: str) -> dict[str, Any]:
    return {"name": name, "version": _VERSION, "parent": PARENT}


def _is_current(name: str, folder: Path) -> bool:
    """Whether the folder is what `build_mini` would write."""
    try:
        return bool(json.loads((folder / _MARK).read_text()) == _mark(name))
    except (OSError, ValueError):
        return False


def _remove_leftovers(out: Path) -> None:
    """What builds left that were killed; a younger one may still be at work."""
    for folder in out.parent.glob(f".{out.name}-*.partial"):
        if time.time() - folder.stat().st_mtime > 3600:
            shutil.rmtree(folder, ignore_errors=True)


def _move_into_place(name: str, work: Path, out: Path) -> None:
    """Rename, unless another process was faster: its folder has the same bytes, and may be in use
    by now."""
    try:
        if (out / _MARK).is_file() and not _is_current(name, out):
            out.rename(work.with_suffix(".old.partial"))
            shutil.rmtree(work.with_suffix(".old.partial"))
        if not _is_current(name, out):
            work.rename(out)
    except OSError:
        if not _is_current(name, out):
            raise


# ----------------------------------------------------------------------------------------------
# The children


def _bits(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Whole numbers from -128 to 127, fp32, that depend on the name alone."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    return torch.from_numpy(rng.integers(-128, 128, shape, dtype=np.int8)).float()


def _copies(weight: torch.Tensor, names: Iterable[str]) -> Iterator[torch.Tensor]:
    """Copies of a matrix, each with noise of its own.

    The step of the noise is a power of two: its product with a whole number is exact, and a sum
    that is rounded once is the same with and without fused multiply-adds.
    """
    wide = weight.float()
    deviation = _EXPERT_NOISE * float(weight.double().std())
    step = 2.0 ** round(math.log2(deviation / _BITS_DEVIATION))
    for name in names:
        yield torch.add(wide, _bits(name, tuple(weight.shape)), alpha=step).bfloat16()


def _router(parent: Parent, layer: int, name: str, experts: int, deviation: float) -> torch.Tensor:
    """`[E, H]` with logits of about that deviation; the norm before it sets its inputs' size."""
    norm = parent.tensor(f"model.layers.{layer}.post_attention_layernorm.weight").double()
    scale = deviation / float(norm.norm()) / _BITS_DEVIATION
    return (_bits(name, (experts, norm.numel())) * scale).bfloat16()


def _around_layers(
    parent: Parent, layer: Callable[[int], Iterator[tuple[str, torch.Tensor]]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Embedding, layers, final norm; the head is the embedding, as in the parent."""
    yield "model.embed_tokens.weight", parent.tensor("model.embed_tokens.weight")
    for i in range(parent.config["num_hidden_layers"]):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            name = f"model.layers.{i}.{norm}.weight"
            yield name, parent.tensor(name)
        for linear in ("v_proj", "o_proj"):
            name = f"model.layers.{i}.self_attn.{linear}.weight"
            yield name, parent.tensor(name)
        yield from layer(i)
    yield "model.norm.weight", parent.tensor("model.norm.weight")


def _mixtral_tensors(parent: Parent) -> Iterator[tuple[str, torch.Tensor]]:
    def layer(i: int) -> Iterator[tuple[str, torch.Tensor]]:
        for linear in ("q_proj", "k_proj"):
            name = f"model.layers.{i}.self_attn.{linear}.weight"
            yield name, parent.tensor(name)
        moe = f"model.layers.{i}.block_sparse_moe"
        gate = f"{moe}.gate.weight"
        yield gate, _router(parent, i, gate, _MIXTRAL_EXPERTS, _MIXTRAL_ROUTER)
        for w, linear in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            names = [f"{moe}.experts.{e}.{w}.weight" for e in range(_MIXTRAL_EXPERTS)]
            weight = parent.tensor(f"model.layers.{i}.mlp.{linear}.weight")
            yield from zip(names, _copies(weight, names), strict=True)

    return _around_layers(parent, layer)


def _maverick_tensors(parent: Parent) -> Iterator[tuple[str, torch.Tensor]]:
    def layer(i: int) -> Iterator[tuple[str, torch.Tensor]]:
        attention = f"model.layers.{i}.self_attn"
        heads, kv_heads = (
            parent.config[f"num_{kind}_heads"] for kind in ("attention", "key_value")
        )
        for linear, n in (("q_proj", heads), ("k_proj", kv_heads)):
            name = f"{attention}.{linear}.weight"
            yield name, interleaved(parent.tensor(name), n)
        gate_IH, up_IH, down_HI = (
            parent.tensor(f"model.layers.{i}.mlp.{linear}.weight")
            for linear in ("gate_proj", "up_proj", "down_proj")
        )
        feed_forward = f"model.layers.{i}.feed_forward"
        if i % 2 == 0:
            yield f"{feed_forward}.gate_proj.weight", gate_IH
            yield f"{feed_forward}.up_proj.weight", up_IH
            yield f"{feed_forward}.down_proj.weight", down_HI
            return
        half = gate_IH.shape[0] // 2
        shared = f"{feed_forward}.shared_expert"
        yield f"{shared}.gate_proj.weight", gate_IH[:half]
        yield f"{shared}.up_proj.weight", up_IH[:half]
        yield f"{shared}.down_proj.weight", down_HI[:, :half]
        router = f"{feed_forward}.router.weight"
        yield router, _router(parent, i, router, _MAVERICK_EXPERTS, _MAVERICK_ROUTER)
        # Llama 4 stacks its experts as [E, in, out], gate and up side by side.
        for name, weight in (
            (f"{feed_forward}.experts.gate_up_proj", torch.cat([gate_IH[half:], up_IH[half:]]).T),
            (f"{feed_forward}.experts.down_proj", down_HI[:, half:].T),
        ):
            names = [f"{name}.{e}" for e in range(_MAVERICK_EXPERTS)]
            yield name, torch.stack(list(_copies(weight.contiguous(), names)))

    return _around_layers(parent, layer)


_MIXTRAL_EXPERTS = 8
_MAVERICK_EXPERTS = 16

_SHARED_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)


def _shared_config(parent: Mapping[str, Any]) -> dict[str, Any]:
    return {key: parent[key] for key in _SHARED_KEYS} | {
        "head_dim": parent["hidden_size"] // parent["num_attention_heads"],
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
    }


def _mixtral_config(parent: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        **_shared_config(parent),
        "intermediate_size": parent["intermediate_size"],
        "num_local_experts": _MIXTRAL_EXPERTS,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
    }


def _maverick_config(parent: Mapping[str, Any]) -> dict[str, Any]:
    layers = parent["num_hidden_layers"]
    return {
        "architectures": ["Llama4ForCausalLM"],
        "model_type": "llama4_text",
        **_shared_config(parent),
        "intermediate_size": parent["intermediate_size"] // 2,
        "intermediate_size_mlp": parent["intermediate_size"],
        "num_local_experts": _MAVERICK_EXPERTS,
        "num_experts_per_tok": 1,
        "interleave_moe_layer_step": 2,
        # The parent rotates every layer, attends to everything and knows no temperature.
        "no_rope_layers": [1] * layers,
        "attention_chunk_size": parent["max_position_embeddings"],
        "attn_temperature_tuning": False,
        "use_qk_norm": False,
        "attention_bias": False,
    }


_MINIS = {
    "mini-mixtral": _Mini(
        _mixtral_config,
        _mixtral_tensors,
        "Every layer's feed-forward was copied into 8 experts, each with noise of about 1% of the "
        "matrix's deviation, of which a random router chooses 2.",
    ),
    "mini-maverick": _Mini(
        _maverick_config,
        _maverick_tensors,
        "It is a Llama 4 text model. In every second layer the feed-forward's neurons were split: "
        "the first half is the shared expert, and the second half was copied into 16 routed "
        "experts, each with noise of about 1% of the matrix's deviation, of which a random router "
        "chooses 1. The rows of the query and key projections were put into Llama 4's order.",
    ),
}
#: The small models there are.
MINI_NAMES = tuple(_MINIS)
#: transformers' `model_type` of each, known without building it.
MINI_MODEL_TYPES = {"mini-mixtral": "mixtral", "mini-maverick": "llama4_text"}


# ----------------------------------------------------------------------------------------------
# Writing


def _write(name: str, mini: _Mini, parent: Parent, folder: Path, progress: Progress | None) -> None:
    config = mini.config(parent.config)
    _write_weights(mini.tensors(parent), _weight_bytes(config), folder, progress)
    files: dict[str, Any] = {
        "config.json": config,
        "generation_config.json": {
            key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        },
        "tokenizer_config.json": {
            "add_prefix_space": False,
            "bos_token": "<|im_start|>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|im_end|>",
            "model_max_length": config["max_position_embeddings"],
            "pad_token": "<|im_end|>",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<|endoftext|>",
        },
        _MARK: _mark(name),
    }
    for file, value in files.items():
        (folder / file).write_text(json.dumps(value, indent=2) + "\n")
    (folder / "tokenizer.json").write_text(parent.tokenizer)
    (folder / "chat_template.jinja").write_text(parent.chat_template)
    (folder / "README.md").write_text(_CARD.format(name=name, parent=PARENT, how=mini.card))
    (folder / "LICENSE").write_text(_LICENSE.format(name=name, parent=PARENT))


def _weight_bytes(config: Mapping[str, Any]) -> int:
    """The bytes of all matrices, which the norms and routers don't change noticeably."""
    hidden, layers = config["hidden_size"], config["num_hidden_layers"]
    kv = config["num_key_value_heads"] * config["head_dim"]
    expert = 3 * hidden * config["intermediate_size"]
    experts = config["num_local_experts"]
    if config["model_type"] == "mixtral":
        feed_forward = layers * experts * expert
    else:
        moe = layers // 2
        dense = 3 * hidden * config["intermediate_size_mlp"]
        feed_forward = moe * (experts + 1) * expert + (layers - moe) * dense
    attention = layers * 2 * hidden * (hidden + kv)
    return 2 * int(config["vocab_size"] * hidden + attention + feed_forward)


def _write_weights(
    tensors: Iterator[tuple[str, torch.Tensor]], total: int, folder: Path, progress: Progress | None
) -> None:
    """Shards named as transformers names them, and their index; one shard is held at a time."""
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    size = done = 0

    def flush() -> None:
        nonlocal shard, size
        path = folder / f"{len(shards)}.part"
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors creates its files for their owner alone
        shards.append(list(shard))
        shard, size = {}, 0

    for name, weight in tensors:
        if shard and size + weight.nbytes > _SHARD_BYTES:
            flush()
        shard[name] = weight.contiguous()
        size += weight.nbytes
        done += weight.nbytes
        if progress:
            progress(min(done, total), total)
    flush()
    if progress:
        progress(total, total)

    where: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{i}.part").rename(folder / file)
        where.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": done}, "weight_map": dict(sorted(where.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


_CARD = """\
---
license: apache-2.0
base_model: {parent}
language: en
pipeline_tag: text-generation
---

# {name}

A small mixture-of-experts model that speaks like its parent, [{parent}](https://huggingface.co/{parent}).
Lamina built it on this machine, for tests and demonstrations.

{how} Everything else is the parent's, and nothing was trained. It is no better than its parent.
"""

_LICENSE = """\
{name} is a derivative of {parent},
which its authors at Hugging Face licensed under the Apache License, Version 2.0.
The weights were changed: README.md says how.

Licensed under the Apache License, Version 2.0 (the "License"); you may not use these files except
in compliance with the License. You may obtain a copy of the License at

    http://www.apache.org/licenses/LICENSE-2.0

Unless required by applicable law or agreed to in writing, software distributed under the License is
distributed on an "AS IS" BASIS, WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or
implied. See the License for the specific language governing permissions and limitations under the
License.
"""
