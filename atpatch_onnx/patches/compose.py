"""Several patches of one model as one: what `bake` does with a list.

The order is that of the list. Neuron edits are fitted on the model alone or on one that others are in already; so is a
patch of the attention. What a patch was fitted after has to stand before it. Where two edit the same unit, the later
one edits what the earlier one made of it.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from atpatch_onnx.errors import PatchMismatchError
from atpatch_onnx.patches.patch import LayerEdit, Patch


def compose(patches: Sequence[Patch]) -> Patch:
    """One patch that does what `patches` do, in this order; a single one that needs no other stays what it is.

    The figures are those of the last, if it was fitted after the others; else those of the last of the attention, if
    any, and the goal is met if all meet theirs. In `composed` are the id and figures of each.

    Raises:
        PatchMismatchError: There is none; they are of different models; one stands there twice; one was fitted after
            another that does not stand before it; two are at the same attention site; or edits of one unit overflow.
    """
    if not patches:
        raise _mismatch("the patches", "at least one", "none")
    if len({patch.base for patch in patches}) > 1:
        raise _mismatch("the patches", "patches of one model", "models " + ", ".join(p.base for p in patches))
    before: list[str] = []
    for patch in patches:
        missing = [other for other in patch.after if other not in before]
        if missing:
            raise PatchMismatchError(
                f"patch {patch.id}",
                expected=f"patch {missing[0]} before it, which was in the model that it was fitted on",
                found=", ".join(before) or "none before it",
                advice=f"Give patch {missing[0]} first.",
            )
        if patch.id in before:
            raise _mismatch("the patches", "each once", f"patch {patch.id} twice")
        before.append(patch.id)
    if len(patches) == 1:
        return patches[0]
    sites = [site for patch in patches for site in patch.sites]
    names = [site.site for site in sites]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise _mismatch("the patches", "at most one patch at each attention site", f"two at {twice[0]}")
    return Patch(
        base=patches[0].base,
        sites=tuple(sites),
        figures={**_figures(patches), "composed": [{"id": patch.id, **patch.figures} for patch in patches]},
        edits=_composed_edits([edit for patch in patches for edit in patch.edits]),
    )


def _figures(patches: Sequence[Patch]) -> dict[str, Any]:
    """What is said of all of them together."""
    last = patches[-1]
    if last.after and set(last.after) == {patch.id for patch in patches[:-1]}:
        return dict(last.figures)
    shown = next((patch for patch in reversed(patches) if patch.sites), last)
    return {
        **{name: value for name, value in shown.figures.items() if name != "method"},
        "meets_target": all(patch.meets_target for patch in patches),
        "shortfalls": [line for patch in patches for line in patch.figures.get("shortfalls", ())],
    }


def _composed_edits(edits: Sequence[LayerEdit]) -> tuple[LayerEdit, ...]:
    """One edit a layer: `f2 (f1 h + c1) + c2 = (f1 f2) h + (f2 c1 + c2)`."""
    layers: dict[str, dict[int, tuple[float, float]]] = {}
    for edit in edits:
        units = layers.setdefault(edit.layer, {})
        for unit, factor, constant in zip(edit.units.tolist(), edit.factor, edit.constant, strict=True):
            before, added = units.get(unit, (1.0, 0.0))
            units[unit] = (before * float(factor), added * float(factor) + float(constant))
            if max(map(abs, units[unit])) > float(np.finfo(np.float32).max):
                raise _mismatch(f"unit {unit} of {edit.layer}", "edits whose product is a float32", str(units[unit]))
    return tuple(
        LayerEdit(
            layer,
            np.array(sorted(units), np.int64),
            np.array([units[unit][0] for unit in sorted(units)], np.float32),
            np.array([units[unit][1] for unit in sorted(units)], np.float32),
        )
        for layer, units in layers.items()
    )


def _mismatch(where: str, expected: str, found: str) -> PatchMismatchError:
    return PatchMismatchError(
        where, expected=expected, found=found, advice="Give the patches that were made for this model, each once."
    )
