"""The base, driven through the second pass of a joint decision: what proves that this pass is the base.

Given the corrected outputs of all redistributing sites as inputs, the base computes every such site's own output and
the model's outputs from them. A patched file whose second pass is the base's, node for node and weight for weight, has
computed the same.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.emission import find_value
from atpatch_onnx.matching import find_sites
from atpatch_onnx.metadata import PatchRecord
from atpatch_onnx.runtime import Array, Session
from atpatch_onnx.second_pass import first_name


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


class Driven:
    """A session of the base in which the outputs of the redistributing sites are inputs.

    Args:
        base: The base, with the neuron edits that are in the patched model.
        record: What the patched model says of itself.
        optimize: As of `Session`.

    Raises:
        BakeError: The base does not have the sites that the file names.
        RunError: onnxruntime refuses the model.
    """

    def __init__(self, base: ir.Model, record: PatchRecord, *, optimize: bool) -> None:
        assert record.joint is not None, "only a joint decision has a second pass"
        self._outputs = record.joint.outputs
        redistributing = [site for site in record.sites if site.value is not None]
        self._stages = [
            _Stage(first_name(site.output), f"{graphs.PREFIX}driven/{number}", site.base_output, site.output)
            for number, site in enumerate(redistributing)
        ]
        self._session = Session(_driven(base, self._stages), optimize=optimize)

    def largest_difference(
        self, inputs: Mapping[str, Array], rows: Array, found: Mapping[str, Array], inner: Mapping[str, Array]
    ) -> float:
        """By how much the second pass differs from the base, relative to the largest value of what is compared.

        Args:
            inputs: Of the model, by name.
            rows: Which samples are flagged, bool `[samples]`: the outputs of the others are the first pass's.
            found: The patched model's outputs.
            inner: The values of its second pass.
        """
        fed = {stage.fed: inner[stage.after] for stage in self._stages}
        expected = self._session.run({**inputs, **fed}, [*(stage.own for stage in self._stages), *self._outputs])
        pairs = [(expected[stage.own], inner[stage.before]) for stage in self._stages]
        for name in self._outputs:
            one, other = expected[name], found[name]
            by_sample = one.ndim > 0 and other.shape == one.shape and len(one) == len(rows)
            pairs.append((one[rows], other[rows]) if by_sample else (one, other))
        return max((_difference(one, other) for one, other in pairs), default=0.0)


def _driven(base: ir.Model, stages: Sequence[_Stage]) -> ir.Model:
    driven = graphs.copy(base)
    types = {site.output: ir.TensorType(ir.DataType[site.dtype]) for site in find_sites(base)}
    for stage in stages:
        own = find_value(driven.graph, stage.own)
        fed = ir.Value(name=stage.fed, shape=own.shape, type=types.get(stage.own, own.type))
        ir.convenience.replace_all_uses_with(own, fed, replace_graph_outputs=True)
        driven.graph.inputs.append(fed)
        driven.graph.outputs.append(own)
    return driven


def _difference(expected: Array, found: Array) -> float:
    """Relative to the largest expected value, at least 1; infinite where anything is not comparable."""
    if expected.shape != found.shape:
        return float(np.inf)
    if not expected.size:
        return 0.0
    one, other = (np.asarray(array, np.float64) for array in (expected, found))
    worst = float(np.abs(one - other).max())
    return worst / max(1.0, float(np.abs(one).max())) if np.isfinite(worst) else float(np.inf)
