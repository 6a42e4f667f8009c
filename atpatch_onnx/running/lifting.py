"""Lift an old model to what a patch needs: by onnx's own version converter, and only where every bit stays.

    the graph without its weights  ->  converted  ->  the weights back in  ->  both run on drawn inputs

A file before IR version 4 lists its weights among the inputs, and no runtime takes others for them: they leave it.
"""

import numpy as np
import onnx
import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.errors import RunError
from atpatch_onnx.graph.names import MIN_OPSET
from atpatch_onnx.graph.parts import LIFTED_IR, opset_version
from atpatch_onnx.running.bits import same_bits
from atpatch_onnx.running.drawing import draw_inputs
from atpatch_onnx.running.sessions import Session

LENGTHS = (16, 8, 4, 32, 64, 224)
"""Sizes that free axes are tried with, one after the other, until the model runs."""


def lifted(model: ir.Model) -> ir.Model:
    """The model at `MIN_OPSET` and an IR version that goes with it; itself where that is not exact, or not known to be.

    Exact: on inputs that are drawn, onnxruntime computes the same bits of both, optimized or not.
    """
    found = _converted(model)
    return found if found is not None and _same(model, found) else model


def _converted(model: ir.Model) -> ir.Model | None:
    """By onnx's version converter, weights of any size left where they are; None where it cannot."""
    proto = graphs.skeleton(model)
    try:
        if opset_version(model) < MIN_OPSET:
            proto = onnx.version_converter.convert_version(proto, MIN_OPSET)
        found = ir.from_proto(proto)
    except Exception:  # of its C++ side, in many types
        return None
    listed = {value.name for value in model.graph.inputs} if model.ir_version >= LIFTED_IR else set[str | None]()
    weights = model.graph.initializers
    inputs = {value.name: value for value in found.graph.inputs}
    kept = [value for value in found.graph.inputs if value.name not in weights or value.name in listed]
    found.graph.inputs.clear()
    found.graph.inputs.extend(kept)
    for name, weight in weights.items():
        value = inputs.get(name) or found.graph.initializers.get(name)
        if value is not None and weight.const_value is not None:
            value.const_value = weight.const_value
            found.graph.register_initializer(value)
    found.ir_version = max(model.ir_version, _IR_VERSION)
    found.producer_name, found.producer_version, found.domain = (
        model.producer_name,
        model.producer_version,
        model.domain,
    )
    found.model_version, found.doc_string = model.model_version, model.doc_string
    found.metadata_props.update(model.metadata_props)
    return graphs.with_custom_ops(found, graphs.custom_ops(model))


_IR_VERSION = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", MIN_OPSET)])


def _same(model: ir.Model, other: ir.Model) -> bool:
    """Whether both compute the same bits, at both levels of optimization."""
    for length in LENGTHS:
        try:
            feed = draw_inputs(model, np.random.default_rng(0), length=length)
            sides = [[Session(one, optimize=level).run(feed) for level in (False, True)] for one in (model, other)]
        except RunError:
            continue
        return all(
            before.keys() == after.keys() and all(same_bits(before[name], after[name]) for name in before)
            for before, after in zip(*sides, strict=True)
        )
    return False
