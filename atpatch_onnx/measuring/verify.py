"""Prove a patched model against its base: structure, unbake, numbers.

All differences are collected before any is reported.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.driven import driven
from atpatch_onnx.baking.edits import edited
from atpatch_onnx.baking.expose import expose
from atpatch_onnx.baking.invariants import violations
from atpatch_onnx.baking.metadata import PatchedJoint, PatchedLayer, PatchRecord, read_record, weights_digest
from atpatch_onnx.baking.repetition import differences
from atpatch_onnx.baking.unbake import unbake
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.errors import AtPatchError, UnbakeError, VerificationError
from atpatch_onnx.fitting.collect import input_specs
from atpatch_onnx.graph.names import FLAGGED, PREFIX, SCOPE, SCORE, detection_scope, own_name
from atpatch_onnx.measuring.inspect import baked_edits, baked_weight, last_flags, site_values, value_names, weight_names
from atpatch_onnx.patches.patch import LayerEdit
from atpatch_onnx.running.sessions import Array, Progress, Session, silent, tensors

TOLERANCE: Mapping[str, float] = {"FLOAT": 1e-5, "FLOAT16": 4e-3}
"""Largest difference to the numpy reference, relative to the largest value of the site's output (at least 1): rounding
of float32 sums over keys, and of storing the result in half precision."""


@dataclass(frozen=True)
class Check:
    """One thing that was checked."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Verification:
    """All checks of one patched model."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    def raise_if_failed(self) -> None:
        """Raise where a check failed.

        Raises:
            VerificationError: At least one check failed; the error names them all.
        """
        if not self.passed:
            raise VerificationError(
                "the patched model",
                expected=f"all {len(self.checks)} checks to pass",
                found="; ".join(f"{check.name}: {check.detail}" for check in self.failures),
                advice="Do not ship this file: bake the patch into the base again.",
            )

    def to_json(self) -> dict[str, Any]:
        """The checks as plain JSON types."""
        return {
            "passed": self.passed,
            "checks": [{"name": c.name, "passed": c.passed, "detail": c.detail} for c in self.checks],
        }


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
            checks += _numbers(base, patched, record, debug, optimize, batch_size, progress)
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
    chosen = () if record.joint is None else record.joint.outputs
    outputs = own == kept and set(chosen) <= set(own)
    yield Check("outputs", outputs, f"the base has {own}, the patched model begins with {kept}")
    if record.joint is not None:
        unlike = [*differences(patched, record)]
        yield Check("repetition", not unlike, "; ".join(unlike) or "the second pass is the base, node for node")
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
    if record.joint is not None:
        yield from _wrong_joint(patched, record, record.joint)
    for site in record.sites:
        for name in weight_names(site):
            where = own_name(site.site, name)
            try:
                array = baked_weight(patched, site.site, name)
            except UnbakeError as error:
                yield str(error)
                continue
            said = {"threshold": site.threshold, "reach": site.reach}
            if name in said and not np.array_equal(array, np.array([said[name]], np.float32)):
                yield f"{where} is {array.tolist()}, the file says {said[name]}"
            if name == "beta" and not ((array >= 0) & (array <= 1)).all():
                yield f"{where} is not within 0 and 1"
            if name == "switch" and not array.all():
                yield f"{where} is off"


def _wrong_joint(patched: ir.Model, record: PatchRecord, joint: PatchedJoint) -> Iterator[str]:
    """What is wrong with the weights of a joint decision."""
    said = {(SCOPE, "threshold"): joint.threshold}
    if joint.reach or own_name(SCOPE, "reach") in patched.graph.initializers:
        said[SCOPE, "reach"] = joint.reach
    detecting = [(detection_scope(site.site), "weight") for site in record.sites if site.margin is not None]
    for scope, name in [*said, *detecting]:
        try:
            array = baked_weight(patched, scope, name)
        except UnbakeError as error:
            yield str(error)
            continue
        if (scope, name) in said and not np.array_equal(array, np.array([said[scope, name]], np.float32)):
            yield f"{PREFIX}{scope}/{name} is {array.tolist()}, the file says {said[scope, name]}"
        if name == "weight" and not (array.shape == (1,) and 0 <= float(array[0]) <= 1):
            yield f"{PREFIX}{scope}/{name} is not within 0 and 1"


def _numbers(
    base: ir.Model,
    patched: ir.Model,
    record: PatchRecord,
    debug: DebugSet,
    optimize: bool,
    batch_size: int,
    progress: Progress,
) -> Iterator[Check]:
    level = "default optimization" if optimize else "no optimization"
    try:
        edits = baked_edits(base, patched, record)
        reference = edited(base, [edit for edit in edits if edit.units.size])
        sessions = Session(reference, optimize=optimize), Session(patched, optimize=optimize)
        exposed = Session(_exposed(patched, record), optimize=optimize)
        second_pass = driven(reference, record, optimize=optimize)
    except AtPatchError as error:
        yield Check(f"loads, {level}", False, str(error))
        return
    for side, inputs in (("clean", debug.clean), ("counterfactual", debug.counterfactual)):
        stage = f"verifying {side} inputs, {level}"
        tally = _Tally(edits, driven=second_pass is not None)
        for part, expected in sessions[0].stream(inputs, batch_size=batch_size, progress=progress, stage=stage):
            batch = {name: np.ascontiguousarray(array[part]) for name, array in inputs.items()}
            found = next(iter(sessions[1].stream(batch, batch_size=batch_size)))[1]
            inner = next(iter(exposed.stream(batch, batch_size=batch_size)))[1]
            flagged = tally.add(patched, record, part.stop - part.start, expected, found, inner)
            if second_pass is not None and flagged.any():
                whole = exposed.filled(batch)  # a fixed batch, whose last one may be short
                if whole is not batch:
                    missing = len(next(iter(whole.values()))) - len(flagged)
                    flagged = np.concatenate([flagged, np.repeat(flagged[-1:], missing)])
                    found, inner = sessions[1].run(whole), exposed.run(whole)
                tally.second_pass = max(tally.second_pass, second_pass.largest_difference(whole, flagged, found, inner))
        yield from tally.checks(f"{side} inputs, {level}")


def _exposed(patched: ir.Model, record: PatchRecord) -> ir.Model:
    """The patched model with what the numbers are held against; refuses a file that lacks it."""
    for site in record.sites:
        for name in weight_names(site):
            baked_weight(patched, site.site, name)
    names = [name for site in record.sites if site.value is not None for name in value_names(site)]
    names += [name for layer in record.layers for name in (layer.base_value, layer.value)]
    return expose(patched, [*names, *_all_flags(record)])


def _all_flags(record: PatchRecord) -> list[str]:
    """The values that hold the flags of all sites; several token axes have several."""
    if record.detects:
        last_flags(record.sites)
    return list(dict.fromkeys(site.flags for site in record.sites))


class _Tally:
    """What the batches of one side add up to."""

    def __init__(self, edits: Sequence[LayerEdit], *, driven: bool) -> None:
        self.edits = {edit.layer: edit for edit in edits}
        self.inputs = self.flagged = self.differing = self.misreported = 0
        self.monitored = False
        self.driven = driven
        self.second_pass = 0.0
        self.edited: dict[str, str] = {}
        self.unreadable: dict[str, str] = {}
        self.worst: dict[str, float] = {}
        self.allowed: dict[str, float] = {}

    def add(
        self,
        patched: ir.Model,
        record: PatchRecord,
        count: int,
        expected: Mapping[str, Array],
        found: Mapping[str, Array],
        inner: dict[str, Array],
    ) -> NDArray[np.bool_]:
        """Compare the base's outputs with the patched model's, and every site and edited layer with the reference.

        Returns:
            Which samples are flagged.
        """
        flags = [np.any(inner[name], axis=1) for name in _all_flags(record)]
        flagged = np.any(flags, axis=0) if flags else np.zeros(count, np.bool_)
        self.inputs += len(flagged)
        self.flagged += int(flagged.sum())
        same = np.ones(len(flagged), np.bool_)
        for name, array in expected.items():
            same &= _rows_equal(array, found[name], flagged) if name in found else np.zeros(len(flagged), np.bool_)
        self.differing += int((~same & ~flagged).sum())
        if FLAGGED in found and SCORE in found:
            self.monitored = True
            reported = (found[FLAGGED][:, 0] != flagged) | ((found[SCORE][:, 0] > 0) != flagged)
            self.misreported += int(reported.sum())
        for layer in record.layers:
            self._add_layer(layer, inner)
        for site in record.sites:
            if site.value is None or not np.any(inner[site.flags]):
                continue
            try:
                values = site_values(patched, site, inner)
            except UnbakeError as error:
                self.unreadable[site.site] = str(error)
                continue
            reference = values.reference()
            difference, largest = (float(np.abs(a).max()) for a in (values.corrected - reference, reference))
            if not np.isfinite(difference):  # a NaN would pass every comparison below
                difference, largest = np.inf, 1.0
            allowed = TOLERANCE[_dtype(inner[site.output])] * max(1.0, largest)
            if difference / allowed >= self.worst.get(site.site, 0.0) / self.allowed.get(site.site, 1.0):
                self.worst[site.site], self.allowed[site.site] = difference, allowed
        return flagged

    def _add_layer(self, layer: PatchedLayer, inner: Mapping[str, Array]) -> None:
        """Edited units against numpy, the others bit for bit; a fault stays until the verdict."""
        edit, before, after = self.edits[layer.layer], inner[layer.base_value], inner[layer.value]
        others = np.setdiff1d(np.arange(before.shape[-1]), edit.units)
        reference = before[..., edit.units].astype(np.float64) * edit.factor + edit.constant
        worst = float(np.abs(after[..., edit.units] - reference).max(initial=0.0))
        allowed = TOLERANCE[_dtype(after)] * max(1.0, float(np.abs(reference).max(initial=0.0)))
        if not worst <= allowed:  # nor a NaN
            self.edited[layer.layer] = f"edited units differ from the numpy reference by {worst:.2e}"
        elif before[..., others].tobytes() != after[..., others].tobytes():
            self.edited[layer.layer] = "units that are not edited differ"
        else:
            self.edited.setdefault(layer.layer, "")

    def checks(self, where: str) -> Iterator[Check]:
        """The verdicts."""
        unflagged = self.inputs - self.flagged
        base = "the base with the neuron edits" if self.edited else "the base"
        yield Check(
            f"unflagged {where}",
            self.differing == 0,
            f"{unflagged - self.differing} of {unflagged} bit-identical to {base}",
        )
        if self.monitored:
            yield Check(
                f"monitoring, {where}",
                self.misreported == 0,
                f"{self.inputs - self.misreported} of {self.inputs} reported as their columns are flagged",
            )
        if self.driven and self.flagged:
            said = "the base's" if self.second_pass <= 1 else "not the base's"
            yield Check(
                f"second pass, {where}",
                self.second_pass <= 1,
                f"{self.flagged} flagged inputs, {said} given what its sites hand on: the largest difference is"
                f" {self.second_pass:.1e} of what is allowed",
            )
        for layer, fault in self.edited.items():
            said = fault or "edited units agree with the numpy reference, the others bit for bit with the base"
            yield Check(f"hidden layer {layer}, {where}", not fault, said)
        for site, fault in self.unreadable.items():
            yield Check(f"site {site}, {where}", False, fault)
        for site, worst in self.worst.items():
            yield Check(
                f"site {site}, {where}",
                worst <= self.allowed[site],
                f"{self.flagged} flagged inputs, largest difference to the numpy reference {worst:.2e}"
                f" (allowed {self.allowed[site]:.2e})",
            )


def _rows_equal(expected: Array, found: Array, flagged: Array) -> Array:
    """Which samples are equal bit for bit; outputs without a sample axis count where nothing is flagged."""
    sides = tensors(expected), tensors(found)
    if [_shaped(array) for array in sides[0]] != [_shaped(array) for array in sides[1]]:
        return np.zeros(len(flagged), bool)
    if not isinstance(expected, np.ndarray) or expected.ndim == 0 or len(expected) != len(flagged):
        same = [_content(array) for array in sides[0]] == [_content(array) for array in sides[1]]
        return np.full(len(flagged), bool(flagged.any()) or same)
    pairs: Sequence[tuple[Array, Array]] = list(zip(expected, found, strict=True))
    return np.array([_content(np.asarray(one)) == _content(np.asarray(other)) for one, other in pairs], bool)


def _shaped(array: Array) -> tuple[np.dtype[Any], tuple[int, ...]]:
    return array.dtype, array.shape


def _content(array: Array) -> object:
    """Bits, or texts: numpy holds these by reference."""
    return array.tolist() if array.dtype.hasobject else array.tobytes()


def _dtype(array: Array) -> str:
    return "FLOAT16" if array.dtype == np.float16 else "FLOAT"
