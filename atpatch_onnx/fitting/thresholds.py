"""Calibrate the thresholds of all detecting sites to one clean flag rate of the whole model.

Every site and column is one more chance to flag a clean input, so thresholds that are calibrated one by one add up.
Here the budget is shared: a clean input counts as flagged when any of its columns is, at any detecting site.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Scores = NDArray[np.float32]

_LOW = 0.01
"""The quantile of anomalous scores that counts as their lowest in `gap`."""


def calibrate(
    clean: Mapping[str, Scores], anomalous: Mapping[str, Scores], rate: float, *, lowest: bool = False
) -> dict[str, float]:
    """Thresholds by site.

    At each site the number of clean inputs that may exceed the threshold is the one at which the fewest columns are
    named wrongly: the share of anomalous columns that are missed plus the share of clean inputs that are flagged. A
    site whose scores are apart spends nothing, and none spends what gains nothing. The budget caps that number, the
    same cap for all sites. Between that clean score and the next anomalous or clean one, the threshold is the middle.

    Args:
        clean: Largest score over the benign columns of each clean input `[inputs]`, by site.
        anomalous: Scores of the anomalous columns `[columns]`, by site.
        rate: Share of clean inputs that may be flagged.
        lowest: Spend the whole budget, whatever it gains here, and put thresholds at the largest clean score left: for
            anomalous columns that merely resemble those to come.
    """
    inputs = len(next(iter(clean.values())))
    ordered = {site: np.sort(scores)[::-1] for site, scores in clean.items()}
    errors = {site: _errors(ordered[site], anomalous[site]) for site in clean}

    def spent(cap: int) -> dict[str, int]:
        return {site: cap if lowest else int(errors[site][: cap + 1].argmin()) for site in clean}

    best = spent(0)
    for cap in range(1, min(int(rate * inputs), inputs - 1) + 1):
        candidate, flagged = spent(cap), np.zeros(inputs, bool)
        for site, count in candidate.items():
            flagged |= clean[site] > ordered[site][count]
        if flagged.mean() <= rate:
            best = candidate
    if lowest:
        return {site: float(ordered[site][count]) for site, count in best.items()}
    return {site: _middle(ordered[site], anomalous[site], count) for site, count in best.items()}


def _errors(ordered: Scores, anomalous: Scores) -> NDArray[np.float64]:
    """Missed plus falsely flagged shares with the threshold at each clean score, from the largest."""
    below = np.searchsorted(np.sort(anomalous), ordered, side="right") / max(anomalous.size, 1)
    above = np.searchsorted(-ordered, -ordered, side="left") / ordered.size
    return below + above


def _middle(ordered: Scores, anomalous: Scores, count: int) -> float:
    """The middle between the largest clean score that is not flagged and the next score above it."""
    lowest = ordered[count]
    above = np.concatenate([anomalous[anomalous > lowest], ordered[ordered > lowest]])
    middle = np.float32((float(lowest) + float(above.min())) / 2) if above.size else lowest
    return float(max(middle, lowest))


def gap(clean: Scores, anomalous: Scores) -> float:
    """How far the lowest anomalous scores are above the largest clean one; negative where they overlap."""
    return (float(np.quantile(anomalous, _LOW)) if anomalous.size else -np.inf) - float(clean.max())
