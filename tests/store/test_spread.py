"""Which units a cache keeps."""

from __future__ import annotations

import numpy as np
import pytest

from lamina.store.spread import spread


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 1.0])
def test_a_cache_takes_the_same_share_everywhere(share: float) -> None:
    sizes = np.array([1000, *([300] * 40)] * 5)
    chosen = np.array(spread(sizes.tolist(), int(share * sizes.sum())))

    kept = sizes[chosen]
    assert kept.sum() <= share * sizes.sum()
    assert kept.sum() >= share * sizes.sum() - 1000
    halves = [sizes[:102] @ chosen[:102], sizes[102:] @ chosen[102:]]
    assert halves[0] == pytest.approx(halves[1], rel=0.2, abs=1000)
