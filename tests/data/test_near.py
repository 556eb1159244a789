from __future__ import annotations

import random
from array import array

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.data.fingerprints import FrequentAnswers, HashIndex
from lamina.data.near import NearIndex, sketch


def grams(text: str) -> set[bytes]:
    data = " ".join(text.lower().split()).encode()
    return {data[k : k + 8] for k in range(len(data) - 7)}


def jaccard(one: str, other: str) -> float:
    a, b = grams(one), grams(other)
    return len(a & b) / len(a | b)


def test_similarities_are_close_to_the_true_ones() -> None:
    generator = random.Random(0)
    base = [str(generator.randrange(10**6)) for _ in range(150)]
    texts = [" ".join(base)]
    for changes in range(1, 40):
        words = list(base)
        for k in generator.sample(range(150), changes):
            words[k] = "x" * (k % 7)
        texts.append(" ".join(words))
    index = NearIndex()
    index.add(sketch(texts))
    found = {other: similarity for first, other, similarity in index.pairs(0.7) if first == 0}
    true = {k: jaccard(texts[0], text) for k, text in enumerate(texts) if k}
    assert {k for k, value in true.items() if value > 0.88} <= set(found)
    assert all(true[k] > 0.55 for k in found)
    errors = [abs(found[k] - true[k]) for k in found]
    assert np.mean(errors) < 0.06


def test_unlike_rows_are_not_paired() -> None:
    generator = random.Random(2)
    texts = ["", "short", "same"] + [
        " ".join(str(generator.randrange(10**6)) for _ in range(40)) for _ in range(500)
    ]
    index = NearIndex()
    for k in range(0, len(texts), 100):
        index.add(sketch(texts[k : k + 100]))
    assert list(index.pairs(0.5)) == []


def test_case_and_white_space_make_no_difference() -> None:
    index = NearIndex()
    index.add(sketch(["The same  words,\nhere", "THE SAME words, here", "tiny"]))
    assert {(a, b) for a, b, _ in index.pairs()} == {(0, 1)}


def test_texts_of_a_batch_do_not_mix() -> None:
    texts = ["abcdefghijkl", "mnopqrstuvwx", "abcdefghijklmnopqrstuvwx"]
    together = sketch(texts)
    for k, text in enumerate(texts):
        assert np.array_equal(sketch([text]).signatures[0], together.signatures[k])


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.integers(0, 6), max_size=60),
    limit=st.integers(1, 50),
)
def test_groups_of_equal_hashes(values: list[int], limit: int) -> None:
    spread = [value * 0x2AAAAAAAAAAAAAAB % 2**64 for value in values]
    index = HashIndex(limit)
    for place, value in enumerate(spread):
        index.add(value, place)
    expected = sorted(
        [k for k, v in enumerate(spread) if v == value]
        for value in set(spread)
        if spread.count(value) > 1
    )
    assert sorted(group.tolist() for group in index.groups()) == expected
    assert list(index.groups()) == []


def test_a_large_index_goes_to_files() -> None:
    index = HashIndex(1000)
    values = np.arange(50_000, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    for start in range(0, 50_000, 5000):
        part = slice(start, start + 5000)
        index.extend(values[part], np.arange(start, start + 5000, dtype=np.uint64))
    assert index._hashes == array("Q")
    index.add(int(values[7]), 50_000)
    assert [group.tolist() for group in index.groups()] == [[7, 50_000]]


@given(st.lists(st.sampled_from("aaaaabbbcdefghij"), max_size=200), st.integers(2, 8))
def test_frequent_answers_are_never_missed(answers: list[str], slots: int) -> None:
    sketch = FrequentAnswers(slots)
    for place, answer in enumerate(answers):
        sketch.add(answer, place)
    sketch.rows = len(answers)
    found = {answer: count for answer, count, _ in sketch.above(0, 1)}
    for answer in set(answers):
        count = answers.count(answer)
        if count > len(answers) / slots:
            assert answer in found
        assert found.get(answer, 0) <= count


def test_counts_are_exact_while_there_is_room() -> None:
    sketch = FrequentAnswers(4)
    for place, answer in enumerate("aabab"):
        sketch.add(answer, place)
    sketch.rows = 5
    assert list(sketch.above(0.5, 1)) == [("a", 3, 0)]
    with pytest.raises(StopIteration):
        next(iter(sketch.above(0.9, 1)))
