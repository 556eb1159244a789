"""Stores with random weights at true shapes, written without a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import xxhash
from torch import Tensor

from lamina.models import load_family
from lamina.store.layout import (
    FORMAT,
    MANIFEST,
    BlockChecksums,
    Store,
    UnitLayout,
    manifest_block,
    plan_blocks,
    seal,
)

#: Random bytes are drawn once and reused: nothing here depends on their values.
_RANDOM = torch.randint(0, 256, (16 << 20,), dtype=torch.uint8)


def synthetic_store(folder: Path, config: dict[str, Any], codec: str = "nf4") -> Store:
    """A store of a model with that transformers config: codes random, scales 0.02, norms one."""
    blocks = load_family(config).blocks
    (folder / "blocks").mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    entries = []
    for layout in plan_blocks(blocks, codec):
        with (folder / layout.file).open("wb") as file:
            file.write(layout.header)
            dense = _unit(layout.dense)
            file.write(dense.numpy().data)
            experts: list[str] = []
            if layout.experts is not None:
                expert = _unit(layout.experts)
                checksum = _checksum(expert.numpy().data)
                for _ in range(layout.num_experts):
                    file.write(expert.numpy().data)
                    experts.append(checksum)
            sums = BlockChecksums(
                _checksum(memoryview(layout.header)), _checksum(dense.numpy().data), tuple(experts)
            )
        entries.append(manifest_block(layout, sums))
    manifest = {
        "format": FORMAT,
        "model_type": config["model_type"],
        "config": config,
        "codec": codec,
        "blocks": entries,
        "extra": [],
        "notes": [],
    }
    manifest["fingerprint"] = seal(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return Store.open(folder)


def _unit(layout: UnitLayout) -> Tensor:
    unit = torch.zeros(layout.nbytes, dtype=torch.uint8)
    for tensor in layout.tensors:
        for piece in tensor.pieces:
            part = unit[piece.start : piece.start + piece.nbytes]
            if piece.suffix in (".absmax", ".scale"):
                part.view(torch.bfloat16 if piece.dtype == "BF16" else torch.float32).fill_(0.02)
            elif piece.dtype == "BF16":
                plain = part.view(torch.bfloat16).view(piece.shape)
                if plain.ndim == 1:
                    plain.fill_(1.0)
                else:
                    plain.normal_(std=0.02)
            else:
                for start in range(0, piece.nbytes, _RANDOM.numel()):
                    chunk = part[start : start + _RANDOM.numel()]
                    chunk.copy_(_RANDOM[: chunk.numel()])
    return unit


def _checksum(data: memoryview) -> str:
    return str(xxhash.xxh3_128_hexdigest(data))
