"""Write a patch's sites into a graph, one after the other, carrying flags along each token axis.

The trial graph of the fit and the patched graph are both written here. They differ only in where thresholds and benign
attention come from: the graph's inputs while fitting, constants once baked (`Controls`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from atpatch_onnx.baking.emission import Emission, Handles, Repair, open_site, per_map, per_sample, repair_output
from atpatch_onnx.baking.features import Landmarks, column_features, feature_count, shares_in_one
from atpatch_onnx.errors import PatchMismatchError
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.patches.patch import OFFSET, Array, Detector, SitePatch


@dataclass(frozen=True)
class Controls:
    """Values of the graph that decide what a site does."""

    threshold: ir.Value | None = None
    """float `[1]`, where the site detects."""

    reach: ir.Value | None = None
    """float `[1]`, where the site detects; None: the threshold is the same for all columns."""

    beta: ir.Value | None = None
    """float, broadcasts to `[maps, heads, queries, 1]`, where the site redistributes."""

    switch: ir.Value | None = None
    """bool `[1]`, where the site redistributes: it does only where this is true; None: always."""


@dataclass(frozen=True)
class Woven:
    """What one site left in the graph."""

    site: AttentionSite
    entry: SitePatch
    handles: Handles
    margin: ir.Value | None
    """float `[samples, columns]`, where the site detects: how far each column's score is above the threshold."""

    reached: ir.Value | None
    """The same with the lower threshold where it holds: positive where the site flags."""

    flags: ir.Value
    """bool `[samples, columns]`: its own or carried. A sample's columns are the keys of all its maps."""


def weave(
    model: ir.Model,
    entries: Sequence[tuple[AttentionSite, SitePatch]],
    emission: Emission,
    controls: Callable[[Insertion, AttentionSite, SitePatch], Controls],
    flags: Mapping[str, ir.Value] | None = None,
) -> tuple[Woven, ...]:
    """Write detection and redistribution for `entries`, in graph order, into `model`, in place.

    Args:
        model: The base.
        entries: The sites, and what each of them does.
        emission: The form of redistribution.
        controls: Thresholds, benign attention and switches of a site.
        flags: Bool `[samples, columns]` by token axis, carried to its first site; None: there are none.

    Raises:
        PatchMismatchError: An array does not have the shape that its site asks for, or a site redistributes although no
            site before it on its token axis, nor itself, detects.
    """
    carried = dict(flags or {})
    landmarks = Landmarks()
    woven = []
    for site, entry in entries:
        check_shapes(site, entry)
        handles, at = open_site(model, site)
        control = controls(at, site, entry)
        margin = reached = own = None
        if entry.detector is not None:
            assert control.threshold is not None, "a detecting site has a threshold"
            margin = detect(at, site, handles, entry.detector, control.threshold, landmarks)
            reached, own = decide(at, margin, control.reach)
        before = carried.get(site.token_axis)
        if own is None:
            own = before
        elif before is not None:
            own = at.op("Or", own, before, name="carried_flags")
        if own is None:
            raise _mismatch(site, "a detecting site before it on its token axis", "none")
        carried[site.token_axis] = own
        if entry.redistribution is not None:
            assert control.beta is not None, "a redistributing site has benign attention"
            neutral = None
            if entry.redistribution.neutral is not None:
                neutral = at.constant("neutral", entry.redistribution.neutral[None, :, None])
            switched = own if control.switch is None else at.op("And", own, control.switch, name="switched")
            switched = per_map(at, site, handles, switched, "flags_of_maps")
            repair = Repair(switched, control.beta, neutral)
            repair_output(at, site, handles, repair, emission)
        woven.append(Woven(site, entry, handles, margin, reached, own))
    return tuple(woven)


def detect(
    at: Insertion,
    site: AttentionSite,
    handles: Handles,
    detector: Detector,
    threshold: ir.Value,
    landmarks: Landmarks,
) -> ir.Value:
    """How far the columns' scores are above the threshold, float `[samples, columns]`."""
    X = column_features(at, handles.P, site, detector.features, landmarks)
    weights = [at.constant(name, array) for name, array in folded(detector, site).items()]
    own = "margin" if site.parts == 1 else "margin_of_maps"
    margin = at.call("DetectorMargin", X, *weights, threshold, name=own)
    return per_sample(at, site, handles, margin, "margin")


def decide(at: Insertion, margin: ir.Value, reach: ir.Value | None) -> tuple[ir.Value, ir.Value]:
    """The margins with the lower threshold where it holds, and which of them are flags; both `[samples, columns]`."""
    reached = margin if reach is None else at.call("Reach", margin, reach, name="margin_in_reach")
    return reached, at.op("Greater", reached, at.constant("zero", np.zeros(1, np.float32)), name="own_flags")


def folded(detector: Detector, site: AttentionSite) -> dict[str, Array]:
    """The detector's arrays, benign statistics folded into the first layer, in the order that the function takes them.

    `weight_1 (log(x + OFFSET) - mean) / scale + bias_1 = W log(x + OFFSET) + b`. Where features come in as plain
    weights `w = x / unit` (`shares_in_one`), `log(x + OFFSET) = log(w + OFFSET / unit) + log(unit)`.
    """
    unit = shares_in_one(site, detector.features)
    weight_1 = detector.weight_1 / detector.scale.T
    return {
        "offset": np.array([OFFSET / unit], np.float32),
        "weight_1": weight_1,
        "bias_1": detector.bias_1 - weight_1 @ (detector.mean - np.float32(np.log(unit))),
        "weight_2": detector.weight_2,
        "bias_2": detector.bias_2,
        "direction": detector.direction,
    }


def check_shapes(site: AttentionSite, entry: SitePatch) -> None:
    """Refuse arrays that do not fit their site.

    Raises:
        PatchMismatchError: An array does not have the shape that its site asks for.
    """
    if entry.detector is not None:
        shares_in_one(site, entry.detector.features)  # refuses whole columns of a free length
        wanted, found = feature_count(site, entry.detector.features), entry.detector.weight_1.shape[1]
        if wanted not in (None, found):
            raise _mismatch(site, f"a detector of {wanted} column features", f"one of {found}")
    if entry.redistribution is not None:
        redistribution = entry.redistribution
        if redistribution.neutral is not None:
            kv_heads, depth = redistribution.neutral.shape
            if site.kv_heads not in (kv_heads, None) or (isinstance(site.depth, int) and site.depth != depth):
                raise _mismatch(
                    site, f"a neutral value of {site.kv_heads} x {site.depth}", f"one of {kv_heads} x {depth}"
                )
        profile = redistribution.beta.shape[:2]
        if profile != (1, 1) and any(
            isinstance(want, int) and want != size
            for want, size in zip((site.heads, site.queries), profile, strict=True)
        ):
            raise _mismatch(site, f"a profile of {site.heads} x {site.queries}", f"one of {profile}")


def _mismatch(site: AttentionSite, expected: str, found: str) -> PatchMismatchError:
    return PatchMismatchError(
        f"site {site.name}", expected=expected, found=found, advice="Fit the patch again for this model."
    )
