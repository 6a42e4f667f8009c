"""Put a patch into a model's graph.

The steps, each on a copy of the base, the base itself left alone:

    patches composed to one  ->  refuse what cannot be baked  ->  hidden units edited, layer by layer
    ->  detect and redistribute, site by site or jointly  ->  monitoring outputs  ->  what the file says of itself
    ->  maps of fused nodes only where they are needed  ->  functions, imported or inlined
    ->  the invariants of every patched graph

Flags are carried along a token axis: a site's flags are its own or those of the earlier patched sites of its axis.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.deferral import defer
from atpatch_onnx.baking.edits import bake_edits
from atpatch_onnx.baking.emission import Emission, import_functions, inline_functions
from atpatch_onnx.baking.invariants import require_invariants
from atpatch_onnx.baking.jointly import weave_jointly
from atpatch_onnx.baking.metadata import PatchedJoint, PatchedLayer, PatchedSite, describe, is_patched
from atpatch_onnx.baking.targets import Target, require_target, target_named
from atpatch_onnx.baking.weave import Controls, Woven, weave
from atpatch_onnx.errors import BakeError, PatchMismatchError
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.graph.names import PREFIX
from atpatch_onnx.graph.parts import require_opset
from atpatch_onnx.matching import find_sites, known_shapes, sample_outputs
from atpatch_onnx.matching.sites import AttentionSite, Form
from atpatch_onnx.patches.compose import compose
from atpatch_onnx.patches.patch import Patch, SitePatch


def bake(
    model: ir.Model,
    patch: Patch | Sequence[Patch],
    *,
    target: str = "cpu",
    emission: Emission | None = None,
    inline: bool | None = None,
    monitor: bool = True,
    site_flags: bool = False,
) -> ir.Model:
    """A copy of `model` with `patch` in its graph. The weights are shared with `model`, not copied.

    Args:
        model: The base, the very model that the patch was fitted on.
        patch: The fix, or several in their order: see `compose`.
        target: Where it will run, a key of `TARGETS`.
        emission: `conditional` or `branchless`; None: the target's own, and `branchless` for float16 and bfloat16
            models. Their results are the same.
        inline: Whether to leave no model-local functions, if not as the target needs.
        monitor: Whether to add the outputs `atpatch/flagged` (bool `[batch, 1]`) and `atpatch/score` (float
            `[batch, 1]`).
        site_flags: Whether to add an output `atpatch/<site>/flags` (bool `[batch, keys]`) for every patched site.

    Raises:
        BakeError: The target is unknown or does not take the model, the model is patched already, or its opset is too
            old.
        PatchMismatchError: The patch was fitted on another model, or several do not go together.
    """
    patch = compose([patch] if isinstance(patch, Patch) else patch)
    wanted = target_named(target)
    inline = wanted.inline if inline is None else inline
    entries = _patched_sites(model, patch)
    emission = _emission(wanted, entries) if emission is None else Emission(emission)
    patched = graphs.copy(model)
    layers = bake_edits(patched, patch.edits)
    if patch.joint is None:
        woven, joint = weave(patched, entries, emission, _constants), None
    else:
        joined = weave_jointly(
            patched, entries, patch.joint, patch.weights, sample_outputs(model), emission, _constants
        )
        numbers = float(patch.joint.threshold), float(patch.joint.reach)
        woven, joint = joined.sites, PatchedJoint(*numbers, joined.outputs)
    monitors = _add_monitors(patched, woven) if monitor and woven else []
    if site_flags:
        monitors += [_add_output(patched, step.flags, f"{step.site.name}/flags", [None, None]) for step in woven]
    alone = joint is None or emission is Emission.CONDITIONAL
    if alone and any(site.form is Form.ATTENTION for site, _ in entries):
        defer(patched, known_shapes(model))
    edited = {edit.layer: len(edit.units) for edit in patch.edits}
    entry = describe(
        patch,
        patched,
        emission=emission.value,
        sites=[_patched_site(step, alone=joint is None) for step in woven],
        joint=joint,
        layers=[PatchedLayer(layer.name, layer.value, edited[layer.name]) for layer in layers],
        monitors=monitors,
    )
    patched.metadata_props.update(entry)
    import_functions(patched)
    if inline or patched.ir_version < 8:  # model-local functions came with IR version 8
        inline_functions(patched)
    require_target(patched, target)
    require_invariants(patched)
    return patched


def _emission(target: Target, entries: Sequence[tuple[AttentionSite, SitePatch]]) -> Emission:
    """The target's own; branchless where half precision is: what runtimes cast around an `If` may change the bits."""
    halves = any(site.dtype != ir.DataType.FLOAT.name for site, _ in entries)
    return Emission.BRANCHLESS if halves else target.emission


