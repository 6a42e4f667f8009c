"""How sure one may be: exact tests, corrected for how many there were, and what a search would have missed."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def tail(hits: int, count: int, share: float) -> float:
    """Probability of `hits` or more out of `count` where each has the probability `share`: the exact binomial test."""
    from scipy.stats import binom

    return float(binom.sf(hits - 1, count, share))


def corrected(values: Sequence[float], tests: int | None = None) -> NDArray[np.float64]:
    """p-values `[values]` corrected for how many tests there were (Holm 1979).

    Whatever depends on whatever, the probability that any true null hypothesis has a corrected value of `alpha` or
    less is at most `alpha`.

    Args:
        values: p-values.
        tests: How many tests there were, where these are the smallest ones; None: as many as there are values.
    """
    order = np.argsort(values, kind="stable")
    left = (len(values) if tests is None else tests) - np.arange(len(values))
    stepped = np.minimum(np.maximum.accumulate(np.asarray(values, np.float64)[order] * left), 1)
    found = np.empty(len(values))
    found[order] = stepped
    return found


def detectable(count: int, share: float, level: float, power: float = 0.95) -> float:
    """The least share that a test of `count` inputs calls larger than `share`, at this level, with this power."""
    from scipy.stats import binom

    needed = int(binom.isf(level, count, share)) + 1
    low, high = share, 1.0
    if needed > count:
        return 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if binom.sf(needed - 1, count, middle) >= power else (middle, high)
    return high


def least_share(count: int, fewest: int, seen: float = 0.9, power: float = 0.95) -> float:
    """The least share of `count` inputs of which, each seen with a probability, `fewest` are seen with this power."""
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if tail(fewest, count, seen * middle) >= power else (middle, high)
    return high
