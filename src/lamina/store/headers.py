"""What files of safetensors say of themselves: which tensors they hold, and where.

Everything is asked for by byte range, so that a file on a server can be read like one on disk.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lamina.errors import CheckpointError

__all__ = [
    "FLOATS",
    "FP8",
    "INDEX",
    "SINGLE",
    "Header",
    "SourceTensor",
    "indexed_files",
    "read_header",
    "read_on_disk",
    "weight_files",
]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_HEADER_LIMIT = 100 << 20

#: Dtypes that hold weights as they are, by safetensors' names.
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
FP8 = "F8_E4M3"
_ITEM_BYTES = {"U8": 1, FP8: 1, **{name: dtype.itemsize for name, dtype in FLOATS.items()}}


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of a checkpoint, and where its bytes lie."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


#: The tensors of a file, and a few bytes from its middle: two fine-tunes have the same headers.
Header = tuple[list[SourceTensor], bytes]


def weight_files(path: Path) -> tuple[list[Path], set[str]]:
    """The safetensors files, and the tensors that must be in them, as far as an index says so."""
    if not path.is_dir():
        what = "is a file, not a folder" if path.exists() else "doesn't exist"
        raise CheckpointError(f"The checkpoint {path} {what}.")
    index = path / INDEX
    if not index.exists():
        if (path / SINGLE).exists():
            return [path / SINGLE], set()
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pt*"))
        why = "; its weights are pickled, and loading these can run any code" if pickled else ""
        raise CheckpointError(
            f"{path} has neither {INDEX} nor {SINGLE}{why}.",
            hint="Download or save the model in the safetensors format.",
        )
    found, tensors = indexed_files(index)
    return [path / name for name in found], tensors


def indexed_files(index: Path) -> tuple[list[str], set[str]]:
    """The names of the files that an index lists, sorted, and of the tensors in them.

    Raises:
        CheckpointError: it isn't an index.
    """
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{index} can't be used: {error!r}.", hint="Download this file again."
        ) from error
    if outside:
        raise CheckpointError(f"{index} names a file outside of its folder: {outside[0]!r}.")
    return names, set(weight_map)


def read_on_disk(file: Path) -> Header:
    """The header of a safetensors file.

    Raises:
        ValueError: it isn't one, or is truncated (the end of a sentence).
        OSError: it can't be read.
    """
    with file.open("rb") as f:

        def read(start: int, nbytes: int) -> bytes:
            f.seek(start)
            return f.read(nbytes)

        return read_header(file, file.stat().st_size, read)


def read_header(file: Path, size: int, read: Callable[[int, int], bytes]) -> Header:
    """The header of a safetensors file of `size` bytes.

    Args:
        read: gives the bytes from a start on, as many as asked for.

    Raises:
        ValueError: it isn't one, or is truncated (the end of a sentence).
    """
    length = int.from_bytes(read(0, 8), "little")
    if size < 8 or length > min(size - 8, _HEADER_LIMIT):
        raise ValueError("isn't a safetensors file, or is truncated")
    try:
        entries = json.loads(read(8, length))
        tensors = list(_entries(file, 8 + length, entries))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"has a damaged header ({error!r})") from error
    end = max((tensor.offset + tensor.nbytes for tensor in tensors), default=8 + length)
    if size < end:
        raise ValueError(f"is truncated: it has {size:,} of {end:,} bytes")
    return tensors, read(size // 2, 4096)


def _entries(file: Path, base: int, entries: dict[str, Any]) -> Iterable[SourceTensor]:
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        start, stop = entry["data_offsets"]
        shape = tuple(int(n) for n in entry["shape"])
        item = _ITEM_BYTES.get(entry["dtype"])
        if not 0 <= start <= stop or (item is not None and stop - start != math.prod(shape) * item):
            raise ValueError(f"{name} has the wrong size")
        yield SourceTensor(name, entry["dtype"], shape, file, base + start, stop - start)
