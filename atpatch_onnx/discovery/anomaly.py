"""Which class stands out: the anomaly index of Neural Cleanse (Wang et al., IEEE S&P 2019, section 4)."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONSISTENCY = 1.4826
"""Makes the median absolute deviation of normal samples an estimate of their standard deviation."""

CONSISTENCY_OF_MEAN = 1.253314
"""The same for the mean absolute deviation: the square root of pi / 2."""

OUTLIER = 2.0
"""Index beyond which a class stands out: of normal samples, 2.3 % lie as far on that side."""

SMALL = 0.5
"""Share of the median norm beyond which no class stands out, which the paper does not ask for.

Where the masks of all classes are about as large, their deviation is tiny, and a mask a tenth smaller would be far out.
"""

FEWEST = 5
"""Classes below which a deviation says nothing."""


def anomaly_indices(norms: ArrayLike) -> NDArray[np.float64]:
    """How far each of `norms` `[classes]` lies below their median, in absolute deviations from it `[classes]`.

        (median(norms) - norm) / (1.4826 * median(|norms - median(norms)|))

    Positive on the small side, where a backdoor's class is; the paper takes the absolute value and then looks at the
    small side only.

    The median absolute deviation is zero where half of the norms or more are equal, as they are once so many classes
    failed and count as the full mask. The mean one takes its place then, as in Iglewicz and Hoaglin (How to Detect and
    Handle Outliers, 1993):

        (median(norms) - norm) / (1.253314 * mean(|norms - median(norms)|))

    Where all norms are equal that is zero as well, and so are all indices.
    """
    values = np.asarray(norms, np.float64)
    below = np.median(values) - values
    away = np.abs(below)
    deviation = CONSISTENCY * np.median(away) or CONSISTENCY_OF_MEAN * away.mean()
    return below / deviation if deviation > 0 else np.zeros_like(below)


def outlier(norms: ArrayLike) -> int | None:
    """The position of the norm that stands out the most on the small side; None where none does."""
    values, indices = np.asarray(norms, np.float64), anomaly_indices(norms)
    most = int(indices.argmax())
    stands_out = indices[most] > OUTLIER and values[most] <= SMALL * np.median(values)
    return most if len(indices) >= FEWEST and stands_out else None
