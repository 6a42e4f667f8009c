"""Prove a patched model against its base: structure, unbake, numbers.

All differences are collected before any is reported.
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.invariants import violations
from atpatch_onnx.baking.metadata import PatchedSite, PatchRecord, read_record, weights_digest
from atpatch_onnx.baking.read import read_threshold
from atpatch_onnx.baking.unbake import unbake
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.errors import UnbakeError
from atpatch_onnx.fitting.collect import input_specs
from atpatch_onnx.graph.names import PREFIX, own_name
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.measuring.checks import Check as Check
from atpatch_onnx.measuring.checks import Verification as Verification
from atpatch_onnx.measuring.driven import sites_of
from atpatch_onnx.measuring.inspect import baked_detector, baked_edits, baked_weight
from atpatch_onnx.measuring.verify_numbers import numbers
from atpatch_onnx.patches.patch import Detector
from atpatch_onnx.running.sessions import Progress, silent


def verify(
    base: graphs.ModelOrPath,
    patched: graphs.ModelOrPath,
    debug: DebugSet | None = None,
    *,
    batch_size: int = 32,
    progress: Progress = silent,
) -> Verification:
    """Check everything that must hold of a patched model; without a debug set, everything but the numbers.

    Args:
        base: The model before, or its path.
        patched: The model after, or its path.
        debug: Inputs to run both on, clean and counterfactual.
        batch_size: Inputs at a time.
        progress: Told after every batch.

    Raises:
        UnbakeError: `patched` does not say that a patch is in it.
        DebugSetError: The debug set does not fit the model.
        RunError: onnxruntime refuses a model or an input.
    """
    base, patched = graphs.as_model(base), graphs.as_model(patched)
    record = read_record(patched)
    checks = [*_structure(base, patched, record)]
    if debug is not None:
        debug.check_inputs(input_specs(base))
        for optimize in (False, True):
            checks += numbers(base, patched, record, debug, optimize, batch_size, progress)
    return Verification(tuple(checks))


def _structure(base: ir.Model, patched: ir.Model, record: PatchRecord) -> Iterator[Check]:
    found = violations(patched)
    yield Check("invariants", not found, "; ".join(found) or "every rule of a patched graph holds")
    fingerprint = graphs.fingerprint(base)
    yield Check("base", record.base == fingerprint, f"the file names {record.base}, the base is {fingerprint}")
    try:
        unbaked = graphs.fingerprint(unbake(patched))
        same = unbaked == fingerprint
        yield Check("unbake", same, "unbaking gives the base back" if same else f"unbaking gives {unbaked}")
    except UnbakeError as error:
        yield Check("unbake", False, str(error))
    own = [output.name for output in base.graph.outputs]
    kept = [output.name for output in patched.graph.outputs][: len(own)]
    yield Check("outputs", own == kept, f"the base has {own}, the patched model begins with {kept}")
    wrong = [*_wrong_weights(base, patched, record)]
    yield Check("weights", not wrong, "; ".join(wrong) or "finite, and as the file says of itself")


def _wrong_weights(base: ir.Model, patched: ir.Model, record: PatchRecord) -> Iterator[str]:
    """What no bake writes, and whatever is not as it was when the patch was baked."""
    if weights_digest(patched) != record.weights:
        yield f"the weights under {PREFIX} are not those that were baked"
    for name, value in patched.graph.initializers.items():
        if name.startswith(PREFIX) and value.const_value is not None:
            array = value.const_value.numpy()
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                yield f"{name} is not finite"
    try:
        for layer, edit in zip(record.layers, baked_edits(base, patched, record), strict=True):
            if len(edit.units) != layer.edited:
                yield f"{len(edit.units)} units of hidden layer {layer.layer} are edited, the file says {layer.edited}"
    except UnbakeError as error:
        yield str(error)
    try:
        for patched_site, site in sites_of(base, record.sites):
            yield from _wrong_numbers(base, patched, patched_site, site)
    except UnbakeError as error:
        yield str(error)


def _wrong_numbers(base: ir.Model, patched: ir.Model, entry: PatchedSite, site: AttentionSite) -> Iterator[str]:
    """A threshold or level of a site that is not the one number that the file says, or that baking writes."""
    if entry.redistributes:
        level = baked_weight(patched, entry.site, "level")
        if level.shape != (1,) or level[0] != 0:
            yield f"{own_name(entry.site, 'level')} is {level.tolist()}, where a single 0 should stand"
    if entry.own is None:
        return
    found = baked_detector(patched, entry.site)
    if len(found.weights) != np.prod(site.key.sizes):
        yield f"{own_name(entry.site, 'detector')} has {len(found.weights)} rows, its keys have {site.key.sizes}"
        return
    weights = found.weights[site.key.columns.reshape(-1)]
    output = None if found.output is None else found.output[:, 0]
    said = float("nan") if entry.threshold is None else entry.threshold
    expected = read_threshold(base.graph, site.key, Detector(weights, found.bias, output, said))
    if not np.array_equal(found.threshold, expected):
        name = own_name(entry.site, "threshold")
        yield f"{name} is {found.threshold.tolist()}, where the file says that {expected.tolist()} should stand"
