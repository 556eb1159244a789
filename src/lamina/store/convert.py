"""Makes a store out of a checkpoint.

A killed preparation goes on where it stopped: a file gets its name only when it is whole and on
disk, and the journal says which files have theirs. `store.json` comes last; a folder without it is
no store. The same call mends a store: files that are gone or of the wrong size are made anew, and
must come out as they were.

A checkpoint on disk is read block by block. One that comes file by file (`by_file`) is read in its
own order, and a block whose tensors come in several files is written in parts.

What is in memory at any time: one slice of the source, one matrix in bf16 and its codes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lamina.errors import StoreError
from lamina.models.spec import Block
from lamina.store.by_file import Progression, Supplier
from lamina.store.checkpoint import Checkpoint
from lamina.store.codec import CODECS
from lamina.store.encoder import Encoder, work_bytes
from lamina.store.files import Meter, Progress, Writer, check_space, folder_errors, locked
from lamina.store.jobs import block_jobs, extra_jobs, notes, used_tensors
from lamina.store.journal import ORIGIN, Record, write_origin
from lamina.store.layout import FORMAT, MANIFEST, Store
from lamina.store.parts import write_whole

__all__ = ["COPIED", "COPY_LIMIT", "convert", "is_copied", "prepare"]

#: Small files of the source that go along; never code, never pickles.
COPIED = ("*.json", "*.model", "*.txt", "*.jinja", "LICENSE*", "NOTICE*", "USE_POLICY*")
_NOT_COPIED = ("*.index.json", "*.py", "*.bin", "*.pt", MANIFEST, ORIGIN)
COPY_LIMIT = 128 << 20
_CONFIG = "config.json"
#: What a config says of how its weights were quantized; those of the store aren't, or otherwise.
_QUANTIZATION = "quantization_config"
#: For store.json and the journal: what a checksum or a tensor takes there, and some.
_RECORD_BYTES = 200


def prepare(
    checkpoint: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    model_type: str,
    config: dict[str, Any],
    blocks: Sequence[Block],
    codec: str = "nf4",
    prefixes: Sequence[str] = ("",),
    progress: Progress | None = None,
) -> Store:
    """Converts the checkpoint in the folder `checkpoint` into a store in the folder `out`, or goes
    on with that, or mends it. Returns at once if all is there.

    Args:
        config: the source's transformers config.
        prefixes: what may stand before a key in this checkpoint, in order of preference.
        progress: called with (bytes done, bytes in total, what is being written).

    Raises:
        CheckpointError: tensors are missing, of the wrong shape or dtype (all are listed, before
            anything is written), or not finite.
        StoreError: `out` holds something else or is being written, or the disk is full.
    """
    _check_codec(codec)
    return convert(
        Checkpoint.open(Path(checkpoint)),
        Path(out),
        model_type=model_type,
        config=config,
        blocks=blocks,
        codec=codec,
        prefixes=prefixes,
        progress=progress,
    )


def convert(
    source: Checkpoint,
    root: Path,
    *,
    model_type: str,
    config: dict[str, Any],
    blocks: Sequence[Block],
    codec: str,
    prefixes: Sequence[str],
    progress: Progress | None = None,
    supplier: Supplier | None = None,
    origin: dict[str, str] | None = None,
) -> Store:
    """As `prepare`, from an opened checkpoint.

    Args:
        supplier: brings the files of the checkpoint one at a time; None if all are there.
        origin: what to write into `origin.json`.
    """
    # 1. Plan: what must be written, where it comes from, what is there already.
    _check_codec(codec)
    jobs = block_jobs(source, blocks, codec, prefixes)
    used = used_tensors(jobs)
    extras = extra_jobs([t for name, t in sorted(source.tensors.items()) if name not in used])
    everything = [*jobs, *extras]
    identity = {
        "format": FORMAT,
        "model_type": model_type,
        "codec": codec,
        "config": json.loads(json.dumps({k: v for k, v in config.items() if k != _QUANTIZATION})),
        "source": source.identity,
    }
    with folder_errors(root):
        root.mkdir(parents=True, exist_ok=True)
        with locked(root):
            record = Record(root, identity)
            if origin is not None:
                write_origin(root, origin)
            todo = [job for job in everything if not record.has(job.file, job.nbytes)]
            copied = _to_copy(source.path, root)
            units = sum(len(job.ranges) for job in jobs)
            small = sum(f.stat().st_size for f in copied)
            small += _RECORD_BYTES * (units + len(source.tensors))
            total = sum(job.nbytes for job in everything)
            meter = Meter(progress, total, total - sum(job.nbytes for job in todo))
            tasks = [task for job in jobs for item in job.items if (task := item.task) is not None]
            largest = max((work_bytes(*task) for task in tasks), default=0)

            # 2. Write the files with tensors.
            if supplier is not None:
                going = Progression(source, root, todo, record, meter, supplier)
                going.check_space(small)
            else:
                check_space(root, sum(job.nbytes for job in todo) + small)
            (root / "blocks").mkdir(exist_ok=True)
            with Encoder(source, largest) as encoder:
                if supplier is not None:
                    going.run(encoder)
                else:
                    for job in todo:
                        write_whole(job, root, source, encoder, record, meter)

            # 3. Copy the small files, and say that the store is whole.
            for file in copied:
                _copy(file, root / file.name)
            files = [job.file for job in jobs], [job.file for job in extras]
            record.finish(*files, notes(jobs))
            return Store.open(root)


def _check_codec(codec: str) -> None:
    if codec not in CODECS:
        raise StoreError(f"There is no codec {codec!r}.", hint=f"Use one of {', '.join(CODECS)}.")


# Small files


def is_copied(name: str) -> bool:
    """Whether a file of a checkpoint goes along into the store, if it is small."""
    return any(fnmatch(name, pattern) for pattern in COPIED) and not any(
        fnmatch(name, pattern) for pattern in _NOT_COPIED
    )


def _to_copy(source: Path, root: Path) -> list[Path]:
    return [
        file
        for file in sorted(source.iterdir())
        if is_copied(file.name)
        and file.is_file()
        and file.stat().st_size <= COPY_LIMIT
        and not (root / file.name).exists()
    ]


def _copy(file: Path, to: Path) -> None:
    content = file.read_bytes()
    if file.name == _CONFIG and _QUANTIZATION in (config := json.loads(content)):
        del config[_QUANTIZATION]
        content = (json.dumps(config, indent=2) + "\n").encode()
    with Writer(to) as writer:
        writer.write(memoryview(content))
