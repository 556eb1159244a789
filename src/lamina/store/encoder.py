"""Encodes the matrices of a checkpoint ahead of their being written, on several threads.

Each thread is the only one that torch uses for its work: many short parallel loops would spend more
time in waiting for each other than in working as soon as the machine has something else to do (8
times as slow was measured). How many matrices are worked on at once is bounded by memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import torch
from torch import Tensor

from lamina.errors import CheckpointError
from lamina.store.checkpoint import Checkpoint, Rows
from lamina.store.codec import encode
from lamina.store.pieces import StoredTensor
from lamina.store.quantized import Nf4

__all__ = ["Encoder", "Task", "not_finite", "work_bytes"]

#: What the matrices being worked on may take.
_WORK_BYTES = 2 << 30

#: A matrix to be encoded, and where it comes from.
Task = tuple[StoredTensor, Sequence[Rows]]


class Encoder:
    """Encodes matrices in the order given, some ahead.

    Args:
        largest: bytes that the largest task takes while it is worked on (see `work_bytes`).
    """

    def __init__(self, source: Checkpoint, largest: int):
        self._source = source
        self._threads = torch.get_num_threads()
        self._workers = max(1, min(self._threads, _WORK_BYTES // max(1, largest)))

    def __enter__(self) -> Self:
        torch.set_num_threads(1)  # for threads yet to start, too
        self._pool = ThreadPoolExecutor(self._workers, "lamina-encode")
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)

    def encoded(self, tasks: Iterable[Task]) -> Iterator[dict[str, Tensor]]:
        """The pieces of each matrix, in order.

        Raises:
            CheckpointError: a matrix can't be read, or isn't finite.
        """
        ahead: deque[Future[dict[str, Tensor]]] = deque()
        for task in tasks:
            ahead.append(self._pool.submit(self._encode, task))
            if len(ahead) > self._workers:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()

    def _encode(self, task: Task) -> dict[str, Tensor]:
        tensor, rows = task
        try:
            if tensor.wide_scales:
                # Parts that bitsandbytes has quantized stay as they are.
                parts = [self._wide(row) for row in rows]
                return {suffix: torch.cat([p[suffix] for p in parts]) for suffix in parts[0]}
            return encode(self._matrix(tensor.shape, rows), tensor.codec)
        except ValueError as error:
            raise not_finite(self._source, rows) from error

    def _wide(self, row: Rows) -> dict[str, Tensor]:
        if isinstance(row.scheme, Nf4):
            codes, scales = self._source.kept(row)
            if not bool(torch.isfinite(scales).all()):
                raise ValueError("a scale is NaN or infinite")
            return {"": codes, ".absmax": scales}
        pieces = encode(self._matrix(row.shape, [row]), "nf4")
        return {"": pieces[""], ".absmax": pieces[".absmax"].float()}

    def _matrix(self, shape: Sequence[int], rows: Sequence[Rows]) -> Tensor:
        matrix = torch.empty(tuple(shape), dtype=torch.bfloat16)
        at = 0
        for row in rows:
            for chunk in self._source.rows(row):
                matrix[at : at + len(chunk)].copy_(chunk.to(torch.bfloat16))
                at += len(chunk)
        return matrix


def work_bytes(tensor: StoredTensor, rows: Sequence[Rows]) -> int:
    """About what encoding a matrix takes: the source's bytes, the matrix in bf16 and its pieces."""
    n = torch.Size(tensor.shape).numel()
    source = max((row.work_bytes for row in rows), default=0)
    return source + 2 * n + sum(piece.nbytes for piece in tensor.pieces)


def not_finite(source: Checkpoint, rows: Sequence[Rows]) -> CheckpointError:
    """The error about a matrix that isn't finite: names the rows that aren't."""
    bad = [
        str(row)
        for row in rows
        if not all(bool(torch.isfinite(chunk.bfloat16()).all()) for chunk in source.rows(row))
    ]
    return CheckpointError(
        f"{' and '.join(bad)} of {source.path} has weights that are NaN or infinite.",
        hint="Such a model can't be tuned: get its checkpoint again.",
    )
