"""The order of samples in an epoch, and how steps are filled with them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["fill", "mixed", "shuffled"]


def shuffled(size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """A permutation that depends on its arguments alone: numpy's own may change with its version,
    and a run must be resumable for years. Each index gets a key from SplitMix64."""
    with np.errstate(over="ignore"):
        base = mixed(mixed(np.array([seed], dtype=np.int64).view(np.uint64)) + np.uint64(epoch + 1))
        keys = mixed(base + np.arange(size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return np.argsort(keys, kind="stable")


def mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer: numbers that look random, each given by its own."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: NDArray[np.uint64] = x ^ (x >> np.uint64(31))
    return result


def fill(lengths: NDArray[np.int64], tokens_per_step: int) -> NDArray[np.int64]:
    """Where each step begins, if steps are filled with whole samples of these lengths, in order,
    for as long as they fit; ends with the number of samples. No sample may be longer than a step.
    """
    ends = np.cumsum(lengths)
    starts = [0]
    while starts[-1] < len(lengths):
        done = int(ends[starts[-1] - 1]) if starts[-1] else 0
        starts.append(int(np.searchsorted(ends, done + tokens_per_step, side="right")))
    return np.array(starts, dtype=np.int64)
