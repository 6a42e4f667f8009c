"""Outputs of two models, held against each other bit for bit: tensors, texts, sequences, maps, absent optionals."""

from typing import TypeGuard

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.running.sessions import Array, tensors


def same_bits(expected: object, found: object) -> bool:
    """Whether two outputs have the same types, shapes and bits, or texts."""
    sides = tensors(expected), tensors(found)
    return same_shapes(expected, found) and [*map(_content, sides[0])] == [*map(_content, sides[1])]


def same_shapes(expected: object, found: object) -> bool:
    """Whether two outputs have the same types and shapes."""
    shaped = [[(array.dtype, array.shape) for array in tensors(output)] for output in (expected, found)]
    return isinstance(expected, list) == isinstance(found, list) and shaped[0] == shaped[1]


def by_sample(output: object, samples: int) -> TypeGuard[Array]:
    """Whether the samples are on the first axis."""
    return isinstance(output, np.ndarray) and output.ndim > 0 and len(output) == samples


def same_samples(expected: Array, found: Array) -> NDArray[np.bool_]:
    """Which samples of two outputs of the same shape have the same bits, or texts."""
    pairs = zip(expected, found, strict=True)
    return np.array([_content(np.asarray(one)) == _content(np.asarray(other)) for one, other in pairs], np.bool_)


def keeps_unflagged(expected: Array, found: Array, flagged: NDArray[np.bool_]) -> bool:
    """Whether samples without a flag keep their bits, and all their shape; true where there are no samples."""
    if not same_shapes(expected, found):
        return False
    return not by_sample(expected, len(flagged)) or bool((same_samples(expected, found) | flagged).all())


def without_flagged(array: Array, flagged: NDArray[np.bool_], axis: int | None = 0) -> Array:
    """A copy in which the first sample without a flag stands in for those with one; None: there is no axis of them."""
    if axis is None or array.ndim <= axis or array.shape[axis] != len(flagged) or flagged.all():
        return array
    return np.take(array, np.where(flagged, np.argmin(flagged), np.arange(len(flagged))), axis)


def close(expected: Array, found: Array, tolerance: float) -> bool:
    """Whether floats differ by this at most, relative to the largest of them, and all else not at all."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return False
    if expected.dtype.kind != "f":
        return bool(np.array_equal(expected, found))
    finite = np.isfinite(expected)
    scale = float(np.abs(expected[finite]).max(initial=0.0))
    return bool(np.allclose(expected, found, rtol=0, atol=tolerance * scale, equal_nan=True))


def finite(output: object) -> bool:
    """Whether an output has no NaN and no infinity."""
    return all(array.dtype.kind not in "fc" or bool(np.isfinite(array).all()) for array in tensors(output))


def _content(array: Array) -> object:
    """Bits, or texts: numpy holds these by reference."""
    return array.tolist() if array.dtype.hasobject else array.tobytes()
