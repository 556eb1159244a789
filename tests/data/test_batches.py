from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lamina.data.batches import Steps, make_batch, plan_steps
from lamina.data.template import Sample
from lamina.errors import DataError


@dataclass
class Fixed:
    """Samples of given lengths: sample i holds the ids 100 i, 100 i + 1, ..., all learned."""

    sizes: list[int]

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.array(self.sizes, dtype=np.int64)

    def __getitem__(self, index: int) -> Sample:
        ids = np.arange(100 * index, 100 * index + self.sizes[index], dtype=np.int32)
        return Sample(ids, np.arange(len(ids)) > 0, index)


def rows(steps: Steps) -> list[list[int]]:
    return [batch.rows for batch in steps]


def test_a_batch_is_ragged_and_never_looks_across() -> None:
    batch = make_batch([([5, 6, 7], [1, 0, 1]), ([8], [1]), ([9, 10], [0, 1])])
    assert batch.input_ids_T.tolist() == [5, 6, 7, 8, 9, 10]
    assert batch.cu_seqlens == [0, 3, 4, 6]
    assert batch.position_ids_T.tolist() == [0, 1, 2, 0, 0, 1]
    # Token 6 (7) is predicted from position 1, token 10 from position 4; 5 and 8 come first.
    assert batch.loss_index_L.tolist() == [1, 4]
    assert batch.targets_L.tolist() == [7, 10]
    assert (batch.num_tokens, batch.num_loss_tokens, batch.num_sequences) == (6, 2, 3)
    assert batch.max_length == 3
    assert batch.rows == [0, 1, 2]
    for bad in ([], [([], [])], [([1, 2], [1])]):
        with pytest.raises(ValueError, match="at least one token"):
            make_batch(bad)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    limit=st.integers(1, 30),
)
def test_groups_cover_the_sequences_in_order(sizes: list[int], limit: int) -> None:
    batch = make_batch([(range(n), [1] * n) for n in sizes])
    groups = batch.groups(limit)
    assert [n for g in groups for n in range(g.first, g.last)] == list(range(len(sizes)))
    for group in groups:
        assert group.start == sum(sizes[: group.first])
        assert group.num_tokens == sum(sizes[group.first : group.last])
        assert group.num_tokens <= limit or group.last - group.first == 1
    for a, b in itertools.pairwise(groups):
        assert a.num_tokens + sizes[b.first] > limit  # as few groups as the order allows


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=30),
    seed=st.integers(-5, 2**40),
    epochs=st.integers(1, 3),
)
def test_each_epoch_holds_every_sample_once(sizes: list[int], seed: int, epochs: int) -> None:
    steps = plan_steps(Fixed(sizes), 20, epochs=epochs, seed=seed)
    by_epoch: dict[int, list[int]] = {}
    for k, batch in enumerate(steps):
        assert batch.num_tokens <= 20
        by_epoch.setdefault(steps.epoch(k), []).extend(batch.rows)
        assert batch.input_ids_T.tolist() == [
            100 * row + t for row in batch.rows for t in range(sizes[row])
        ]
    assert list(by_epoch) == list(range(epochs))
    assert all(sorted(order) == list(range(len(sizes))) for order in by_epoch.values())
    assert len(rows(steps)) == len(steps)
    assert steps.progress(len(steps) - 1) == epochs


def test_steps_are_filled_greedily() -> None:
    steps = plan_steps(Fixed([4, 4, 3, 9, 1, 1]), 10, epochs=1, shuffle=False)
    assert rows(steps) == [[0, 1], [2], [3, 4], [5]]
    assert steps.steps_per_epoch == 4
    assert steps.progress(0) == pytest.approx(2 / 6)


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    samples = Fixed([1] * 50)
    first = rows(plan_steps(samples, 50, epochs=3, seed=1))
    assert first == rows(plan_steps(samples, 50, epochs=3, seed=1))
    assert first[0] != first[1] != first[2]
    assert first[0] != rows(plan_steps(samples, 50, epochs=1, seed=2))[0]
    # Fixed for ever: a run is resumed by its seed and step.
    assert rows(plan_steps(Fixed([1] * 6), 6, epochs=2, seed=0)) == [
        [4, 1, 5, 0, 3, 2],
        [5, 0, 2, 3, 1, 4],
    ]


def test_a_run_can_be_taken_up_at_any_step() -> None:
    samples = Fixed([3, 5, 2, 8, 1, 4, 4, 6])
    whole = rows(plan_steps(samples, 9, epochs=3, seed=7))
    for k in range(len(whole) + 1):
        resumed = plan_steps(samples, 9, epochs=3, seed=7)
        assert [batch.rows for batch in resumed.start_at(k)] == whole[k:]


def test_max_steps() -> None:
    samples = Fixed([5] * 4)
    assert len(plan_steps(samples, 10, max_steps=3)) == 3
    assert len(plan_steps(samples, 10, max_steps=9)) == 9
    assert plan_steps(samples, 10, max_steps=9).epoch(8) == 4
    assert len(plan_steps(samples, 10, max_steps=9, epochs=2)) == 4
    assert len(plan_steps(samples, 10, max_steps=3, epochs=2)) == 3
    longer = rows(plan_steps(samples, 10, max_steps=9))
    assert rows(plan_steps(samples, 10, max_steps=3)) == longer[:3]
    with pytest.raises(ValueError, match="epochs or max_steps"):
        plan_steps(samples, 10)
    with pytest.raises(IndexError):
        plan_steps(samples, 10, max_steps=3)[3]


def test_what_does_not_fit_a_step_is_named_beforehand() -> None:
    with pytest.raises(DataError) as caught:
        plan_steps(Fixed([3, 11, 4, *[12] * 12]), 10, epochs=1)
    assert "13 of 15 samples" in str(caught.value)
    assert caught.value.problems[0] == "Row 2 has 11 tokens."
    assert caught.value.problems[-1] == "... and 3 more."
    assert caught.value.hint is not None
    assert "at least 12" in caught.value.hint
    with pytest.raises(DataError, match="no samples"):
        plan_steps(Fixed([]), 10, epochs=1)
