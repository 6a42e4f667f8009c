"""Calibrate the thresholds of all detecting sites to one clean flag rate of the whole model.

Every site and column is one more chance to flag a clean input, so thresholds that are calibrated one by one add up.
Here the budget is shared: a clean input counts as flagged when any of its columns is, at any detecting site.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32]

_LOW = 0.01
"""The quantile of anomalous scores that a threshold should stay below."""


def calibrate(clean: Mapping[str, Scores], anomalous: Mapping[str, Scores], rate: float) -> dict[str, float]:
    """Thresholds by site.

    A site whose scores are apart, the largest clean one below the lowest anomalous ones, takes the middle between them
    and spends nothing. The others share the budget: the same number of clean inputs, as many as it allows, may exceed
    the threshold of each.

    Args:
        clean: Largest score over the benign columns of each clean input `[inputs]`, by site.
        anomalous: Scores of the anomalous columns `[columns]`, by site.
        rate: Share of clean inputs that may be flagged.
    """
    inputs = len(next(iter(clean.values())))
    ordered = {site: np.sort(scores)[::-1] for site, scores in clean.items()}
    apart = {site: _low(anomalous[site]) > ordered[site][0] for site in clean}

    def at(spent: int) -> dict[str, float]:
        return {site: float(ordered[site][0 if apart[site] else spent]) for site in clean}

    spent = 0
    for candidate in range(1, min(int(rate * inputs), inputs - 1) + 1):
        flagged = np.zeros(inputs, bool)
        for site, threshold in at(candidate).items():
            flagged |= clean[site] > threshold
        if flagged.mean() <= rate:
            spent = candidate
    return {site: (lowest + max(_low(anomalous[site]), lowest)) / 2 for site, lowest in at(spent).items()}


def gap(clean: Scores, anomalous: Scores) -> float:
    """How far the lowest anomalous scores are above the largest clean one; negative where they overlap."""
    return _low(anomalous) - float(clean.max())


def _low(anomalous: Scores) -> float:
    return float(np.quantile(anomalous, _LOW)) if anomalous.size else -np.inf
