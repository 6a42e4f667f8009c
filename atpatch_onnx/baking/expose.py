"""Inner values of a patched model as further outputs, wherever they lie."""

from collections.abc import Iterable

import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.deferral import recall
from atpatch_onnx.baking.second_pass import unfold
from atpatch_onnx.graph.values import find_value, graph_values


def expose(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A copy of `model` with the values of these names as further outputs, in this order.

    Where they lie inside an `If`, with a deferred map or in the second pass of a joint decision, they are moved out; a
    site's own output is the base's, also where its node holds values back.
    """
    exposed, names = graphs.copy(model), list(dict.fromkeys(names))
    recall(exposed)
    if not {value.name for value in graph_values(exposed.graph)}.issuperset(names):
        unfold(exposed)
    present = {output.name for output in exposed.graph.outputs}
    for name in names:
        if name not in present:
            exposed.graph.outputs.append(find_value(exposed.graph, name))
    return exposed
