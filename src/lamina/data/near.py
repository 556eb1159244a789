"""Finding rows that are nearly the same: MinHash over byte 8-grams, with locality-sensitive
hashing.

Similarity is the Jaccard index of two texts' sets of 8-grams, after folding case and white space.
A row's signature has 64 minima, one of each part of the hash space. Of each, 4 bits are kept (32
bytes a row), from which the similarity of a pair is estimated to about 0.05; ten bands of six
minima each say which pairs to look at: of pairs with a similarity of 0.8 that finds 95%, of 0.9 all
but 1 in 2,000.

n = bytes of all texts of a batch, R = its rows, B = 64 minima.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

from lamina.data.fingerprints import HashIndex

__all__ = ["NearIndex", "Sketch", "sketch"]

_GRAM = 8
_BINS = 64
_BANDS, _ROWS = 10, 6
_EMPTY = np.uint64(2**64 - 1)
_MULTIPLIERS = np.random.default_rng(8).integers(1, 2**63, _GRAM, dtype=np.uint64) | np.uint64(1)

#: Rows that are hashed in one go.
_AT_ONCE = 64

#: Leaders of a group that a further row is compared with.
_LEADERS = 16


@dataclass
class Sketch:
    """What is kept of some rows.

    Args:
        signatures: `[R, 32]`: the low four bits of each minimum.
        found: `[R]`: whether the row is long enough to be compared.
        keys: `[those, bands]`: a hash of each band of their minima.
    """

    signatures: NDArray[np.uint8]
    found: NDArray[np.bool_]
    keys: NDArray[np.uint64]

    def to_blobs(self) -> list[bytes]:
        return [self.signatures.tobytes(), self.found.tobytes(), self.keys.tobytes()]

    @staticmethod
    def from_blobs(blobs: Sequence[bytes]) -> Sketch:
        signatures, found, keys = blobs
        return Sketch(
            np.frombuffer(signatures, dtype=np.uint8).reshape(-1, _BINS // 2),
            np.frombuffer(found, dtype=np.bool_),
            np.frombuffer(keys, dtype=np.uint64).reshape(-1, _BANDS),
        )


def sketch(texts: Sequence[str]) -> Sketch:
    """What is kept of rows with these texts. One shorter than an 8-gram is like no other."""
    parts = [_sketch(texts[k : k + _AT_ONCE]) for k in range(0, len(texts), _AT_ONCE)]
    if not parts:
        return Sketch.from_blobs([b"", b"", b""])
    return Sketch(
        np.concatenate([part.signatures for part in parts]),
        np.concatenate([part.found for part in parts]),
        np.concatenate([part.keys for part in parts]),
    )


def _sketch(texts: Sequence[str]) -> Sketch:
    folded = [" ".join(text.lower().split()).encode("utf-8", "replace") for text in texts]
    minima_RB, found = _minima(folded)
    bands = [
        _combine(minima_RB[found, band * _ROWS : (band + 1) * _ROWS], band)
        for band in range(_BANDS)
    ]
    return Sketch(_four_bits(minima_RB), found, np.stack(bands, axis=1))


class NearIndex:
    """Collects sketches of rows, then says which are nearly the same.

    Args:
        limit: hashes kept in memory before they go to temporary files.
    """

    def __init__(self, limit: int = 2_000_000):
        self._bands = HashIndex(limit)
        self._signatures: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._count = 0

    def add(self, sketches: Sketch) -> None:
        """Add rows; they are numbered in the order they come, from 0."""
        size = len(sketches.found)
        self._signatures.write(sketches.signatures.tobytes())
        numbers = np.arange(self._count, self._count + size, dtype=np.uint64)[sketches.found]
        for band in range(_BANDS):
            self._bands.extend(sketches.keys[:, band], numbers)
        self._count += size

    def pairs(self, threshold: float = 0.8) -> Iterator[tuple[int, int, float]]:
        """Rows that are nearly the same: an earlier row, a later one, and their similarity. Of a
        group of like rows, each is paired with the first or another leader of it, not with all.
        Pairs may come more than once. The index is empty afterwards."""
        self._signatures.flush()
        if not self._count:
            return
        signatures = np.memmap(self._signatures, dtype=np.uint8, mode="r").reshape(self._count, -1)
        seen: set[int] = set()
        for places in self._bands.groups():
            rows = places.astype(np.int64)
            # The same group usually comes once for each band.
            key = hash(rows.tobytes())
            if key in seen:
                continue
            if len(seen) < 1_000_000:
                seen.add(key)
            yield from _similar(rows, signatures, threshold)
        del signatures
        self.close()

    def close(self) -> None:
        self._signatures.close()
        self._bands.close()


def _similar(
    rows: NDArray[np.int64], signatures: NDArray[np.uint8], threshold: float
) -> Iterator[tuple[int, int, float]]:
    """Pairs within a group of rows that share a band."""
    rest = rows
    for _ in range(_LEADERS):
        if len(rest) < 2:
            return
        leader, others = int(rest[0]), rest[1:]
        same = _similarity(signatures[leader], signatures[others])
        alike = same >= threshold
        for row, similarity in zip(others[alike], same[alike], strict=True):
            yield leader, int(row), float(similarity)
        rest = others[~alike]


def _similarity(one: NDArray[np.uint8], others: NDArray[np.uint8]) -> NDArray[np.float64]:
    """The estimated Jaccard index of one signature with each of others."""
    differ = np.bitwise_xor(one, others)
    equal = ((differ & 15) == 0).sum(axis=1) + ((differ >> 4) == 0).sum(axis=1)
    # One in 16 pairs of unequal minima agrees in 4 bits.
    similarity: NDArray[np.float64] = np.maximum(0, (equal / _BINS - 1 / 16) / (1 - 1 / 16))
    return similarity


def _minima(texts: Sequence[bytes]) -> tuple[NDArray[np.uint64], NDArray[np.bool_]]:
    """`[R, B]` minima of each text's 8-gram hashes, one of each part of the hash space; and
    whether a text has any. A part without a hash takes the next part's minimum."""
    joined = b"".join(texts)
    sizes = np.array([len(text) for text in texts], dtype=np.int64)
    minima = np.full(len(texts) * _BINS, _EMPTY, dtype=np.uint64)
    if len(joined) >= _GRAM:
        bytes_n = np.frombuffer(joined, dtype=np.uint8).astype(np.uint64)
        hashes = np.zeros(len(joined) - _GRAM + 1, dtype=np.uint64)
        for k in range(_GRAM):
            hashes += bytes_n[k : k + len(hashes)] * _MULTIPLIERS[k]
        hashes ^= hashes >> np.uint64(29)
        hashes *= np.uint64(0xBF58476D1CE4E5B9)
        hashes ^= hashes >> np.uint64(32)
        row_n = np.repeat(np.arange(len(texts)), sizes)[: len(hashes)]
        ends = np.cumsum(sizes)
        whole = np.arange(len(hashes)) + _GRAM <= ends[row_n]  # not across two texts
        hashes, row_n = hashes[whole], row_n[whole]
        bins = row_n * _BINS + (hashes >> np.uint64(58)).astype(np.int64)
        np.minimum.at(minima, bins, hashes)
    minima_RB = minima.reshape(-1, _BINS)
    has = minima_RB != _EMPTY
    found_R = has.any(axis=1)
    gaps = found_R & ~has.all(axis=1)
    if gaps.any():
        minima_RB[gaps] = _filled(minima_RB[gaps], has[gaps])
    return minima_RB, found_R


