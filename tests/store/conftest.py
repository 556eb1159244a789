"""Tiny checkpoints with the key names of both families, and shapes that divide by nothing."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import huggingface_hub.constants as hub_constants
import pytest
import torch
from safetensors.torch import save_file
from tests.store.hub_server import HubServer, serving
from torch import Tensor

from lamina.models.spec import Block, Experts, Linear, Part, Plain, Sources
from lamina.store import hub as hub_module
from lamina.store.convert import prepare
from lamina.store.layout import Store


def _source(key: str) -> Sources:
    return ((Part(key),),)


@dataclass
class Sample:
    """A checkpoint on disk, the blocks that describe it, and what it holds."""

    path: Path
    stacked: bool
    hidden: int
    inter: int
    experts: int
    layers: int
    vocab: int
    prefix: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    blocks: list[Block] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        return {"model_type": "sample", "hidden_size": self.hidden}

    def write(self, shards: int = 2) -> None:
        """Writes the tensors in `shards` files with an index, or in one without."""
        self.path.mkdir(parents=True, exist_ok=True)
        for old in self.path.glob("model*"):
            old.unlink()
        (self.path / "config.json").write_text(json.dumps(self.config))
        if shards == 1:
            save_file(self.tensors, self.path / "model.safetensors")
            return
        names = list(self.tensors)
        weight_map = {}
        for i in range(shards):
            file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
            mine = {name: self.tensors[name] for name in names[i::shards]}
            save_file(mine, self.path / file)
            weight_map.update(dict.fromkeys(mine, file))
        index = {"metadata": {}, "weight_map": weight_map}
        (self.path / "model.safetensors.index.json").write_text(json.dumps(index))

    def prepare(self, out: Path, codec: str = "nf4", **more: Any) -> Store:
        return prepare(
            self.path,
            out,
            model_type="sample",
            config=self.config,
            blocks=self.blocks,
            codec=codec,
            prefixes=("language_model.", ""),
            **more,
        )

    def expected(self, block: str, expert: int | None, name: str) -> Tensor:
        """The tensor of the model, straight from the checkpoint's tensors."""
        t = {key.removeprefix(self.prefix): value for key, value in self.tensors.items()}
        if expert is None:
            spec = next(b for b in self.blocks if b.name == block)
            sources = {x.name: x.sources for x in (*spec.plain, *spec.linears)}[name]
            return t[sources[0][0].key]
        moe = f"model.{block}"
        if self.stacked:
            return t[f"{moe}.experts.{name}"][expert].T.contiguous()
        e = f"{moe}.experts.{expert}"
        if name == "down_proj":
            return t[f"{e}.w2.weight"]
        return torch.cat([t[f"{e}.w1.weight"], t[f"{e}.w3.weight"]])


def _experts(sample: Sample, moe: str) -> Experts:
    def one(e: int, *names: str) -> Sources:
        return (tuple(Part(f"{moe}.experts.{e}.{name}.weight") for name in names),)

    def stack(e: int, name: str) -> Sources:
        return ((Part(f"{moe}.experts.{name}", index=e, transpose=True),),)

    return Experts(
        module=f"{moe}.experts",
        router="router",
        router_module=f"{moe}.router",
        num_experts=sample.experts,
        hidden_size=sample.hidden,
        intermediate_size=sample.inter,
        transposed=sample.stacked,
        gate_up_sources=(
            (lambda e: stack(e, "gate_up_proj")) if sample.stacked else lambda e: one(e, "w1", "w3")
        ),
        down_sources=(
            (lambda e: stack(e, "down_proj")) if sample.stacked else lambda e: one(e, "w2")
        ),
    )


def _linear(name: str, module: str, out: int, in_: int) -> Linear:
    return Linear(name, module, out, in_, _source(f"{module}.weight"))


def _fill(sample: Sample) -> None:
    h, v = sample.hidden, sample.vocab
    plain = lambda name, key, *shape: Plain(name, shape, _source(key))  # noqa: E731
    blocks = [Block("embed", "embed", None, (plain("embed_tokens", "model.embed.weight", v, h),))]
    for i in range(sample.layers):
        layer = f"model.layers.{i}"
        attn, moe = f"{layer}.self_attn", f"{layer}.moe"
        blocks.append(
            Block(
                f"layers.{i}.self_attn",
                "attention",
                i,
                (plain("input_layernorm", f"{layer}.input_layernorm.weight", h),),
                tuple(_linear(n, f"{attn}.{n}", h + 3, h) for n in ("q_proj", "o_proj")),
            )
        )
        blocks.append(
            Block(
                f"layers.{i}.moe",
                "moe",
                i,
                (plain("router", f"{moe}.router.weight", sample.experts, h),),
                (_linear("shared_expert.up_proj", f"{moe}.shared_expert.up_proj", 5, h),),
                _experts(sample, moe),
            )
        )
    blocks.append(Block("head", "head", None, (plain("lm_head", "lm_head.weight", v, h),)))
    sample.blocks = blocks

    random = torch.Generator().manual_seed(7)
    make = lambda *shape: (torch.randn(shape, generator=random) * 0.02).bfloat16()  # noqa: E731
    tensors: dict[str, Tensor] = {}
    for block in blocks:
        for tensor in (*block.plain, *block.linears):
            tensors[tensor.sources[0][0].key] = make(*tensor.shape)
        if block.experts is None:
            continue
        moe = f"model.{block.name}"
        if sample.stacked:
            tensors[f"{moe}.experts.gate_up_proj"] = make(sample.experts, h, 2 * sample.inter)
            tensors[f"{moe}.experts.down_proj"] = make(sample.experts, sample.inter, h)
        else:
            for e in range(sample.experts):
                for name, shape in (
                    ("w1", (sample.inter, h)),
                    ("w2", (h, sample.inter)),
                    ("w3", (sample.inter, h)),
                ):
                    tensors[f"{moe}.experts.{e}.{name}.weight"] = make(*shape)
    sample.tensors = {sample.prefix + key: value for key, value in tensors.items()}


MakeSample = Callable[..., Sample]


@pytest.fixture
def make_sample(tmp_path: Path) -> MakeSample:
    """Builds a sample, and writes it unless told not to."""

    def make(
        stacked: bool = False,
        *,
        hidden: int = 21,
        inter: int = 9,
        experts: int = 3,
        layers: int = 2,
        vocab: int = 11,
        write: bool = True,
        shards: int = 2,
    ) -> Sample:
        prefix = "language_model." if stacked else ""
        path = tmp_path / "checkpoint"
        sample = Sample(path, stacked, hidden, inter, experts, layers, vocab, prefix)
        _fill(sample)
        if write:
            sample.write(shards)
        return sample

    return make


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting isn't allowed here")
    yield path
    subprocess.run(["umount", str(path)], check=True)


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """Serves the checkpoint of `make_sample`. The hub's own cache is in `tmp_path / "cache"`."""
    with serving(HubServer(tmp_path / "checkpoint")) as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_constants, "ENDPOINT", server.url)
        monkeypatch.setattr(hub_constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(hub_module, "_WAITS", (0.0,))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server
