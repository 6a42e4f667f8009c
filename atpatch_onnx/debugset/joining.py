"""Several debug sets as one."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from atpatch_onnx.debugset.files import SIDES
from atpatch_onnx.debugset.pairs import DebugSet
from atpatch_onnx.errors import DebugSetError


def joined(sets: Sequence[DebugSet]) -> DebugSet:
    """The pairs of several sets, such as of several attributes; labels and suspects where all of them have them.

    Raises:
        DebugSetError: There is none, they are about different things, or they are not of one model's inputs.
    """
    kinds = {(one.kind, one.target) for one in sets}
    if len(kinds) != 1:
        raise DebugSetError(
            "the debug sets",
            expected="at least one, all about the same kind of thing and target class",
            found=", ".join(f"{kind}, target {target}" for kind, target in sorted(kinds, key=str)) or "none",
            advice="Fit a patch for each of them.",
        )
    if len(sets) == 1:
        return sets[0]
    clean, other = (
        {name: np.concatenate([getattr(one, side)[name] for one in sets]) for name in sets[0].clean} for side in SIDES
    )
    extras: dict[str, Any] = {}
    for name in ("labels", "suspects"):
        arrays = [getattr(one, name) for one in sets]
        if all(array is not None for array in arrays):
            extras[name] = np.concatenate(arrays)
    ((kind, target),) = kinds
    return DebugSet.from_pairs(clean, other, kind=kind, target=target, found=all(one.found for one in sets), **extras)
