"""Calibration: one budget of flagged clean inputs for all detecting sites together."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from atpatch_onnx.fitting.thresholds import calibrate, gap

SCORES = st.floats(-2, 2, width=32)


@st.composite
def scored(draw: st.DrawFn) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    inputs, sites = draw(st.integers(1, 60)), draw(st.integers(1, 4))
    clean, anomalous = {}, {}
    for number in range(sites):
        clean[f"s{number}"] = draw(arrays.arrays(np.float32, inputs, elements=SCORES))
        anomalous[f"s{number}"] = draw(arrays.arrays(np.float32, draw(st.integers(1, 30)), elements=SCORES))
    return clean, anomalous


def flagged(clean: dict[str, np.ndarray], thresholds: dict[str, float]) -> float:
    return float(
        np.mean([any(clean[s][i] > thresholds[s] for s in clean) for i in range(len(next(iter(clean.values()))))])
    )


@settings(deadline=None, derandomize=True)
@given(scored(), st.floats(0, 1), st.booleans())
def test_clean_inputs_flagged_at_any_site_stay_within_the_budget(drawn, rate, lowest):
    clean, anomalous = drawn
    thresholds = calibrate(clean, anomalous, rate, lowest=lowest)
    assert thresholds.keys() == clean.keys()
    assert flagged(clean, thresholds) <= rate


@settings(deadline=None, derandomize=True)
@given(scored(), st.floats(0, 1), st.booleans())
def test_the_budget_holds_once_thresholds_are_float32_as_in_the_patch(drawn, rate, lowest):
    clean, anomalous = drawn
    thresholds = calibrate(clean, anomalous, rate, lowest=lowest)
    rounded = {site: float(np.float32(value)) for site, value in thresholds.items()}
    assert flagged(clean, rounded) <= rate


@settings(deadline=None, derandomize=True)
@given(scored(), st.floats(0, 1), st.floats(0, 1), st.booleans())
def test_a_larger_budget_never_raises_a_threshold(drawn, one, other, lowest):
    clean, anomalous = drawn
    strict, loose = (calibrate(clean, anomalous, rate, lowest=lowest) for rate in sorted((one, other)))
    assert all(loose[site] <= strict[site] for site in clean)


@settings(deadline=None, derandomize=True)
@given(scored(), st.floats(0, 1))
def test_a_site_whose_scores_are_apart_spends_nothing(drawn, rate):
    clean, anomalous = drawn
    anomalous = {**anomalous, "s0": clean["s0"].max() + np.float32(1) + np.abs(anomalous["s0"])}
    thresholds = calibrate(clean, anomalous, rate)
    assert not (clean["s0"] > thresholds["s0"]).any()
    assert (anomalous["s0"] > thresholds["s0"]).all()
    if len(clean) > 1:  # and it leaves the whole budget to the others
        others = {site: scores for site, scores in clean.items() if site != "s0"}
        assert calibrate(others, anomalous, rate) == {site: thresholds[site] for site in others}


def test_thresholds_by_hand():
    clean = {"apart": np.float32([0, 0.25, 0.5, 0.5]), "mixed": np.float32([4, 3, 2, 1])}
    anomalous = {"apart": np.full(8, 1.5, np.float32), "mixed": np.full(8, 2.5, np.float32)}
    # Half of four inputs may be flagged: two may exceed the third largest score, 2; the middle between it and 2.5.
    assert calibrate(clean, anomalous, 0.5) == {"apart": 1.0, "mixed": 2.25}
    # With more, a third would be flagged for nothing: all anomalous columns are named already.
    assert calibrate(clean, anomalous, 1.0) == {"apart": 1.0, "mixed": 2.25}
    # A quarter: flagging the largest would name no anomalous column, so it is not done.
    assert calibrate(clean, anomalous, 0.25) == calibrate(clean, anomalous, 0.0) == {"apart": 1.0, "mixed": 4.0}


def test_two_mixed_sites_share_what_one_would_have():
    # Each site has other inputs at its top, so the same rank at both flags twice as many inputs.
    rising, falling = np.arange(100, dtype=np.float32), np.arange(100, dtype=np.float32)[::-1].copy()
    within = np.linspace(80.25, 99.25, 40, dtype=np.float32)  # two anomalous columns between every two clean inputs
    alone = calibrate({"a": rising}, {"a": within}, 0.1)
    both = calibrate({"a": rising, "b": falling}, {"a": within, "b": within}, 0.1)
    assert (rising > alone["a"]).sum() == 10
    assert (rising > both["a"]).sum() == (falling > both["b"]).sum() == 5


def test_a_site_that_tells_nothing_apart_flags_nothing():
    clean = {"s": np.arange(100, dtype=np.float32)}
    assert calibrate(clean, {"s": np.full(10, -1, np.float32)}, 0.1) == {"s": 99.0}


def test_single_outliers_among_anomalous_scores_cost_no_clean_input():
    clean = {"s": np.linspace(0, 0.5, 100, dtype=np.float32)}
    anomalous = {"s": np.r_[np.full(999, 1), -1].astype(np.float32)}
    assert calibrate(clean, anomalous, 0.05) == {"s": 0.75}
    assert gap(clean["s"], anomalous["s"]) == 0.5


def test_a_single_outlier_among_clean_inputs_costs_one_of_the_budget():
    clean = {"s": np.r_[np.zeros(99), 5].astype(np.float32)}
    anomalous = {"s": np.full(100, 1, np.float32)}
    assert calibrate(clean, anomalous, 0.05) == {"s": 0.5}
    assert calibrate(clean, anomalous, 0.0) == {"s": 5.0}


def test_without_anomalous_scores_nothing_clean_is_flagged():
    clean = {"s": np.arange(10, dtype=np.float32)}
    empty = np.zeros(0, np.float32)
    assert calibrate(clean, {"s": empty}, 0.1) == {"s": 9.0}
    assert gap(clean["s"], empty) == -np.inf


@pytest.mark.parametrize(("anomalous", "expected"), [([3, 3, 3], 1.0), ([1, 1, 1], -1.0)])
def test_gap_by_hand(anomalous, expected):
    assert gap(np.float32([0, 1, 2]), np.float32(anomalous)) == expected


@settings(deadline=None, derandomize=True)
@given(scored(), st.floats(0, 1))
def test_the_lowest_thresholds_depend_on_clean_scores_only_and_are_never_higher(drawn, rate):
    clean, anomalous = drawn
    others = {site: scores + np.float32(1) for site, scores in anomalous.items()}
    (site,) = list(clean)[:1]
    for one in (clean, {site: clean[site]}):
        known = {name: anomalous[name] for name in one}
        assert calibrate(one, known, rate, lowest=True) == calibrate(
            one, {name: others[name] for name in one}, rate, lowest=True
        )
    alone = ({site: clean[site]}, {site: anomalous[site]})
    assert calibrate(*alone, rate, lowest=True)[site] <= calibrate(*alone, rate)[site]


def test_the_lowest_threshold_by_hand():
    clean, anomalous = {"s": np.arange(10, dtype=np.float32)}, {"s": np.array([100], np.float32)}
    assert calibrate(clean, anomalous, 0.2) == {"s": 54.5}
    assert calibrate(clean, anomalous, 0.2, lowest=True) == {"s": 7.0}
