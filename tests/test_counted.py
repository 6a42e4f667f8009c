"""Scores counted by value: exact while they are few, and the same in any order when they are many."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atpatch_onnx.running import counted
from atpatch_onnx.running.counted import Counts, ScoreCounter

SCORES = np.random.default_rng(0).normal(scale=3, size=4000).astype(np.float32)
WANTED = np.random.default_rng(1).random(4000) < 0.1


def count(parts: list[np.ndarray]) -> Counts:
    counter = ScoreCounter()
    for part in parts:
        counter.add(SCORES[part], WANTED[part])
    return counter.counts()


def test_few_scores_are_counted_exactly():
    found = count(np.array_split(np.arange(4000), 7))
    values, counts = np.unique(SCORES, return_counts=True)
    assert found.error == 0
    assert np.array_equal(found.scores, values)
    assert np.array_equal(found.wanted + found.others, counts)
    assert np.array_equal(found.wanted, [(WANTED & (value == SCORES)).sum() for value in values])


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=30))
def test_values_come_back_and_in_their_order(values):
    counter = ScoreCounter()
    counter.add(np.array(values, np.float32), np.ones(len(values), bool))
    found = counter.counts()
    assert np.array_equal(found.scores, np.unique(np.array(values, np.float32)))
    assert found.wanted.sum() == len(values)


@pytest.mark.parametrize("pending", [64, 10_000])
def test_many_scores_are_the_same_in_any_order_and_off_by_what_is_said(monkeypatch, pending):
    monkeypatch.setattr(counted, "MOST", 100)
    monkeypatch.setattr(counted, "_PENDING", pending)
    rng = np.random.default_rng(5)
    orders = [np.arange(4000), rng.permutation(4000), np.argsort(SCORES)]
    found = [count(np.array_split(order, pieces)) for order, pieces in zip(orders, (1, 13, 400), strict=True)]
    for other in found[1:]:
        for name in ("scores", "wanted", "others"):
            assert np.array_equal(getattr(other, name), getattr(found[0], name)), name
        assert other.error == found[0].error
    assert len(found[0].scores) <= 100
    assert 0 < found[0].error <= 1
    assert (found[0].wanted + found[0].others).sum() == 4000
    assert found[0].wanted.sum() == WANTED.sum()
    largest = np.sort(SCORES)[::-1]
    kept = np.repeat(found[0].scores, found[0].wanted + found[0].others)[::-1]
    assert (np.abs(kept - largest) <= found[0].error * np.abs(largest)).all()


def test_no_scores():
    found = ScoreCounter().counts()
    assert found.scores.size == found.wanted.size == 0
