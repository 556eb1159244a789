"""Blocks of lines, worked on by several processes.

The workers are ordinary Python processes that read blocks from their standard input and write
results to their standard output: unlike `multiprocessing`'s they start the same way from a script,
a notebook or a program with threads, and nothing is pickled. A message is a JSON header and some
blobs of bytes.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, cast

from lamina.data.containers import Source, open_bytes, reading
from lamina.errors import DataError

__all__ = [
    "Block",
    "Message",
    "cores",
    "line_blocks",
    "map_blocks",
    "read_message",
    "write_message",
]

BLOCK_BYTES = 1 << 20

#: Less data than this isn't worth starting processes for.
WORTH_BYTES = 32 << 20

#: The folder that this package lies in: the workers must be of the same version.
_IMPORTED_FROM = str(Path(__file__).parents[2])


@dataclass
class Message:
    """What goes between processes: values that JSON holds, and bytes."""

    values: dict[str, Any]
    blobs: list[bytes] = field(default_factory=list)


#: What a worker does with a block: its options, the number of its first line, its bytes.
Task = Callable[[dict[str, Any], int, bytes], Message]


@dataclass
class Block:
    """Whole lines of a file.

    Args:
        source: the index of the file.
        first: the number of its first line, from 1.
    """

    source: int
    first: int
    data: bytes


def cores() -> int:
    """The processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def line_blocks(index: int, source: Source) -> Iterator[Block]:
    """A file in blocks of whole lines."""
    with reading(source), open_bytes(source) as file:
        if source.bom:
            file.read(3)
        first = 1
        while data := file.read(BLOCK_BYTES):
            data += file.readline()
            yield Block(index, first, data)
            first += data.count(b"\n")


def map_blocks(
    task: str, function: Task, options: dict[str, Any], blocks: Iterable[Block], size: int
) -> Iterator[tuple[Block, Message]]:
    """Each block with the result of a task, in order.

    Args:
        task: the name of the task in `worker`.
        function: the same task, for this process.
        size: about how many bytes there are.

    Raises:
        DataError: the task did.
    """
    count = cores()
    if size < WORTH_BYTES or count < 2:
        for block in blocks:
            yield block, function(options, block.first, block.data)
        return
    with ExitStack() as stack:
        idle: SimpleQueue[_Worker] = SimpleQueue()
        for _ in range(count):
            idle.put(stack.enter_context(_Worker(task, options)))
        pool = stack.enter_context(ThreadPoolExecutor(count))

        def run(block: Block) -> Message:
            worker = idle.get()
            try:
                return worker.run(block)
            finally:
                idle.put(worker)

        waiting: deque[tuple[Block, Future[Message]]] = deque()
        try:
            for block in blocks:
                waiting.append((block, pool.submit(run, block)))
                if len(waiting) >= 2 * count:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


class _Worker:
    """A process that does one task."""

    def __init__(self, task: str, options: dict[str, Any]):
        path = os.pathsep.join(filter(None, [_IMPORTED_FROM, os.environ.get("PYTHONPATH")]))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "lamina.data.worker", task],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path},
            # Ctrl-C must not reach it, at no time: this process ends it.
            process_group=0,
        )
        write_message(self._input, Message(options))

    @property
    def _input(self) -> BinaryIO:
        return cast(BinaryIO, self._process.stdin)

    def __enter__(self) -> _Worker:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        self._input.close()
        cast(BinaryIO, self._process.stdout).close()

    def run(self, block: Block) -> Message:
        write_message(self._input, Message({"first": block.first}, [block.data]))
        result = read_message(cast(BinaryIO, self._process.stdout))
        if result is None:
            raise RuntimeError("a worker process of lamina.data ended early")
        if "error" in result.values:
            raise DataError(result.values["error"], hint=result.values["hint"])
        return result


def write_message(file: BinaryIO, message: Message) -> None:
    header = json.dumps(message.values).encode()
    sizes = [len(header), *map(len, message.blobs)]
    file.write(struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes))
    file.write(header)
    for blob in message.blobs:
        file.write(blob)
    file.flush()


def read_message(file: BinaryIO) -> Message | None:
    """The next message, or None at the end."""
    start = file.read(4)
    if len(start) < 4:
        return None
    (count,) = struct.unpack("<I", start)
    sizes = struct.unpack(f"<{count}Q", file.read(8 * count))
    header, *blobs = [file.read(size) for size in sizes]
    return Message(json.loads(header), blobs)
