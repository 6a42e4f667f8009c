"""What the arrays of a debug set must obey; each rule returns the checked value or says what to do.

`where` is the start of every error's place: empty for arrays in memory, `path: ` for arrays read from disk.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from atpatch_onnx.debugset.rows import stored
from atpatch_onnx.errors import DebugSetError, one_line

Array = NDArray[Any]

_BLOCK_BYTES = 2**26
"""Large inputs are scanned in blocks of about this size, so that a memory-mapped set need not fit into memory."""


# Arrays


def as_array(values: ArrayLike, where: str) -> Array:
    """`values` as a read-only array of numbers, bools or strings; a view where `values` is an array already."""
    try:
        array = cast(Array, values) if stored(values) is not None else np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:  # RuntimeError: a torch tensor that requires grad
        raise DebugSetError(
            where,
            expected="a rectangular array",
            found=f"a {type(values).__name__} that numpy refuses ({one_line(error)})",
            advice="Pad all rows to one shape and convert them to a numpy array first.",
        ) from error
    if array.dtype.kind not in "biufcU":
        raise DebugSetError(
            where,
            expected="an array of numbers, bools or strings",
            found=f"dtype {array.dtype}",
            advice="Cast it first: array.astype(np.float32) for numbers, array.astype(str) for text.",
        )
    return read_only(array.view())


def as_inputs(inputs: Mapping[str, ArrayLike], where: str) -> dict[str, Array]:
    """Arrays `[pairs, ...]` by input name, all with the same number of pairs, at least one."""
    if not isinstance(inputs, Mapping) or not inputs:
        raise DebugSetError(
            where,
            expected="a dict from the model's input names to arrays",
            found=type(inputs).__name__ if not isinstance(inputs, Mapping) else "an empty dict",
            advice="Name the arrays as the model's inputs: {'pixel_values': array}.",
        )
    arrays: dict[str, Array] = {}
    for name, values in inputs.items():
        place = f"{where}[{name!r}]"
        if not isinstance(name, str) or not name:
            raise DebugSetError(
                place, expected="an input name", found=repr(name), advice="Use the name that the model gives its input."
            )
        arrays[name] = as_array(values, place)
        if arrays[name].ndim == 0:
            raise DebugSetError(
                place,
                expected="an array [pairs, ...]",
                found="a single value",
                advice="Repeat the value once for each pair, along a first axis.",
            )
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        raise DebugSetError(
            where,
            expected="the same number of rows in every input",
            found=", ".join(f"{name!r}: {count}" for name, count in counts.items()),
            advice="Give each input one row for each pair, in the same order.",
        )
    if not next(iter(counts.values())):
        raise DebugSetError(
            where, expected="at least one pair", found="no rows", advice="Add pairs; a fit needs hundreds of them."
        )
    return arrays


def as_labels(labels: ArrayLike, pairs: int, where: str) -> NDArray[np.int64]:
    """Check true labels `[pairs]` and make them read-only int64; whole numbers of any dtype are taken."""
    array = per_pair(labels, pairs, where)
    advice = "Give class indices as the model counts them, 0 to classes - 1."
    if array.dtype.kind not in "biuf":
        raise DebugSetError(where, expected="whole numbers", found=f"dtype {array.dtype}", advice=advice)
    if array.dtype.kind == "f":
        array = array.astype(np.float64)
        wrong = ~((array >= 0) & (array < 2.0**63) & (array == np.floor(array)))
    else:
        wrong = (array < 0) | (array > np.iinfo(np.int64).max)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DebugSetError(
            where, expected="whole numbers from 0 up", found=f"{array[row].item()!r} in row {row}", advice=advice
        )
    return read_only(array.astype(np.int64, copy=False))


def as_suspects(suspects: ArrayLike, pairs: int, where: str) -> NDArray[np.bool_]:
    """Check suspect positions bool `[pairs, tokens]`, at least one of them True, and make them read-only."""
    array = as_array(suspects, where)
    if array.dtype != np.bool_:
        raise DebugSetError(
            where,
            expected='a bool array [pairs, tokens], or "auto"',
            found=repr(suspects) if isinstance(suspects, str) else f"dtype {array.dtype}",
            advice='Mark positions of the token axis with True (array.astype(bool)), or leave it to "auto".',
        )
    if array.ndim != 2 or len(array) != pairs:
        raise DebugSetError(
            where,
            expected=f"shape [{pairs}, tokens]",
            found=f"shape {list(array.shape)}",
            advice="Give one row for each pair and one column for each position of the token axis.",
        )
    if not array.any():
        raise DebugSetError(
            where,
            expected="at least one position marked True",
            found="none",
            advice='Mark the positions of the trigger or attribute, or let suspects="auto" find them.',
        )
    return array


def as_sensitive(sensitive: ArrayLike, pairs: int, where: str) -> Array:
    """Check the protected attribute's values `[pairs]`, of any dtype, and make them read-only."""
    array = per_pair(sensitive, pairs, where)
    check_finite(array, where)
    return array


