"""Write a patch whose sites decide together into a graph.

    every site scores the base's own map  ->  one weighted sum a column  ->  flags
    ->  the second pass: the model once more, with redistribution at all chosen sites  ->  outputs, sample by sample

On an input without a flag the base's outputs are handed on, and where nothing in a batch is flagged the second pass
does not run (in the branchless form it always does).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from atpatch_onnx.emission import Emission, Handles, open_site, sample_input
from atpatch_onnx.errors import PatchMismatchError
from atpatch_onnx.features import Landmarks
from atpatch_onnx.insertion import Insertion
from atpatch_onnx.patch import Joint, SitePatch
from atpatch_onnx.second_pass import SCOPE, again, choose, detection_scope, fold, hand_out, repeat
from atpatch_onnx.sites import AttentionSite
from atpatch_onnx.weave import Controls, Woven, check_shapes, decide, detect, weave


@dataclass(frozen=True)
class Joined:
    """What a joint decision left in the graph."""

    sites: tuple[Woven, ...]
    outputs: tuple[str, ...]
    """The model's outputs that are chosen between both passes."""


def weave_jointly(
    model: ir.Model,
    entries: Sequence[tuple[AttentionSite, SitePatch]],
    joint: Joint,
    emission: Emission,
    controls: Callable[[Insertion, AttentionSite, SitePatch], Controls],
) -> Joined:
    """Write a joint decision of `entries`, in graph order, into `model`, in place.

    Raises:
        PatchMismatchError: An array does not have the shape that its site asks for; the sites have several token axes;
            or none of them redistributes.
    """
    axes = {site.token_axis for site, _ in entries}
    redistributing = [(site, entry) for site, entry in entries if entry.redistribution is not None]
    if len(axes) > 1 or not redistributing:
        raise PatchMismatchError(
            "the joint decision",
            expected="sites of one token axis, some of which redistribute",
            found=f"{len(redistributing)} that redistribute, of {len(axes)} token axes",
            advice="Fit the patch again for this model.",
        )
    before = len(model.graph)
    repeated = repeat(model, [site.output for site, _ in redistributing])
    second = model.graph[before]
    scored = _scores(model, entries, joint)
    at = Insertion(model.graph, SCOPE, anchor=_before(model.graph, second))
    score = at.op("Sum", *(value for _, value in scored.values()), name="score")
    margin = at.op("Sub", score, at.constant("threshold", np.array([joint.threshold], np.float32)), name="margin")
    reach = at.constant("reach", np.array([joint.reach], np.float32)) if joint.reach else None
    reached, flags = decide(at, margin, reach)
    sampled = at.call("SampleFlag", flags, name="sample_flag")
    any_flag = at.call("AnyFlag", flags, name="any_flag")

    again_sites = [(_again(site, repeated), replace(entry, detector=None)) for site, entry in redistributing]
    repaired = weave(model, again_sites, Emission.BRANCHLESS, controls, dict.fromkeys(axes, flags))
    choices = choose(model, repeated, sampled, sample_input(model.graph))
    if emission is Emission.CONDITIONAL:
        choices = fold(model, second, any_flag, choices)
    outputs = hand_out(model, choices)
    woven = {step.site.name: step for step in repaired}
    sites = []
    for site, entry in entries:
        detects = entry.detector is not None
        step = woven.get(site.name) or Woven(site, entry, scored[site.name][0], None, None, flags)
        sites.append(
            replace(step, entry=entry, margin=margin if detects else None, reached=reached if detects else None)
        )
    return Joined(tuple(sites), outputs)


def _scores(
    model: ir.Model, entries: Sequence[tuple[AttentionSite, SitePatch]], joint: Joint
) -> dict[str, tuple[Handles, ir.Value]]:
    """Of every detecting site its values in the first pass and its weighted score, float `[samples, columns]`."""
    landmarks, scored = Landmarks(), {}
    detecting = [(site, entry.detector) for site, entry in entries if entry.detector is not None]
    for (site, detector), weight in zip(detecting, joint.weights, strict=True):
        check_shapes(site, SitePatch(site.name, detector, None))
        handles, at = open_site(model, replace(site, name=detection_scope(site.name)))
        score = detect(at, site, handles, detector, at.constant("zero", np.zeros(1, np.float32)), landmarks)
        factor = at.constant("weight", np.array([weight], np.float32))
        scored[site.name] = handles, at.op("Mul", score, factor, name="weighted")
    return scored


def _again(site: AttentionSite, repeated: frozenset[str]) -> AttentionSite:
    """A site as it is in the second pass."""

    def moved(name: str) -> str:
        return again(name) if name in repeated else name

    map_ = None if site.map is None else moved(site.map)
    return replace(site, output=moved(site.output), value=moved(site.value), map=map_)


def _before(graph: ir.Graph, node: ir.Node) -> ir.Node:
    """The node before this one."""
    return next(one for one, other in pairwise(graph) if other is node)
