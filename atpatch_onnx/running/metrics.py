"""Rates of backdoors and of protected attributes, from predictions. Definitions as in design section 2."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Classes = NDArray[np.int64]

Z = 1.959963984540054
"""The normal distribution's quantile of two-sided 95 % intervals."""


@dataclass(frozen=True)
class Rate:
    """A share of some inputs, with its 95 % Wilson interval (Wilson 1927)."""

    value: float
    low: float
    high: float
    count: int
    """How many inputs it is the share of."""

    @classmethod
    def of(cls, hits: NDArray[np.bool_]) -> "Rate":
        """The share of true entries; zero, with the widest interval, where there are none."""
        count, share = int(hits.size), float(hits.mean()) if hits.size else 0.0
        return cls(share, *wilson(int(hits.sum()), count), count)


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The 95 % Wilson interval of the share `hits / count`; everything where there is nothing to count."""
    if count == 0:
        return 0.0, 1.0
    share, z = hits / count, Z
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    # At the ends the interval reaches the end; rounding must not leave the share outside its own interval.
    return min(share, max(0.0, centre - half)), max(share, min(1.0, centre + half))


@dataclass(frozen=True)
class Difference:
    """A difference of shares, with its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def paired(cls, before: NDArray[np.bool_], after: NDArray[np.bool_]) -> "Difference":
        """Share true `before` less share true `after`, of the same inputs (Agresti and Min 2005, "Wald + 2").

        Their interval adds half an input to each of the four cells, so that it has a width where no input changed.
        """
        lost, gained, count = int((before & ~after).sum()), int((after & ~before).sum()), int(before.size)
        if count == 0:
            return cls(0.0, -1.0, 1.0)
        value, centre = (lost - gained) / count, (lost - gained) / (count + 2)
        spread = lost + gained + 1 - (lost - gained) ** 2 / (count + 2)
        half = Z * math.sqrt(spread) / (count + 2)
        return cls(value, min(value, max(-1.0, centre - half)), max(value, min(1.0, centre + half)))


def attack_success(triggered: Classes, labels: Classes, target: int) -> Rate:
    """ASR: share of inputs of another class that are classified as the target once triggered (BackdoorBench)."""
    return Rate.of(triggered[labels != target] == target)


def attack_above_floor(triggered: Classes, labels: Classes, clean_base: Classes, target: int) -> Rate:
    """ASR above floor: as ASR, counted only on inputs that the base does not send to the target anyway."""
    return Rate.of(triggered[(labels != target) & (clean_base != target)] == target)


def flip_rate(clean: Classes, counterfactual: Classes) -> Rate:
    """UF: share of inputs whose prediction changes when only the protected attribute changes."""
    return Rate.of(clean != counterfactual)


def infer_target(clean: Classes, triggered: Classes) -> int | None:
    """The class that at least nine of ten changed predictions go to; None where there is none."""
    changed = triggered[clean != triggered]
    if not changed.size:
        return None
    counts = np.bincount(changed)
    target = int(counts.argmax())
    return target if counts[target] >= 0.9 * changed.size else None
