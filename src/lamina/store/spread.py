"""Which units of a store a cache keeps: sizes in, choices out, so that a plan can ask too."""

from __future__ import annotations

from collections.abc import Sequence


def spread(sizes: Sequence[int], budget: int) -> list[bool]:
    """Choose units within `budget` bytes: about the same share of every stretch of them."""
    fits = [0 < nbytes <= budget for nbytes in sizes]
    total = sum(nbytes for nbytes, fit in zip(sizes, fits, strict=True) if fit)
    share = min(1.0, budget / max(1, total))
    left, credit = budget, 0.0
    chosen = []
    for nbytes, fit in zip(sizes, fits, strict=True):
        credit += share * nbytes * fit
        take = fit and nbytes <= min(left, credit + 0.5)
        if take:
            left -= nbytes
            credit -= nbytes
        chosen.append(take)
    return chosen
