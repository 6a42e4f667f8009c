"""Outputs that say what was flagged: of every sample, and of every token at a site."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from atpatch_onnx.baking.read import of_samples, per_sample
from atpatch_onnx.baking.write import Written
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.graph.names import FLAGGED, MONITOR, SCORE, flags_name
from atpatch_onnx.graph.values import find_value


def add_monitors(model: ir.Model, written: Sequence[Written]) -> list[str]:
    """The outputs `atpatch/flagged` and `atpatch/score` over all sites; their names.

    Margins are carried along a token axis: the last site of an axis has the largest of each token.
    """
    at = Insertion(model.graph, MONITOR)
    scores = []
    for step in {step.site.token_axis: step for step in written}.values():
        margin = per_sample(at, step.site, step.margin, 1, f"{step.site.name}/margins")
        score = at.reduce("ReduceMax", margin, [1], name=f"{step.site.name}/score")
        scores.append(of_samples(at, step.site, score, f"{step.site.name}/scores"))
    score = at.op("Max", *scores, name="largest") if len(scores) > 1 else scores[0]
    flagged = at.op("Greater", score, at.constant("zero", np.zeros(1, np.float32)), name="flagged")
    return [
        _add_output(model, written, flagged, FLAGGED, ir.DataType.BOOL, 1),
        _add_output(model, written, score, SCORE, ir.DataType.FLOAT, 1),
    ]


def add_site_flags(model: ir.Model, written: Sequence[Written]) -> list[str]:
    """An output `atpatch/<site>/flags` for every site; their names."""
    names = []
    for step in written:
        at = Insertion(model.graph, MONITOR)
        margin = per_sample(at, step.site, step.margin, 1, f"{step.site.name}/margins_of_samples")
        last = at.constant("last", np.array([2], np.int64))
        margin = at.op("Squeeze", margin, last, name=f"{step.site.name}/margin")
        zero = at.constant("zero", np.zeros(1, np.float32))
        flags = at.op("Greater", margin, zero, name=f"{step.site.name}/flags")
        flags = of_samples(at, step.site, flags, f"{step.site.name}/flags_of_samples")
        names.append(_add_output(model, written, flags, flags_name(step.site.name), ir.DataType.BOOL, None))
    return names


def _add_output(
    model: ir.Model, written: Sequence[Written], value: ir.Value, name: str, dtype: ir.DataType, width: int | None
) -> str:
    """An output of this name `[batch, width]`, behind all others."""
    value.name = name
    value.shape, value.dtype = ir.Shape([_batch(model, written), width]), dtype
    model.graph.outputs.append(value)
    return name


def _batch(model: ir.Model, written: Sequence[Written]) -> int | ir.SymbolicDim | None:
    """How many samples there are, in the model's own words."""
    counted = written[0].site.samples
    if counted is None:
        return 1
    name, axis = counted
    shape = find_value(model.graph, name).shape
    return None if shape is None else shape[axis]
