"""Write a patch whose sites decide together into a graph.

    every site scores the base's own map  ->  one weighted sum a column  ->  flags
    ->  the second pass: the model once more, with redistribution at all chosen sites  ->  outputs, sample by sample

On an input without a flag the base's outputs are handed on, as far as they have samples on their first axis. Where
nothing in a batch is flagged, all of them are, and the second pass does not run; in the branchless form it always does.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import onnx_ir as ir

from atpatch_onnx.baking.emission import Emission, Handles, open_site
from atpatch_onnx.baking.features import Landmarks
from atpatch_onnx.baking.second_pass import choose, fold, hand_out, repeat
from atpatch_onnx.baking.weave import Controls, Woven, check_shapes, decide, detect, weave
from atpatch_onnx.errors import BakeError, PatchMismatchError
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.graph.names import SCOPE, again, detection_scope
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.patches.patch import Joint, SitePatch


@dataclass(frozen=True)
class Joined:
    """What a joint decision left in the graph."""

    sites: tuple[Woven, ...]
    outputs: tuple[str, ...]
    """The model's outputs that depend on the redistributing sites: they are chosen between both passes."""


def weave_jointly(
    model: ir.Model,
    entries: Sequence[tuple[AttentionSite, SitePatch]],
    joint: Joint,
    weights: Mapping[str, float],
    by_sample: frozenset[str],
    emission: Emission,
    controls: Callable[[Insertion, AttentionSite, SitePatch], Controls],
) -> Joined:
    """Write a joint decision into `model`, in place.

    A site that no output of the model depends on is not redistributed: it is not part of the second pass.

    Args:
        model: The base.
        entries: The sites and what each of them does, in graph order.
        joint: Threshold and reach.
        weights: Of the detecting sites, by name.
        by_sample: The outputs with the samples on their first axis: `sample_outputs` of the base.
        emission: Whether the second pass is inside an `If`.
        controls: Benign attention and switches of a site.

    Raises:
        BakeError: An output cannot be exchanged, or a site has a name that the joint decision needs.
        PatchMismatchError: An array does not have the shape that its site asks for; the sites have several token axes;
            or none of them redistributes.
    """
    _require_one_axis(entries)
    before = len(model.graph)
    repeated = repeat(model, [site.output for site, entry in entries if entry.redistribution is not None])
    entries = _of_use(entries, repeated)
    second = model.graph[before]
    scored = _scores(model, entries, weights)
    at = Insertion(model.graph, SCOPE, anchor=_before(model.graph, second))
    score = at.op("Sum", *(value for _, value in scored.values()), name="score")
    margin = at.op("Sub", score, at.constant("threshold", np.array([joint.threshold], np.float32)), name="margin")
    reach = at.constant("reach", np.array([joint.reach], np.float32)) if joint.reach else None
    reached, flags = decide(at, margin, reach)
    sampled = at.call("SampleFlag", flags, name="sample_flag")
    any_flag = at.call("AnyFlag", flags, name="any_flag")

    redistributing = [
        (_again(site, repeated), replace(entry, detector=None))
        for site, entry in entries
        if entry.redistribution is not None
    ]
    carried = {site.token_axis: flags for site, _ in redistributing}
    repaired = weave(model, redistributing, Emission.BRANCHLESS, controls, carried)
    choices = choose(model, repeated, sampled, by_sample)
    if emission is Emission.CONDITIONAL:
        choices = fold(model, second, any_flag, choices)
    woven = {step.site.name: step for step in repaired}
    sites = []
    for site, entry in entries:
        own = (margin, reached) if entry.detector is not None else (None, None)
        step = woven.get(site.name) or Woven(site, entry, scored[site.name][0], None, None, flags)
        sites.append(replace(step, entry=entry, margin=own[0], reached=own[1]))
    return Joined(tuple(sites), hand_out(model, choices))


def _require_one_axis(entries: Sequence[tuple[AttentionSite, SitePatch]]) -> None:
    axes = {site.token_axis for site, _ in entries}
    if len(axes) > 1:
        raise PatchMismatchError(
            "the joint decision",
            expected="sites of one token axis",
            found=f"sites of {len(axes)}",
            advice="Fit the patch again for this model.",
        )
    taken = [site.name for site, _ in entries if site.name == SCOPE or site.name.startswith(f"{SCOPE}/")]
    if taken:
        raise BakeError(
            f"site {taken[0]}",
            expected=f"a name other than {SCOPE!r}, under which the joint decision stands",
            found=repr(taken[0]),
            advice="Rename the site's nodes, or fit a patch whose sites decide alone (--decision alone).",
        )


def _of_use(
    entries: Sequence[tuple[AttentionSite, SitePatch]], repeated: frozenset[str]
) -> list[tuple[AttentionSite, SitePatch]]:
    """What sites do that is of use: those outside of the second pass do not redistribute."""
    found = [
        (site, entry if site.output in repeated else replace(entry, redistribution=None)) for site, entry in entries
    ]
    if not any(entry.redistribution is not None for _, entry in found):
        raise PatchMismatchError(
            "the joint decision",
            expected="a site that redistributes and that some output of the model depends on",
            found="none",
            advice="Fit the patch again for this model.",
        )
    return [(site, entry) for site, entry in found if entry.detector is not None or entry.redistribution is not None]


def _scores(
    model: ir.Model, entries: Sequence[tuple[AttentionSite, SitePatch]], weights: Mapping[str, float]
) -> dict[str, tuple[Handles, ir.Value]]:
    """Of every detecting site its values in the first pass and its weighted score, float `[samples, columns]`."""
    landmarks, scored = Landmarks(), {}
    for site, entry in entries:
        if entry.detector is None:
            continue
        check_shapes(site, SitePatch(site.name, entry.detector, None))
        handles, at = open_site(model, replace(site, name=detection_scope(site.name)))
        score = detect(at, site, handles, entry.detector, at.constant("zero", np.zeros(1, np.float32)), landmarks)
        weight = at.constant("weight", np.array([weights[site.name]], np.float32))
        scored[site.name] = handles, at.op("Mul", score, weight, name="weighted")
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
