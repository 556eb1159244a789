"""A step as a pipeline, unit by unit: read from disk, copied to the device, decoded and computed.

The forward has about half of the backward's arithmetic for the same bytes, and nearly all bytes of
a mixture belong to a fifth of its arithmetic. So reads and arithmetic don't simply hide behind
each other: how far ahead a ring lets the reads run decides, and taking the larger of both sums is
up to 1.6 times too fast. Each unit begins to be read when the one before it is read and the ring
has room, is copied when it is there and the device's ring has room, and is computed after that.

Many candidates (tokens, ring, cache) go through one simulation side by side.

U = units of a step, in the order of the walk, C = candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Pipeline", "simulate"]

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Pipeline:
    """The units of a step, and the machine they go through.

    Args:
        read_UC: bytes of each unit that come from disk.
        copy_UC: bytes that go to the device with each unit; of no meaning on CPU.
        held_UC: those of them that take room in the device's ring.
        compute_UC: seconds of its arithmetic, decoding included.
        ring_C: bytes that may be read and not yet released.
        device_ring_C: the same of the device's ring, or None on CPU, where nothing is copied and
            a unit is released once it is computed.
        disk, bus: bytes/s.
    """

    read_UC: Floats
    copy_UC: Floats
    held_UC: Floats
    compute_UC: Floats
    ring_C: Floats
    device_ring_C: Floats | None
    disk: float
    bus: float


def simulate(pipeline: Pipeline) -> Floats:
    """Seconds of a step `[C]` in the middle of a run, where its first reads started while the step
    before it was still computing."""
    units, candidates = pipeline.compute_UC.shape
    compute = np.concatenate([pipeline.compute_UC] * 2)
    read = np.concatenate([pipeline.read_UC] * 2)
    reading = read / pipeline.disk
    room = _room(read, pipeline.ring_C)
    # Row 0 is the beginning of time; row i + 1 is when unit i is done.
    computed = np.zeros((2 * units + 1, candidates))
    read_done = np.zeros(candidates)
    if pipeline.device_ring_C is None:
        for i in range(2 * units):
            np.maximum(read_done, computed.take(room[i]), out=read_done)
            read_done += reading[i]
            now = computed[i + 1]
            np.maximum(computed[i], read_done, out=now)
            now += compute[i]
    else:
        copying = np.concatenate([pipeline.copy_UC] * 2) / pipeline.bus
        device_room = _room(np.concatenate([pipeline.held_UC] * 2), pipeline.device_ring_C)
        copied = np.zeros_like(computed)
        for i in range(2 * units):
            np.maximum(read_done, copied.take(room[i]), out=read_done)
            read_done += reading[i]
            there, now = copied[i + 1], computed[i + 1]
            np.maximum(copied[i], computed.take(device_room[i]), out=there)
            np.maximum(there, read_done, out=there)
            there += copying[i]
            np.maximum(computed[i], there, out=now)
            now += compute[i]
    seconds: Floats = computed[-1] - computed[units]
    return seconds


def _room(nbytes: Floats, ring_C: Floats) -> NDArray[np.intp]:
    """For each unit, the row of the last one that must have been released for it to have room, as
    an index into the flattened rows."""
    total = np.cumsum(nbytes, axis=0)
    rows = np.empty(nbytes.shape, dtype=np.intp)
    for c in range(nbytes.shape[1]):
        last = np.searchsorted(total[:, c], total[:, c] - ring_C[c] - 0.5) + 1
        last[total[:, c] <= ring_C[c]] = 0
        # A unit larger than the ring passes alone.
        rows[:, c] = np.minimum(last, np.arange(len(last)))
    # What takes no bytes waits for no room.
    rows[nbytes == 0] = 0
    rows *= nbytes.shape[1]
    rows += np.arange(nbytes.shape[1])
    return rows
