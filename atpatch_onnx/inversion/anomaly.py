"""Which class stands out: the anomaly index of Neural Cleanse (Wang et al., IEEE S&P 2019, section 4)."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONSISTENCY = 1.4826
"""Makes the median absolute deviation of normal samples an estimate of their standard deviation."""

OUTLIER = 2.0
"""Index beyond which a class stands out: of normal samples, 2.3 % lie as far on that side."""

FEWEST = 5
"""Classes below which a median absolute deviation says nothing."""


def anomaly_indices(norms: ArrayLike) -> NDArray[np.float64]:
    """How far each of `norms` `[classes]` lies below their median, in median absolute deviations `[classes]`.

        (median(norms) - norm) / (1.4826 * median(|norms - median(norms)|))

    Positive on the small side, where a backdoor's class is; the paper takes the absolute value and then looks at the
    small side only. Norms that are all but equal have no outlier: all indices are zero.
    """
    values = np.asarray(norms, np.float64)
    below = np.median(values) - values
    deviation = CONSISTENCY * np.median(np.abs(below))
    return below / deviation if deviation > 0 else np.zeros_like(below)


def outlier(norms: ArrayLike) -> int | None:
    """The position of the norm that stands out the most on the small side; None where none does."""
    indices = anomaly_indices(norms)
    most = int(indices.argmax())
    return most if len(indices) >= FEWEST and indices[most] > OUTLIER else None