def _patched_sites(model: ir.Model, patch: Patch) -> list[tuple[AttentionSite, SitePatch]]:
    """The patch's sites in the model, or the reason why they cannot be patched."""
    if is_patched(model):
        raise BakeError(
            "the model",
            expected="a base model",
            found="one that is patched already",
            advice="Unbake it first.",
        )
    taken = sorted(name for name in graphs.all_names(model) if name.startswith(PREFIX))
    if taken:
        raise BakeError(
            "the model",
            expected=f"no names under {PREFIX!r}",
            found=repr(taken[0]),
            advice="Rename these nodes and values, or unbake the model if it was patched.",
        )
    require_opset(model)
    found = graphs.fingerprint(model)
    if patch.base != found:
        raise PatchMismatchError(
            f"patch {patch.id}",
            expected=f"the model it was fitted on, {patch.base}",
            found=f"a model with the fingerprint {found}",
            advice="Bake it into the model it was fitted on, or fit a patch for this one.",
        )
    chosen = [entry.site for entry in patch.sites]
    if not (chosen or patch.edits) or len(set(chosen)) < len(chosen):
        raise PatchMismatchError(
            f"patch {patch.id}",
            expected="at least one site or neuron edit, and each site once",
            found=f"the sites {', '.join(chosen) or 'none'}",
            advice="Fit the patch again.",
        )
    detecting = sum(entry.detector is not None for entry in patch.sites)
    if patch.joint is not None and len(patch.joint.weights) != detecting:
        raise PatchMismatchError(
            f"patch {patch.id}",
            expected=f"a joint decision with a weight for each of {detecting} detecting sites",
            found=f"{len(patch.joint.weights)} weights",
            advice="Fit the patch again.",
        )
    by_name = {site.name: site for site in find_sites(model)} if chosen else {}
    missing = [entry.site for entry in patch.sites if entry.site not in by_name]
    if missing:
        raise PatchMismatchError(
            f"patch {patch.id}",
            expected=f"the attention site {missing[0]!r}",
            found=f"the sites {', '.join(by_name) or 'none'}",
            advice="Use the version of atpatch-onnx that fitted the patch, or fit it again.",
        )
    return sorted(((by_name[entry.site], entry) for entry in patch.sites), key=lambda pair: pair[0].index)


def _constants(at: Insertion, site: AttentionSite, entry: SitePatch) -> Controls:
    """Thresholds, benign attention and switches as weights of the graph."""
    threshold = reach = beta = switch = None
    if entry.detector is not None:
        threshold = at.constant("threshold", np.array([entry.detector.threshold], np.float32))
        if entry.detector.reach:
            reach = at.constant("reach", np.array([entry.detector.reach], np.float32))
    if entry.redistribution is not None:
        beta = at.constant("beta", entry.redistribution.beta)
        switch = at.constant("switch", np.array([True]))
    return Controls(threshold, reach, beta, switch)


def _patched_site(step: Woven, *, alone: bool) -> PatchedSite:
    """What the file says of one site, which detects alone or in a joint decision."""
    detector, redistribution = step.entry.detector, step.entry.redistribution
    value = None if redistribution is None else ("own" if redistribution.neutral is None else "neutral")
    parts = step.site.parts
    return PatchedSite(
        site=step.site.name,
        threshold=detector.threshold if detector and alone else None,
        reach=detector.reach if detector and alone else None,
        value=value,
        map=step.handles.P.name or "",
        values=step.handles.V.name or "",
        value_layout=step.handles.value_layout,
        kv_heads=step.site.kv_heads if isinstance(step.site.kv_heads, int) else 1,
        output=step.site.output,
        output_layout=step.site.output_layout,
        parts=parts if isinstance(parts, int) else None,
        flags=step.flags.name or "",
        margin=None if step.margin is None else step.margin.name,
    )


def _add_monitors(model: ir.Model, woven: Sequence[Woven]) -> list[str]:
    """Outputs `atpatch/flagged` and `atpatch/score` over all sites."""
    end = Insertion(model.graph, "monitor")
    batch = next((value.shape[0] for value in model.graph.inputs if value.shape is not None and len(value.shape)), None)
    flagged = None
    last = {step.site.token_axis: step for step in woven}
    for step in last.values():  # flags are carried: the last site of an axis has them all
        flag = end.call("SampleFlag", step.flags, name=f"{step.site.name}/flagged")
        flagged = flag if flagged is None else end.op("Or", flagged, flag, name=f"{step.site.name}/any_flagged")
    margins = list(dict.fromkeys(step.margin for step in woven if step.margin is not None))
    assert flagged is not None
    assert margins, "a patch detects somewhere"
    every = margins[0]
    if len(margins) > 1:
        every = end.op("Concat", *margins, name="margins", attributes=[ir.AttrInt64("axis", 1)])
    score = end.call("SampleScore", every, name="sample_score")
    return [_add_output(model, flagged, "flagged", [batch, 1]), _add_output(model, score, "score", [batch, 1])]


def _add_output(model: ir.Model, value: ir.Value, name: str, shape: Sequence[int | ir.SymbolicDim | str | None]) -> str:
    """An output `atpatch/<name>`, behind all others."""
    result = Insertion(model.graph, "monitor").op("Identity", value, name=name)
    result.name = f"{PREFIX}{name}"
    result.shape = ir.Shape(shape)
    result.dtype = ir.DataType.FLOAT if name == "score" else ir.DataType.BOOL
    model.graph.outputs.append(result)
    return result.name
