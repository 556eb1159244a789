"""Checkpoints that are already quantized, written and prepared; what their stores hold."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lamina.models import load_family
from lamina.models.spec import Block, Linear
from lamina.store.convert import prepare
from lamina.store.layout import Store
from lamina.store.reader import verify
from lamina.store.stream import Stream


def write(path: Path, config: dict[str, Any], tensors: dict[str, Tensor], files: int = 2) -> None:
    """A checkpoint folder of these tensors; weights and what belongs to them lie in other files."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    weight_map = {}
    for i in range(files):
        names = list(tensors)[i::files]
        save_file({n: tensors[n].contiguous() for n in names}, path / f"model-{i}.safetensors")
        weight_map.update(dict.fromkeys(names, f"model-{i}.safetensors"))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def make(path: Path, out: Path, config: dict[str, Any], codec: str = "nf4") -> Store:
    family = load_family(config)
    store = prepare(
        path,
        out,
        model_type=config["model_type"],
        config=config,
        blocks=family.blocks,
        codec=codec,
        prefixes=family.checkpoint_prefixes,
    )
    assert verify(store) == []
    store.check_model(family.blocks)
    return store


def held(store: Store, block: str) -> dict[str, Tensor]:
    return load_file(store.path / store.block(block).file)


def streamed(store: Store, block: str) -> Iterator[tuple[int | None, dict[str, Tensor]]]:
    """The tensors of a block in bf16, as the engine gets them: the dense part, then each expert."""
    units = store.block(block).units
    with Stream(store, ring_bytes=4 * max(unit.nbytes for unit in units)) as stream:
        stream.schedule(units)
        for unit in units:
            with stream.take(unit) as loaded:
                yield unit.expert, {k: t.clone() for k, t in loaded.tensors(torch.bfloat16).items()}


def matrices(blocks: Iterable[Block]) -> Iterator[tuple[Block, Linear]]:
    for block in blocks:
        for linear in block.linears:
            yield block, linear
