"""Rates against naive loops, intervals against scipy and published values."""

import json
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from atpatch_onnx.running.metrics import Difference, Rate, attack_above_floor, attack_success, flip_rate, infer_target

CLASSES = st.integers(0, 3)


@settings(deadline=None, derandomize=True)
@given(st.lists(st.booleans(), min_size=1, max_size=400))
def test_wilson_interval_is_scipys(hits):
    rate = Rate.of(np.array(hits))
    expected = binomtest(sum(hits), len(hits)).proportion_ci(0.95, method="wilson")
    # float64 rounding of two ways to write the same formula
    assert (rate.low, rate.high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert rate.value == sum(hits) / len(hits)
    assert rate.count == len(hits)
    assert 0 <= rate.low <= rate.value <= rate.high <= 1


@pytest.mark.parametrize(
    ("successes", "count", "low", "high"),
    [  # Newcombe 1998 (Statistics in Medicine 17, table I, method 3)
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_as_published(successes, count, low, high):
    rate = Rate.of(np.arange(count) < successes)
    assert (rate.low, rate.high) == pytest.approx((low, high), abs=5e-5)  # published to four decimals


def test_no_inputs_say_nothing():
    assert Rate.of(np.zeros(0, bool)) == Rate(0.0, 0.0, 1.0, 0)
    assert json.loads(json.dumps(asdict(Rate.of(np.ones(3, bool)))))["value"] == 1.0


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(CLASSES, CLASSES, CLASSES), max_size=60), CLASSES)
def test_attack_success_and_its_floor_by_loops(rows, target):
    triggered, labels, clean = (np.array([row[i] for row in rows], np.int64) for i in range(3))
    others = [(t, c) for t, y, c in rows if y != target]
    asr, floor = (attack_success(side, labels, target) for side in (triggered, clean))
    assert asr.count == floor.count == len(others)
    above = attack_above_floor(triggered, labels, clean, target)
    not_sent_anyway = [t for t, c in others if c != target]
    assert above.count == len(not_sent_anyway)
    if others:
        assert asr.value == pytest.approx(sum(t == target for t, _ in others) / len(others), abs=1e-15)  # rounding
        assert floor.value == pytest.approx(sum(c == target for _, c in others) / len(others), abs=1e-15)  # rounding
    if not_sent_anyway:
        share = sum(t == target for t in not_sent_anyway) / len(not_sent_anyway)
        assert above.value == pytest.approx(share, abs=1e-15)  # rounding


def test_attack_by_hand():
    labels = np.array([0, 0, 1, 1, 2, 2])
    clean = np.array([0, 2, 1, 1, 2, 0])
    triggered = np.array([2, 2, 2, 1, 2, 2])
    assert attack_success(triggered, labels, 2).value == 3 / 4
    assert attack_success(clean, labels, 2).value == 1 / 4
    assert attack_above_floor(triggered, labels, clean, 2).value == 2 / 3


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(CLASSES, CLASSES), min_size=1, max_size=60))
def test_flip_rate_by_a_loop(rows):
    one, other = np.array(rows).T
    assert flip_rate(one, other).value == pytest.approx(sum(a != b for a, b in rows) / len(rows), abs=1e-15)  # rounding
    assert flip_rate(one, other) == flip_rate(other, one)


@pytest.mark.parametrize(
    ("clean", "triggered", "target"),
    [
        ([0, 1, 2, 1], [2, 2, 2, 2], 2),
        ([0] * 10, [3] * 9 + [1], 3),  # nine of ten
        ([0] * 10, [3] * 8 + [1, 1], None),
        ([0, 1, 1], [1, 0, 2], None),
        ([0, 1], [0, 1], None),  # nothing changes
    ],
)
def test_the_target_is_where_changed_predictions_go(clean, triggered, target):
    assert infer_target(np.array(clean), np.array(triggered)) == target


@settings(deadline=None, derandomize=True)
@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=80))
def test_a_paired_difference_lies_in_its_interval(rows):
    before, after = (np.array([row[side] for row in rows], bool) for side in (0, 1))
    found, back = Difference.paired(before, after), Difference.paired(after, before)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert (found.value, found.low, found.high) == (-back.value, -back.high, -back.low)
    if rows:
        assert found.value == pytest.approx(before.mean() - after.mean(), abs=1e-12)  # rounding of two ways to count


def test_a_paired_interval_by_hand():
    """40 inputs: 3 lost, 1 gained, of which the others count only as inputs."""
    before, after = np.ones(40, bool), np.ones(40, bool)
    after[:3] = before[3] = False
    found = Difference.paired(before, after)
    centre, half = 2 / 42, 1.959963984540054 * np.sqrt(3 + 1 + 1 - 2**2 / 42) / 42
    assert (found.value, found.low, found.high) == pytest.approx((0.05, centre - half, centre + half))


def test_paired_intervals_hold_what_they_promise():
    """Drawn again and again, at least 93 of 100 hold the true difference: these intervals are a little wide."""
    rng = np.random.default_rng(0)
    held = []
    for _ in range(2000):
        before = rng.random(300) < 0.9
        after = np.where(rng.random(300) < 0.03, ~before, before)
        found = Difference.paired(before, after)
        held.append(found.low <= 0.03 * (0.9 - 0.1) <= found.high)
    assert 0.93 <= np.mean(held) <= 0.99
