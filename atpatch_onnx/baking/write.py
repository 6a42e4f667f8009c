"""Write a patch's sites into a graph, one after the other, carrying what is flagged along each token axis.

    read  ->  margin over the threshold  ->  the largest of it and the earlier sites'  ->  replace

The graph of the fit, in which every site can be switched, and the patched graph are both written here. They differ
only in where thresholds come from: the graph's inputs while fitting, weights once baked (`Controls`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from atpatch_onnx.baking.read import in_order, read_places, read_scores, read_threshold
from atpatch_onnx.baking.replace import Decision, replace_tokens, replacements
from atpatch_onnx.errors import PatchMismatchError
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.graph.values import find_value
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.patches.patch import Places, SitePatch


@dataclass(frozen=True)
class Controls:
    """Values of the graph that decide what a site does."""

    threshold: ir.Value | None
    """float `[1]`, where the site detects."""

    level: ir.Value | None
    """float `[1]`, where it redistributes: it does where margins are above; 0, or infinity to switch it off."""


@dataclass(frozen=True)
class Written:
    """What one site left in the graph."""

    site: AttentionSite
    entry: SitePatch
    own: ir.Value | None
    """float `[B, K, 1]`, where the site detects: how far each token's score is above its threshold."""

    margin: ir.Value
    """The same, or the largest of it and the earlier sites': positive where the token is flagged."""


def write(
    model: ir.Model,
    entries: Sequence[tuple[AttentionSite, SitePatch]],
    controls: Callable[[Insertion, AttentionSite, SitePatch], Controls],
    *,
    conditional: bool,
) -> tuple[Written, ...]:
    """Write detection and redistribution for `entries`, in the order of the sites, into `model`, in place.

    Raises:
        PatchMismatchError: An array does not have the shape that its site asks for, or a site redistributes although no
            site before it on its token axis, nor itself, detects.
    """
    order: dict[ir.Node | None, int] = {node: position for position, node in enumerate(model.graph)}
    ends: dict[ir.Node | None, ir.Node | None] = {}
    carried: dict[str, ir.Value] = {}
    written = []
    for site, entry in sorted(entries, key=lambda pair: pair[0].index):
        check_shapes(site, entry)
        producer = find_value(model.graph, site.key.value).producer()
        at = _behind(model, site, producer, ends)
        control = controls(at, site, entry)
        own = None
        margin = carried.get(site.token_axis)
        if entry.detector is not None:
            assert control.threshold is not None, "a detecting site has a threshold"
            own = _margin(at, site, entry, control.threshold)
            margin = own if margin is None else at.op("Max", own, margin, name="carried", dtype=_FLOAT)
        if margin is None:
            raise _mismatch(site, "a detecting site before it on its token axis", "none")
        carried[site.token_axis] = margin
        if entry.neutral is not None:
            assert control.level is not None, "a redistributing site has a level"
            flags = at.op("Greater", margin, control.level, name="flagged", dtype=_BOOL)
            decision = Decision(flags, _any(at, flags) if conditional else None)
            for replacement in replacements(model.graph, site, entry.neutral):
                other = find_value(model.graph, replacement.place.value).producer()
                later = order.get(other, -1) > order.get(producer, -1)
                into = _behind(model, site, other, ends) if later else at
                replace_tokens(into, replacement, decision)
                if later:
                    ends[other] = into.end
        ends[producer] = at.end
        written.append(Written(site, entry, own, margin))
    return tuple(written)


def _behind(
    model: ir.Model, site: AttentionSite, producer: ir.Node | None, ends: Mapping[ir.Node | None, ir.Node | None]
) -> Insertion:
    """Adds nodes behind one of the base and what earlier sites added there; at the beginning, behind an input."""
    anchor = ends.get(producer, producer)
    return Insertion(model.graph, site.name, anchor=anchor, first=anchor is None)


_BOOL, _FLOAT = ir.DataType.BOOL, ir.DataType.FLOAT


def _margin(at: Insertion, site: AttentionSite, entry: SitePatch, threshold: ir.Value) -> ir.Value:
    assert entry.detector is not None, "the site detects"
    if isinstance(entry.detector, Places):
        return at.op("Sub", read_places(at, site, entry.detector), threshold, name="margin", dtype=_FLOAT)
    scores = read_scores(at, site.key, entry.detector)
    margin = at.op(
        "Sub", scores, threshold, name="margins" if site.key.axes[:2] != ("n", "k") else "margin", dtype=_FLOAT
    )
    return in_order(at, site, margin, "margin")


def _any(at: Insertion, flags: ir.Value) -> ir.Value:
    """Whether anything is flagged; of flags, not of margins: a sample with a NaN must not hide its batch-mates."""
    numbers = at.op("Cast", flags, name="flagged_as_numbers", attributes=[ir.AttrInt64("to", ir.DataType.FLOAT)])
    largest = at.op("ReduceMax", numbers, name="most_flagged", attributes=[ir.AttrInt64("keepdims", 0)], dtype=_FLOAT)
    return at.op("Cast", largest, name="some", attributes=[ir.AttrInt64("to", ir.DataType.BOOL)], dtype=_BOOL)


def always_flags(entries: Sequence[tuple[AttentionSite, SitePatch]]) -> bool:
    """Whether every input has flags, as each detector names tokens by where they stand: an `If` would save nothing."""
    return all(isinstance(entry.detector, Places) for _, entry in entries if entry.detector is not None)


def constants(at: Insertion, site: AttentionSite, entry: SitePatch) -> Controls:
    """Thresholds and levels as weights of the graph."""
    threshold = level = None
    if entry.detector is not None:
        threshold = at.constant("threshold", read_threshold(at.graph, site.key, entry.detector))
    if entry.neutral is not None:
        level = at.constant("level", np.zeros(1, np.float32))
    return Controls(threshold, level)


def check_shapes(site: AttentionSite, entry: SitePatch) -> None:
    """Refuse arrays that do not fit their site.

    Raises:
        PatchMismatchError: An array does not have the shape that its site asks for.
    """
    if isinstance(entry.detector, Places):
        if site.parts != 1 or site.keys != len(entry.detector.marks):
            keys = site.keys if isinstance(site.keys, int) else "as many as the input has"
            found = f"{keys} tokens" + ", in several parts that attend on their own" * (site.parts != 1)
            raise _mismatch(site, f"{len(entry.detector.marks)} tokens in each input, as the patch has places", found)
    elif entry.detector is not None and len(entry.detector.weights) != site.key.features:
        found = f"one of {len(entry.detector.weights)}"
        raise _mismatch(site, f"a detector of {site.key.features} features", found)
    if entry.neutral is None:
        return
    for which, place, array in (("key", site.key, entry.neutral.key), ("value", site.value, entry.neutral.value)):
        if array.shape != (place.heads, place.depth):
            raise _mismatch(
                site,
                f"a neutral {which} of {place.heads} x {place.depth}",
                f"one of {' x '.join(map(str, array.shape))}",
            )


def _mismatch(site: AttentionSite, expected: str, found: str) -> PatchMismatchError:
    return PatchMismatchError(
        f"site {site.name}", expected=expected, found=found, advice="Fit the patch again for this model."
    )
