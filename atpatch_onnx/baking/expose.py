"""Inner values of a patched model as further outputs."""

from collections.abc import Iterable

import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.graph.values import find_value


def expose(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A copy of `model` with the values of these names as further outputs, in this order.

    Raises:
        BakeError: There is no value of a name.
    """
    exposed = graphs.copy(model)
    present = {output.name for output in exposed.graph.outputs}
    for name in dict.fromkeys(names):
        if name not in present:
            exposed.graph.outputs.append(find_value(exposed.graph, name))
    return exposed
