"""Adds nodes to a graph: every node, value and weight that this package brings is named and marked here."""

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.graph.names import DOMAIN, SITE_KEY, base_name, own_name


class Insertion:
    """Adds nodes behind an anchor, in call order; every node, value and weight is named `atpatch/<scope>/...`."""

    def __init__(self, graph: ir.Graph, scope: str, *, anchor: ir.Node | None = None) -> None:
        """Add to `graph`, after `anchor`, or at its end where there is none."""
        self.graph = graph
        self._anchor = anchor
        self.scope = scope

    def constant(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        """A weight of the graph, of the array's shape and type."""
        name = own_name(self.scope, name)
        if name not in self.graph.initializers:
            tensor = ir.tensor(np.asarray(array, order="C"), name=name)
            value = ir.Value(name=name, shape=ir.Shape(array.shape), const_value=tensor)
            value.dtype = tensor.dtype
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def call(self, function: str, *inputs: ir.Value, name: str) -> ir.Value:
        """Call one of our functions; the result is named `atpatch/<scope>/<name>`."""
        return self._add(ir.Node(DOMAIN, function, inputs), name)

    def op(self, op_type: str, *inputs: ir.Value, name: str, attributes: Sequence[ir.Attr] = ()) -> ir.Value:
        """Add an ONNX operator; the result is named `atpatch/<scope>/<name>`."""
        return self._add(ir.Node("", op_type, inputs, attributes), name)

    def _add(self, node: ir.Node, name: str) -> ir.Value:
        node.name = own_name(self.scope, name)
        node.metadata_props[SITE_KEY] = self.scope
        node.outputs[0].name = node.name
        self.place(node)
        return node.outputs[0]

    def place(self, node: ir.Node) -> None:
        """Put a node behind what was added last."""
        if self._anchor is None:
            self.graph.append(node)
        else:
            self.graph.insert_after(self._anchor, node)
            self._anchor = node


def take_place(at: Insertion, value: ir.Value, result: ir.Value) -> None:
    """Let `result`, computed by our nodes, take the name and all uses of the base's `value`, which is renamed."""
    name = value.name
    result.shape, result.type = value.shape, value.type
    branches = set(_inside(result.producer()))
    for node, index in list(value.uses()):
        if node not in branches and node.metadata_props.get(SITE_KEY) != at.scope:
            node.replace_input_with(index, result)
    outputs = at.graph.outputs
    for index, output in enumerate(outputs):
        if output is value:
            outputs[index] = result
    value.name = base_name(at.scope)
    result.name = name


def _inside(node: ir.Node | None) -> Iterator[ir.Node]:
    if node is not None:
        for attribute in node.attributes.values():
            if attribute.type is ir.AttributeType.GRAPH:
                yield from attribute.as_graph()
