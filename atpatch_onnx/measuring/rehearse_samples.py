"""Samples of a batch: whether those without a flag keep their bits."""

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.measuring.bits import by_sample, same_samples, same_shapes
from atpatch_onnx.running.sessions import Array


def keeps_unflagged(expected: Array, found: Array, flagged: NDArray[np.bool_]) -> bool:
    """Whether samples without a flag keep their bits, and all their shape; true where there are no samples."""
    if not same_shapes(expected, found):
        return False
    return not by_sample(expected, len(flagged)) or bool((same_samples(expected, found) | flagged).all())
