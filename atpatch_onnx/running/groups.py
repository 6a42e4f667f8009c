"""Differences between the groups of a protected attribute, with bootstrap intervals.

The differences are fairlearn's. An interval is the percentile bootstrap's (Efron and Tibshirani 1993, chapter 13) over
inputs: all that counts of an input is its group, label and prediction, so that a resample is one multinomial draw.
A difference is never below zero, so where groups are small its interval lies above what it would be of more inputs.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.running.metrics import Difference

RESAMPLES = 2000


def demographic_parity(
    labels: NDArray[np.int64], predictions: NDArray[np.int64], sensitive: NDArray[Any], *, seed: int = 0
) -> Difference:
    """The largest difference between two groups' shares that are predicted 1.

    Args:
        labels: True classes `[inputs]`, 0 or 1.
        predictions: Predicted classes `[inputs]`, 0 or 1.
        sensitive: The group of each input `[inputs]`.
        seed: Of the resamples.
    """
    from fairlearn.metrics import demographic_parity_difference

    value = demographic_parity_difference(labels, predictions, sensitive_features=sensitive)
    resampled = _resampled(labels, predictions, sensitive, seed).sum(axis=2)
    return _difference(value, _spread(resampled))


def equalized_odds(
    labels: NDArray[np.int64], predictions: NDArray[np.int64], sensitive: NDArray[Any], *, seed: int = 0
) -> Difference:
    """The larger of the largest differences between two groups' true and false positive rates; arguments as above."""
    from fairlearn.metrics import equalized_odds_difference

    value = equalized_odds_difference(labels, predictions, sensitive_features=sensitive)
    resampled = _resampled(labels, predictions, sensitive, seed)
    return _difference(value, _spread(resampled).max(axis=1))


def _resampled(
    labels: NDArray[np.int64], predictions: NDArray[np.int64], sensitive: NDArray[Any], seed: int
) -> NDArray[np.int64]:
    """How many inputs of each cell a resample has, `[resamples, groups, labels, predictions]`."""
    groups, group = np.unique(sensitive, return_inverse=True)
    cells = np.bincount((group.reshape(-1) * 2 + labels) * 2 + predictions, minlength=4 * len(groups))
    drawn = np.random.default_rng(seed).multinomial(len(labels), cells / cells.sum(), size=RESAMPLES)
    return drawn.reshape(RESAMPLES, len(groups), 2, 2)


def _spread(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Largest less smallest share of positives over groups (axis 1); none of no inputs, as fairlearn has it."""
    shares = counts[..., 1] / np.maximum(counts.sum(axis=-1), 1)
    return np.asarray(np.ptp(shares, axis=1), np.float64)


def _difference(value: float, resampled: NDArray[np.float64]) -> Difference:
    low, high = np.quantile(resampled, (0.025, 0.975))
    return Difference(float(value), min(float(value), float(low)), max(float(value), float(high)))
