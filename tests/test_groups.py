"""Group differences: values against fairlearn's, intervals against resampling the inputs themselves."""

import numpy as np
import pytest
from fairlearn.metrics import demographic_parity_difference, equalized_odds_difference
from hypothesis import given, settings
from hypothesis import strategies as st

from atpatch_onnx.running.groups import demographic_parity, equalized_odds

METRICS = [(demographic_parity, demographic_parity_difference), (equalized_odds, equalized_odds_difference)]


def drawn(inputs: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels, predictions that lean on the group, and groups that have names."""
    rng = np.random.default_rng(seed)
    groups, labels = rng.integers(0, 3, inputs), rng.integers(0, 2, inputs)
    predictions = (rng.random(inputs) < 0.3 + 0.15 * groups + 0.2 * labels).astype(np.int64)
    return labels, predictions, np.array(["a", "b", "c"])[groups]


@pytest.mark.parametrize(("ours", "fairlearns"), METRICS)
def test_the_interval_is_that_of_drawing_inputs_again(ours, fairlearns):
    labels, predictions, groups = drawn(600)
    found = ours(labels, predictions, groups)
    rng = np.random.default_rng(1)
    again = []
    for _ in range(400):
        rows = rng.integers(0, 600, 600)
        again.append(fairlearns(labels[rows], predictions[rows], sensitive_features=groups[rows]))
    assert found.value == pytest.approx(fairlearns(labels, predictions, sensitive_features=groups))
    # quantiles of 400 resamples are themselves off by about a hundredth
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(again, (0.025, 0.975))), abs=0.025)


@settings(deadline=None, derandomize=True, max_examples=25)
@given(inputs=st.integers(2, 40), seed=st.integers(0, 99))
def test_the_value_lies_in_its_interval_however_few_inputs(inputs, seed):
    for ours, fairlearns in METRICS:
        found = ours(*(rows := drawn(inputs, seed)))
        assert found.value == pytest.approx(fairlearns(rows[0], rows[1], sensitive_features=rows[2]))
        assert 0 <= found.low <= found.value <= found.high <= 1


def test_more_inputs_say_more():
    few, many = (demographic_parity(*drawn(inputs)) for inputs in (200, 20_000))
    assert many.high - many.low < 0.2 * (few.high - few.low)
