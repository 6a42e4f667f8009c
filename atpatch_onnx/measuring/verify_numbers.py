"""A patched model and its base on the same inputs, at both levels of optimization.

Outputs are compared at both. Values within are read without optimization only, where each is what its node computes:
optimizers move and fuse nodes, such as quantization onto the values that it follows, and keep names all the same.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.baking.edits import edited
from atpatch_onnx.baking.expose import expose
from atpatch_onnx.baking.metadata import PatchedLayer, PatchedSite, PatchRecord
from atpatch_onnx.baking.read_back import baked_detector, baked_edits, sites_of
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.errors import AtPatchError
from atpatch_onnx.graph import ModelOrPath, custom_ops
from atpatch_onnx.graph.names import FLAGGED, SCORE
from atpatch_onnx.matching import batching
from atpatch_onnx.measuring.checks import Check
from atpatch_onnx.measuring.driven import Driven, replaced_in
from atpatch_onnx.measuring.inspect import margins
from atpatch_onnx.running.bits import by_sample, same_bits, same_samples, same_shapes, without_flagged
from atpatch_onnx.running.providers import Providers, first
from atpatch_onnx.running.sessions import Array, Progress, Session

EDITED: Mapping[str, float] = {"FLOAT": 1e-5, "FLOAT16": 4e-3}
"""Largest difference of an edited unit to the numpy reference, relative to the largest one (at least 1): rounding of
one product and one sum, and of storing the result in half precision."""


def numbers(
    base: ir.Model,
    patched: ir.Model,
    record: PatchRecord,
    debug: DebugSet,
    optimize: bool,
    batch_size: int,
    progress: Progress,
    files: tuple[ModelOrPath, ModelOrPath],
    providers: Providers,
) -> Iterator[Check]:
    """What is checked by running both at one level of optimization; arguments as in `verify`.

    `files` are the models once more, by their paths where they came from files: outputs are those of the bytes on disk.
    """
    level = "default optimization" if optimize else "no optimization"
    try:
        look = _Look(base, patched, record, optimize, files, providers)
    except AtPatchError as error:
        Session(files[0], optimize=optimize, custom_ops=custom_ops(base))  # else it is not the patched file's fault
        yield Check(f"loads, {level}", False, str(error))
        return
    for side, inputs in (("clean", debug.clean), ("counterfactual", debug.counterfactual)):
        stage = f"verifying {side} inputs, {level}"
        tally = _Tally(look)
        for part, expected in look.base.stream(inputs, batch_size=batch_size, progress=progress, stage=stage):
            batch = {name: np.ascontiguousarray(array[part]) for name, array in inputs.items()}
            filled, count = look.base.filled(batch), part.stop - part.start
            tally.add(filled, count, expected if filled is batch else look.base.run(filled))
        yield from tally.checks(f"{side} inputs, {level}")


_HALVES = (ir.DataType.FLOAT16.name, ir.DataType.BFLOAT16.name)


class _Look:
    """The sessions that are held against each other, at one level of optimization."""

    def __init__(
        self,
        base: ir.Model,
        patched: ir.Model,
        record: PatchRecord,
        optimize: bool,
        files: tuple[ModelOrPath, ModelOrPath],
        providers: Providers,
    ) -> None:
        self.record = record
        self.within = not optimize
        self.edits = {edit.layer: edit for edit in baked_edits(base, patched, record)}
        reference = edited(base, [edit for edit in self.edits.values() if edit.units.size])
        self.sites = sites_of(base, record.sites)
        self.margins = {site.site: site.margin for site in record.sites}
        self.replaced = replaced_in(patched, [site for _, site in self.sites])
        self.detectors = {one.site: baked_detector(patched, one.site) for one, _ in self.sites if one.own is not None}
        where = batching(base)
        how: dict[str, Any] = {"optimize": optimize, "batching": where, "providers": providers}
        how["custom_ops"] = custom_ops(base)
        self.base = Session(reference if self.edits else files[0], **how)
        self.patched = Session(files[1], **how)
        names = [name for one in record.sites for name in (one.margin, one.own) if name is not None]
        names += [name for one in self.replaced for name in (one.value, one.result)]
        names += [self.read(one) for one in record.sites if one.own is not None]
        names += [name for layer in record.layers for name in (layer.value, layer.edited_value)]
        monitored = {FLAGGED, SCORE} <= set(record.monitors)
        inner = self.within or not monitored
        self.exposed = Session(expose(patched, names), **{**how, "optimize": False}) if inner else None
        # In half precision onnxruntime's CPU kernels hand keys on unrounded, which cannot be given to the base.
        comparable = self.replaced and not any(one.place.dtype in _HALVES for one in self.replaced)
        alone = not optimize and not first(providers).compiles  # node by node
        self.driven = Driven(reference, self.replaced, where, providers) if comparable and alone else None

    def read(self, site: PatchedSite) -> str:
        """Name of the keys that a site's detector reads.

        They have exchanged names with what stands in for them where they are an output of the model.
        """
        return next((one.value for one in self.replaced if one.base_name == site.key), site.key)

    def run(self, batch: Mapping[str, Array]) -> tuple[dict[str, Array], dict[str, Array], NDArray[np.bool_]]:
        """The patched model's outputs, its values within, if they are looked at, and which samples have a flag."""
        found, samples = self.patched.run(batch), len(next(iter(batch.values())))
        if self.exposed is not None:
            inner = self.exposed.run(batch)
            return found, inner, self._flags(inner, samples)
        reported = (found[FLAGGED] | (found[SCORE] > 0)).reshape(-1)
        return found, {}, reported if reported.shape == (samples,) else np.zeros(samples, np.bool_)

    def _flags(self, inner: Mapping[str, Array], samples: int) -> NDArray[np.bool_]:
        """Which samples have a flag at any site, `[samples]`."""
        flags = [np.any(inner[site.margin].reshape(samples, -1) > 0, axis=1) for site in self.record.sites]
        return np.asarray(np.any(flags, axis=0)) if flags else np.zeros(samples, np.bool_)

    def same(
        self,
        batch: Mapping[str, Array],
        expected: Mapping[str, Array],
        found: Mapping[str, Array],
        flagged: NDArray[np.bool_],
    ) -> NDArray[np.bool_]:
        """Which samples without a flag have the base's bits, `[samples]`; those with one count as the same.

        Some bases mix samples: dynamic quantization takes its scale from the whole batch. Outputs that change in the
        base as well when another sample stands in for the flagged ones are compared in that batch.
        """
        same = {name: _rows_equal(array, found.get(name), flagged) | flagged for name, array in expected.items()}
        if flagged.any() and not all(rows.all() for rows in same.values()):
            calm = {name: without_flagged(array, flagged) for name, array in batch.items()}
            alone, (patched, _, also) = self.base.run(calm), self.run(calm)
            ignored = flagged | also
            for name, array in expected.items():
                if not (_rows_equal(array, alone[name], flagged) | flagged).all():
                    same[name] = _rows_equal(alone[name], patched.get(name), ignored) | ignored
        return np.asarray(np.all(list(same.values()), axis=0))