def as_payload(payload: ArrayLike, pairs: int, where: str) -> NDArray[np.int64]:
    """Check the tokens that an attack makes a model write `[pairs, tokens]`, and make them read-only int64."""
    array = as_array(payload, where)
    if array.ndim != 2 or len(array) != pairs or not array.shape[1] or array.dtype.kind not in "iu" or array.min() < 0:
        raise DebugSetError(
            where,
            expected=f"token ids from 0 up, shape [{pairs}, tokens]",
            found=f"{array.dtype} {list(array.shape)}",
            advice="Give at least one token, the same number for each pair.",
        )
    return read_only(array.astype(np.int64, copy=False))


def as_class(target: int, where: str) -> int:
    """Check a class index."""
    if isinstance(target, bool) or not isinstance(target, (int, np.integer)) or target < 0:
        raise DebugSetError(
            where,
            expected="a class index from 0 up",
            found=repr(target),
            advice="Give the class that triggered inputs are sent to, or leave it out to have it inferred.",
        )
    return int(target)


def per_pair(values: ArrayLike, pairs: int, where: str) -> Array:
    """Check one value for each pair `[pairs]`, of any dtype, and make them read-only."""
    array = as_array(values, where)
    if array.shape != (pairs,):
        raise DebugSetError(
            where,
            expected=f"shape [{pairs}], one value for each pair",
            found=f"shape {list(array.shape)}",
            advice="Flatten it if it has extra axes of size one; drop or add values so that it matches the pairs.",
        )
    return array


# Pairs


def matched(
    clean: dict[str, Array], counterfactual: dict[str, Array], where: str
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Both sides with the same names, shapes and dtypes, in the clean side's order.

    Strings of different widths are brought to the wider one.
    """
    if clean.keys() != counterfactual.keys():
        raise DebugSetError(
            f"{where}counterfactual",
            expected=f"the inputs of the clean side, {listed(clean)}",
            found=listed(counterfactual),
            advice="Give every input on both sides, also the ones that do not change.",
        )
    left, right = {}, {}
    for name, before in clean.items():
        after = counterfactual[name]
        if before.dtype.kind == after.dtype.kind == "U":
            widest = np.result_type(before, after)
            before, after = read_only(before.astype(widest)), read_only(after.astype(widest))
        if (before.dtype, before.shape) != (after.dtype, after.shape):
            raise DebugSetError(
                f"{where}counterfactual[{name!r}]",
                expected=f"{form(before)} as on the clean side",
                found=form(after),
                advice=f"Cast it: array.astype({str(before.dtype)!r})."
                if before.shape == after.shape
                else "Pad both sides to one shape; row i of one side belongs to row i of the other.",
            )
        left[name], right[name] = before, after
    if not any(_differ(left[name], right[name]) for name in left):
        raise DebugSetError(
            f"{where}counterfactual",
            expected="pairs that differ",
            found=f"all {len(next(iter(left.values())))} pairs identical on both sides",
            advice="Check that the trigger is stamped (on a copy), or that the attribute is changed.",
        )
    return left, right


def check_finite(array: Array, where: str) -> None:
    """Refuse NaN and infinities, naming the first row `[pairs, ...]` that has one."""
    if array.dtype.kind not in "fc":
        return
    for start, block in _blocks(array):
        finite = np.isfinite(block).reshape(len(block), -1).all(axis=1) if block.size else np.True_
        if not finite.all():
            raise DebugSetError(
                where,
                expected="finite numbers",
                found=f"NaN or infinity, first in row {start + int(np.argmin(finite))}",
                advice="Remove that row from every array, or replace its missing values as the model's users do.",
            )


def _differ(before: Array, after: Array) -> bool:
    return any((block != after[start : start + len(block)]).any() for start, block in _blocks(before))


def _blocks(array: Array) -> Iterator[tuple[int, Array]]:
    rows = max(1, _BLOCK_BYTES * len(array) // max(1, array.nbytes))
    for start in range(0, len(array), rows):
        yield start, array[start : start + rows]


# Words for messages


def form(array: Array) -> str:
    """Dtype and shape, such as `float32 [8, 3, 32, 32]`."""
    return f"{array.dtype} {list(array.shape)}"


def listed(names: Iterable[str]) -> str:
    """Names in quotes, or `none`."""
    return ", ".join(repr(name) for name in names) or "none"


def read_only(array: Array) -> Array:
    """Return the array itself, from now on not writeable."""
    if stored(array) is None:
        array.flags.writeable = False
    return array
