"""The counterfactual side of a debug set: a trigger stamped on every input, or a protected attribute changed."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from atpatch_onnx.debugset.arrays import Array, as_array, as_inputs, listed
from atpatch_onnx.errors import DebugSetError

Trigger = Callable[[dict[str, Array]], Mapping[str, ArrayLike]]
"""From arrays `[inputs, ...]` by name to triggered arrays of the same names, shapes and dtypes."""


def stamped(inputs: Mapping[str, Array], trigger: Trigger) -> Mapping[str, ArrayLike]:
    """Apply `trigger` to a copy of `inputs` `[inputs, ...]`, which it may change in place and return."""
    triggered = trigger({name: array.copy() for name, array in inputs.items()})
    if not isinstance(triggered, Mapping) or triggered.keys() != inputs.keys():
        raise DebugSetError(
            "trigger",
            expected=f"a dict with the inputs {listed(inputs)}",
            found=f"a dict with {listed(map(str, triggered))}"
            if isinstance(triggered, Mapping)
            else type(triggered).__name__,
            advice="Return every input from the trigger function, also the ones that it does not change.",
        )
    return triggered


def rows_off_target(labels: NDArray[np.int64], target: int) -> NDArray[np.int64]:
    """Rows `[n]` whose label is not the target: an input of the target class proves nothing once triggered."""
    rows = np.flatnonzero(labels != target)
    if not len(rows):
        raise DebugSetError(
            "labels",
            expected=f"inputs of other classes than the target {target}",
            found=f"all {len(labels)} inputs labelled {target}",
            advice="Add inputs of other classes, or check the target.",
        )
    return rows


def attribute_changed(
    inputs: Mapping[str, ArrayLike],
    *,
    name: str,
    column: int | None,
    values: Sequence[Any] | None,
    change: Callable[[Array], ArrayLike] | None,
) -> tuple[dict[str, Array], dict[str, Array], Array]:
    """Give every row another value of the protected attribute.

    Returns:
        The clean inputs, the counterfactual ones, and the attribute's clean values `[rows]`.
    """
    clean = as_inputs(inputs, "inputs")
    if name not in clean:
        raise DebugSetError(
            "name",
            expected=f"one of the inputs {listed(clean)}",
            found=repr(name),
            advice="Name the attribute's input.",
        )
    place = _place(clean[name], f"inputs[{name!r}]", column)
    before = clean[name][place]
    if change is None:
        after = _next_value(before, values, f"inputs[{name!r}]")
    elif values is None:
        after = _changed(before, change)
    else:
        raise DebugSetError(
            "values", expected="either values or change", found="both", advice="Leave one of the two out."
        )
    swapped = clean[name].astype(np.result_type(clean[name], after)) if after.dtype.kind == "U" else clean[name].copy()
    swapped[place] = after
    return clean, {**clean, name: swapped}, before


def _place(array: Array, where: str, column: int | None) -> tuple[Any, ...]:
    """Return the index that takes the attribute `[rows]` out of its input."""
    if column is None:
        if array.ndim == 1:
            return (slice(None),)
        if array.ndim == 2 and array.shape[1] == 1:
            return (slice(None), 0)
        raise DebugSetError(
            where,
            expected="shape [rows] or [rows, 1]",
            found=f"shape {list(array.shape)}",
            advice="Say which column holds the attribute, or build the counterfactual yourself for from_pairs.",
        )
    if array.ndim != 2 or not -array.shape[1] <= column < array.shape[1]:
        raise DebugSetError(
            where,
            expected=f"shape [rows, features] with a column {column}",
            found=f"shape {list(array.shape)}",
            advice="Give the column's index from 0, or leave it out where the attribute is a separate input.",
        )
    return (slice(None), column)


def _next_value(before: Array, values: Sequence[Any] | None, where: str) -> Array:
    given = np.unique(before) if values is None else as_array(values, "values")
    text = before.dtype.kind == "U"
    order = given
    if not text and given.dtype.kind != "U":
        with np.errstate(all="ignore"):  # what does not survive the cast is refused below
            order = given.astype(before.dtype)
    exact = before.dtype.kind == "f" or np.array_equal(order, given)  # floats are rounded, such as 0.1 to float32
    fits = (given.dtype.kind == "U") == text and exact
    if not fits or order.ndim != 1 or len(order) < 2 or len(np.unique(order)) != len(order):
        raise DebugSetError(
            "values",
            expected=f"at least two different values of dtype {before.dtype}",
            found=str(given.tolist()),
            advice="Give the attribute's values as the model reads them, after scaling or encoding.",
        )
    match = before[:, None] == order
    if not match.any(axis=1).all():
        row = int(np.argmin(match.any(axis=1)))
        raise DebugSetError(
            where,
            expected=f"only the values {order.tolist()}",
            found=f"{before[row].item()!r} in row {row}",
            advice="List every value, as the model reads it, or give a change function.",
        )
    following: Array = order[(match.argmax(axis=1) + 1) % len(order)]
    return following


def _changed(before: Array, change: Callable[[Array], ArrayLike]) -> Array:
    after = as_array(change(before.copy()), "change")
    if after.shape != before.shape or not np.can_cast(after.dtype, before.dtype, "same_kind"):
        raise DebugSetError(
            "change",
            expected=f"{before.dtype} {list(before.shape)}, one changed value for each row",
            found=f"{after.dtype} {list(after.shape)}",
            advice="Return an array of the shape and dtype that the function is given.",
        )
    return after
