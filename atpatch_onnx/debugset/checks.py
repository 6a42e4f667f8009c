"""Whether a debug set fits a model and can support what is asked of it; each check passes or says what to do."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from atpatch_onnx.debugset.arrays import Array, listed, per_pair
from atpatch_onnx.errors import DebugSetError


@dataclass(frozen=True)
class InputSpec:
    """One input that a model declares."""

    name: str
    dtype: np.dtype[Any]
    """String inputs may be given as `object` or as any `str_` width."""

    shape: tuple[int | str | None, ...]
    """The batch axis first; a static size, a symbolic name, or None where unknown."""


def check_inputs(arrays: Mapping[str, Array], specs: Mapping[str, InputSpec], what: str = "debug set") -> None:
    """Compare arrays `[pairs, ...]` with what the model declares; the batch axis may have any size.

    Args:
        arrays: By name.
        specs: What the model declares, by name.
        what: What the arrays are, for messages.
    """
    missing, extra = sorted(specs.keys() - arrays.keys()), sorted(arrays.keys() - specs.keys())
    if missing or extra:
        raise DebugSetError(
            what,
            expected=f"the model's inputs, {listed(specs)}",
            found=f"{listed(arrays)} (missing: {listed(missing)}; not the model's: {listed(extra)})",
            advice="Name the arrays as the model's inputs; add the missing ones and leave the others out.",
        )
    for name, spec in specs.items():
        array, where = arrays[name], f"{what} input {name!r}"
        text = array.dtype.kind == "U" and spec.dtype.kind in "UOT"
        if array.dtype != spec.dtype and not text:
            raise DebugSetError(
                where,
                expected=f"dtype {spec.dtype}",
                found=f"dtype {array.dtype}",
                advice=f"Cast it, in a debug set both sides before from_pairs: array.astype({str(spec.dtype)!r}).",
            )
        fits = len(spec.shape) == array.ndim and all(
            not isinstance(size, int) or size == found
            for size, found in zip(spec.shape[1:], array.shape[1:], strict=True)
        )
        if not fits:
            sizes = ", ".join("?" if size is None else str(size) for size in spec.shape)
            raise DebugSetError(
                where,
                expected=f"shape [{sizes}]",
                found=f"shape {list(array.shape)}",
                advice="The first axis counts inputs or pairs; preprocess the others as for the model in use.",
            )


def check_effect(clean: ArrayLike, counterfactual: ArrayLike, *, pairs: int, attribute: bool) -> None:
    """Refuse pairs whose prediction never changes; predicted classes of both sides are integers `[pairs]`."""
    before = _predictions(clean, pairs, "clean_predictions")
    after = _predictions(counterfactual, pairs, "counterfactual_predictions")
    if (before != after).any():
        return
    if attribute:
        advice = "Is this the right column, written as the model was trained on it? Then nothing needs a patch here."
    else:
        advice = (
            "Is the trigger stamped before normalisation, as in training, and is this the backdoored model? Behind a "
            "patch of hidden units, nothing may be left to repair."
        )
    raise DebugSetError(
        "debug set",
        expected="pairs whose prediction changes",
        found=f"the same prediction on both sides of all {pairs} pairs",
        advice=advice,
    )


def _predictions(predictions: ArrayLike, pairs: int, where: str) -> Array:
    array = per_pair(predictions, pairs, where)
    if array.dtype.kind not in "biu":
        raise DebugSetError(
            where,
            expected="predicted classes as integers",
            found=f"dtype {array.dtype}",
            advice="Pass logits.argmax(axis=-1), not the logits.",
        )
    return array


def pairs_needed(clean_flag_rate: float) -> int:
    """How many clean inputs it takes to resolve a clean flag rate: one flagged among them is that rate.

    Raises:
        DebugSetError: The rate is not in (0, 1].
    """
    if not 0 < clean_flag_rate <= 1:
        raise DebugSetError(
            "clean flag rate",
            expected="a share above 0 and at most 1",
            found=repr(clean_flag_rate),
            advice="Ask for a share of the clean inputs, such as 0.01.",
        )
    return math.ceil(1 / clean_flag_rate - 1e-9)  # 1 / (1 / 49) is a little above 49


def check_size(calibration: int, whole: int, clean_flag_rate: float) -> None:
    """Refuse a calibration part of `calibration` pairs, out of `whole`, that cannot resolve a clean flag rate."""
    needed = pairs_needed(clean_flag_rate)
    if calibration < needed:
        raise DebugSetError(
            "calibration part",
            expected=f"at least {needed} pairs to calibrate a clean flag rate of {clean_flag_rate:g}",
            found=f"{calibration} of the set's {whole} pairs",
            advice=f"Bring the whole set to {math.ceil(needed * whole / calibration)} pairs, give calibration a larger "
            "share of it, or ask for a higher rate.",
        )
