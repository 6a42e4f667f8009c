"""The base, driven through the second pass of a joint decision: what proves that this pass is the base.

Given the corrected outputs of all redistributing sites as inputs, the base computes every such site's own output and
the model's outputs from them. A patched file whose second pass is the base's, node for node and weight for weight, has
computed the same. In float32, that is: half precision is rounded in between wherever somebody looks at a value.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np
import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.metadata import PatchRecord
from atpatch_onnx.errors import UnbakeError
from atpatch_onnx.graph.names import PREFIX, first_name
from atpatch_onnx.graph.values import find_value
from atpatch_onnx.matching import find_sites
from atpatch_onnx.running.sessions import Array, Session, tensors

SECOND_PASS = 1e-4
"""Largest difference of the second pass to the base, relative to the largest value of an output (at least 1): kernels
may be fused otherwise from one site on to the next."""


@dataclass(frozen=True)
class _Stage:
    """One redistributing site."""

    own: str
    """Its output in the base."""

    fed: str
    """The input that stands in for it."""

    before: str
    after: str
    """In the patched model's second pass: its output as it was and as corrected."""


def driven(base: ir.Model, record: PatchRecord, *, optimize: bool) -> "Driven | None":
    """Such a session, as of `Driven`; None where there is no second pass, or one in half precision."""
    if record.joint is None:
        return None
    named = {first_name(site.output) for site in record.sites if site.value is not None}
    halves = any(site.dtype != ir.DataType.FLOAT.name for site in find_sites(base) if site.output in named)
    return None if halves else Driven(base, record, optimize=optimize)


class Driven:
    """A session of the base in which the outputs of the redistributing sites are inputs.

    Args:
        base: The base, with the neuron edits that are in the patched model.
        record: What the patched model says of itself.
        optimize: As of `Session`.

    Raises:
        BakeError: The base does not have the sites that the file names.
        UnbakeError: It does not have the outputs that the file names.
        RunError: onnxruntime refuses the model.
    """

    def __init__(self, base: ir.Model, record: PatchRecord, *, optimize: bool) -> None:
        assert record.joint is not None, "only a joint decision has a second pass"
        self._outputs, own = record.joint.outputs, {output.name for output in base.graph.outputs}
        if not own.issuperset(self._outputs):
            raise UnbakeError(
                "the metadata entry atpatch.joint",
                expected=f"outputs of the base ({', '.join(sorted(name or '' for name in own))})",
                found=", ".join(self._outputs),
                advice="The file was edited after it was baked: bake the patch into the base again.",
            )
        redistributing = [site for site in record.sites if site.value is not None]
        self._stages = [
            _Stage(first_name(site.output), f"{PREFIX}driven/{number}", site.base_output, site.output)
            for number, site in enumerate(redistributing)
        ]
        self._session = Session(_driven(base, self._stages), optimize=optimize)

    def largest_difference(
        self, inputs: Mapping[str, Array], rows: Array, found: Mapping[str, Array], inner: Mapping[str, Array]
    ) -> float:
        """By how much the second pass differs from the base, in units of `SECOND_PASS`: up to 1 is the same.

        Args:
            inputs: Of the model, by name.
            rows: Which samples are flagged, bool `[samples]`: the outputs of the others are the first pass's.
            found: The patched model's outputs.
            inner: The values of its second pass.
        """
        fed = {stage.fed: inner[stage.after] for stage in self._stages}
        owned = {stage.own: inner[stage.after] for stage in self._stages}  # a site's output may be one of the model
        expected = self._session.run(
            {**inputs, **fed}, [*owned, *(name for name in self._outputs if name not in owned)]
        )
        pairs: list[_Pair] = [(expected[stage.own], inner[stage.before]) for stage in self._stages]
        for name in self._outputs:
            one, other = owned.get(name, expected[name]), found[name]
            pairs += _pairs(one, other, rows)
        return max((_difference(one, other) for one, other in pairs), default=0.0)


def _driven(base: ir.Model, stages: Sequence[_Stage]) -> ir.Model:
    driven = graphs.copy(base)
    for stage in stages:
        own = find_value(driven.graph, stage.own)
        fed = ir.Value(name=stage.fed, shape=own.shape, type=ir.TensorType(ir.DataType.FLOAT))
        ir.convenience.replace_all_uses_with(own, fed, replace_graph_outputs=True)
        driven.graph.inputs.append(fed)
        driven.graph.outputs.append(own)
    return driven


_Pair = tuple[Array | None, Array | None]
"""What is to be the same; None where one output holds fewer tensors."""


def _pairs(one: Array, other: Array, rows: Array) -> list[_Pair]:
    """Of two outputs the samples that are flagged, where they have an axis for samples; else all that they hold."""
    if isinstance(one, np.ndarray) and one.ndim > 0 and np.shape(other) == one.shape and len(one) == len(rows):
        return [(one[rows], other[rows])]
    return [*zip_longest(tensors(one), tensors(other))]


def _difference(expected: Array | None, found: Array | None) -> float:
    """In units of what is allowed; infinite where anything is not comparable."""
    if expected is None or found is None:
        return float(np.inf)
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float(np.inf)
    if expected.dtype.kind not in "fiub":  # texts
        return 0.0 if np.array_equal(expected, found) else float(np.inf)
    one, other = (np.asarray(array, np.float64) for array in (expected, found))
    finite = np.isfinite(one)
    if not np.array_equal(one[~finite], other[~finite], equal_nan=True) or not np.isfinite(other[finite]).all():
        return float(np.inf)
    worst, largest = (
        float(np.abs(array[finite]).max(initial=0.0)) for array in (one - np.where(finite, other, 0), one)
    )
    return worst / (SECOND_PASS * max(1.0, largest))