def _filled(minima_RB: NDArray[np.uint64], has: NDArray[np.bool_]) -> NDArray[np.uint64]:
    """Each empty part takes the minimum of the next part that has one, going round, changed by how
    far that is."""
    twice = np.concatenate([has, has], axis=1)
    at = np.where(twice, np.arange(2 * _BINS), 2 * _BINS)
    following = np.minimum.accumulate(at[:, ::-1], axis=1)[:, ::-1][:, :_BINS]
    distance = (following - np.arange(_BINS)).astype(np.uint64)
    taken = np.take_along_axis(minima_RB, following % _BINS, axis=1)
    filled: NDArray[np.uint64] = taken + distance * np.uint64(0x9E3779B97F4A7C15)
    return filled


def _four_bits(minima_RB: NDArray[np.uint64]) -> NDArray[np.uint8]:
    low = (minima_RB & np.uint64(15)).astype(np.uint8)
    return low[:, ::2] | (low[:, 1::2] << np.uint8(4))


def _combine(minima: NDArray[np.uint64], band: int) -> NDArray[np.uint64]:
    key = np.full(len(minima), band + 1, dtype=np.uint64)
    for column in range(minima.shape[1]):
        key = (key ^ minima[:, column]) * np.uint64(0x94D049BB133111EB)
        key ^= key >> np.uint64(31)
    return key
