"""The pipeline against what can be said in closed form, and against a plain simulation."""

from __future__ import annotations

import numpy as np
import pytest

from lamina.plan.simulate import Pipeline, simulate


def pipeline(
    read: list[float],
    compute: list[float],
    *,
    ring: float,
    disk: float = 1.0,
    copy: list[float] | None = None,
    device_ring: float | None = None,
    bus: float = 1.0,
) -> Pipeline:
    column = lambda values: np.array(values, dtype=np.float64)[:, None]  # noqa: E731
    held = column(copy or [0.0] * len(read))
    return Pipeline(
        column(read),
        held,
        held,
        column(compute),
        np.array([ring]),
        None if device_ring is None else np.array([device_ring]),
        disk,
        bus,
    )


def plain(read: list[float], compute: list[float], ring: float, disk: float) -> float:
    """Time in small ticks: what the simulation must give, in the most obvious way."""
    tick, units = 0.001, len(read)
    order_read = [n / disk for n in read] * 2
    order_compute, sizes = compute * 2, read * 2
    reading = computing = 0
    left_read, left_compute = order_read[0], order_compute[0]
    clock, ends = 0.0, []
    while computing < 2 * units:
        held = sum(sizes[computing:reading])
        if reading < 2 * units:
            alone = reading == computing
            if held + sizes[reading] <= ring or alone or sizes[reading] == 0:
                left_read -= tick
                if left_read <= tick / 2:
                    reading += 1
                    left_read = order_read[reading] if reading < 2 * units else 0.0
        if computing < reading:
            left_compute -= tick
            if left_compute <= tick / 2:
                computing += 1
                ends.append(clock + tick)
                left_compute = order_compute[computing] if computing < 2 * units else 0.0
        clock += tick
    return ends[-1] - ends[units - 1]


def test_a_large_ring_hides_the_smaller_of_both() -> None:
    assert simulate(pipeline([1] * 10, [2] * 10, ring=100))[0] == pytest.approx(20)
    assert simulate(pipeline([2] * 10, [1] * 10, ring=100))[0] == pytest.approx(20, rel=0.1)


def test_without_room_to_read_ahead_it_is_the_sum() -> None:
    assert simulate(pipeline([2] * 10, [3] * 10, ring=2))[0] == pytest.approx(50)


def test_a_unit_larger_than_the_ring_passes_alone() -> None:
    assert simulate(pipeline([5] * 4, [1] * 4, ring=2))[0] == pytest.approx(24)


def test_bytes_and_arithmetic_in_different_places_need_a_deep_ring() -> None:
    """Four units with all the bytes, then four with all the arithmetic, as in Maverick."""
    read, compute = [10.0] * 4 + [0.0] * 4, [0.0] * 4 + [10.0] * 4

    shallow = simulate(pipeline(read, compute, ring=10))[0]
    deep = simulate(pipeline(read, compute, ring=40))[0]

    assert deep == pytest.approx(40)
    assert shallow == pytest.approx(70)


def test_copies_are_a_stage_of_their_own() -> None:
    both = {"copy": [1.0] * 10, "device_ring": 100.0}
    assert simulate(pipeline([1] * 10, [2] * 10, ring=100, **both))[0] == pytest.approx(20)
    slow = simulate(pipeline([1] * 10, [1] * 10, ring=100, bus=0.25, **both))[0]
    assert slow == pytest.approx(40, rel=0.1)
    # With room for one unit, each is copied after the one before it is computed.
    one = {"copy": [1.0] * 10, "device_ring": 1.0}
    assert simulate(pipeline([0] * 10, [2] * 10, ring=100, **one))[0] == pytest.approx(30)


@pytest.mark.parametrize("seed", range(8))
def test_against_a_plain_simulation(seed: int) -> None:
    random = np.random.default_rng(seed)
    read = [float(n) for n in random.integers(0, 4, 12)]
    compute = [float(n) / 10 for n in random.integers(1, 9, 12)]
    ring = float(random.integers(2, 12))

    found = simulate(pipeline(read, compute, ring=ring, disk=5.0))[0]

    assert found == pytest.approx(plain(read, compute, ring, 5.0), abs=0.1)


def test_candidates_do_not_touch_each_other() -> None:
    one = pipeline([3, 1, 4, 1], [1, 5, 9, 2], ring=4)
    two = pipeline([2, 7, 1, 8], [2, 8, 1, 8], ring=9)
    both = Pipeline(
        *(
            np.concatenate([getattr(one, name), getattr(two, name)], axis=1)
            for name in ("read_UC", "copy_UC", "held_UC", "compute_UC")
        ),
        ring_C=np.array([4.0, 9.0]),
        device_ring_C=None,
        disk=1.0,
        bus=1.0,
    )

    assert simulate(both) == pytest.approx([simulate(one)[0], simulate(two)[0]])