class _Tally:
    """What the batches of one side add up to."""

    def __init__(self, look: _Look) -> None:
        self.look = look
        self.inputs = self.flagged = self.differing = self.misreported = self.undriven = 0
        self.monitored = False
        self.uncarried: set[str] = set()
        self.edited: dict[str, str] = {}
        self.faults: dict[str, str] = {one.site: "" for one in look.replaced}
        self.scores: dict[str, float] = dict.fromkeys(look.detectors, 0.0)

    def add(self, batch: Mapping[str, Array], count: int, expected: Mapping[str, Array]) -> None:
        """Compare base and patched model on a batch, of which the first `count` samples are counted.

        Args:
            batch: Inputs.
            count: Of samples that were asked for; those behind them fill up a fixed batch.
            expected: The base's outputs.
        """
        look = self.look
        found, inner, whole = look.run(batch)
        self.inputs += count
        self.flagged += int(whole[:count].sum())
        self.differing += int((~look.same(batch, expected, found, whole))[:count].sum())
        if FLAGGED in found and SCORE in found:
            self.monitored = True
            reported = [array.reshape(-1) for array in (found[FLAGGED], found[SCORE] > 0)]
            wrong = [array != whole if array.shape == whole.shape else np.ones_like(whole) for array in reported]
            self.misreported += int((wrong[0] | wrong[1])[:count].sum())
        if look.within:
            self._add_inner(batch, found, inner, bool(whole.any()))

    def _add_inner(
        self, batch: Mapping[str, Array], found: Mapping[str, Array], inner: Mapping[str, Array], flagged: bool
    ) -> None:
        """Compare what stands within; `flagged`: whether any sample is."""
        look = self.look
        for layer in look.record.layers:
            self._add_layer(layer, inner)
        for one in look.replaced:
            if not one.holds(inner[one.value], inner[one.result], inner[look.margins[one.site]]):
                self.faults[one.site] = (
                    f"{one.base_name} is not neutral where it is flagged, or not the base's elsewhere"
                )
        self._add_margins(inner)
        if look.driven is not None and flagged:
            given = look.driven.run(batch, inner)
            unlike = [name for name, array in given.items() if not same_bits(array, found.get(name))]
            self.undriven += bool(unlike)

    def _add_margins(self, inner: Mapping[str, Array]) -> None:
        """Each site's own margins against numpy, and whether it goes on with the largest so far of its token axis."""
        largest: dict[str, Array] = {}
        for patched, site in self.look.sites:
            if patched.own is not None:
                own = inner[patched.own]
                keys, maps = inner[self.look.read(patched)], len(own) if own.ndim else 0
                expected, allowed = margins(self.look.detectors[patched.site], keys, site.key, maps)
                found = (
                    own.astype(np.float64).reshape(expected.shape)
                    if own.size == expected.size
                    else np.full_like(expected, np.nan)
                )
                difference = np.abs(found - expected)
                with np.errstate(divide="ignore", invalid="ignore"):  # of zeros, where keys and threshold are zero
                    shares = np.where(difference == 0, 0, difference / allowed)
                worst = np.inf if np.isnan(shares).any() else float(shares.max(initial=0.0))
                self.scores[patched.site] = max(self.scores[patched.site], worst)
                largest[site.token_axis] = np.maximum(largest.get(site.token_axis, own), own)
            if not same_bits(largest.get(site.token_axis), inner[patched.margin]):
                self.uncarried.add(patched.site)

    def _add_layer(self, layer: PatchedLayer, inner: Mapping[str, Array]) -> None:
        """Edited units against numpy, the others bit for bit; a fault stays until the verdict."""
        edit, before, after = self.look.edits[layer.layer], inner[layer.value], inner[layer.edited_value]
        others = np.setdiff1d(np.arange(before.shape[-1]), edit.units)
        reference = before[..., edit.units].astype(np.float64) * edit.factor + edit.constant
        worst = float(np.abs(after[..., edit.units] - reference).max(initial=0.0))
        allowed = EDITED[_dtype(after)] * max(1.0, float(np.abs(reference).max(initial=0.0)))
        if not worst <= allowed:  # nor a NaN
            self.edited[layer.layer] = f"edited units differ from the numpy reference by {worst:.2e}"
        elif before[..., others].tobytes() != after[..., others].tobytes():
            self.edited[layer.layer] = "units that are not edited differ"
        else:
            self.edited.setdefault(layer.layer, "")

    def checks(self, where: str) -> Iterator[Check]:
        """The verdicts."""
        unflagged = self.inputs - self.flagged
        base = "the base with the neuron edits" if self.look.record.layers else "the base"
        yield Check(
            f"unflagged {where}",
            self.differing == 0,
            f"{unflagged - self.differing} of {unflagged} bit-identical to {base}",
        )
        if self.monitored:
            yield Check(
                f"monitoring, {where}",
                self.misreported == 0,
                f"{self.inputs - self.misreported} of {self.inputs} reported as their tokens are flagged",
            )
        if not self.look.within:
            return
        for layer, fault in self.edited.items():
            said = fault or "edited units agree with the numpy reference, the others bit for bit with the base"
            yield Check(f"hidden layer {layer}, {where}", not fault, said)
        for site, worst in self.scores.items():
            said = f"scores agree with the numpy reference, {worst:.1e} of what rounding is allowed"
            yield Check(f"scores at {site}, {where}", worst <= 1, said)
        carried = "not " if self.uncarried else ""
        said = f"margins are {carried}the largest of the site's own and those of earlier sites of its token axis"
        yield Check(f"carried, {where}", not self.uncarried, said + "".join(f"; {site}" for site in self.uncarried))
        for site, fault in self.faults.items():
            said = fault or "flagged tokens are neutral, all others the base's bit for bit"
            yield Check(f"site {site}, {where}", not fault, said)
        if self.look.driven is not None and self.flagged:
            said = "are" if not self.undriven else "are not"
            yield Check(
                f"driven, {where}",
                not self.undriven,
                f"outputs {said} those of the base that is given these keys and values, bit for bit",
            )


def _rows_equal(expected: Array, found: Array | None, flagged: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Which samples are equal bit for bit; outputs without a sample axis count where nothing is flagged."""
    if not same_shapes(expected, found):
        return np.zeros(len(flagged), np.bool_)
    if not by_sample(expected, len(flagged)):
        return np.full(len(flagged), bool(flagged.any()) or same_bits(expected, found))
    return same_samples(expected, np.asarray(found))


def _dtype(array: Array) -> str:
    return "FLOAT16" if array.dtype == np.float16 else "FLOAT"
