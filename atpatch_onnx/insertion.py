"""Adds nodes to a graph: every node, value and weight that this package brings is named and marked here."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.domain import DOMAIN
from atpatch_onnx.graph import PREFIX

SITE_KEY = "atpatch.site"
"""Metadata of every node that this package adds: the site it belongs to."""


class Insertion:
    """Adds nodes behind an anchor, in call order; every node, value and weight is named `atpatch/<scope>/...`."""

    def __init__(self, graph: ir.Graph, scope: str, *, anchor: ir.Node | None = None) -> None:
        """Add to `graph`, after `anchor`, or at its end where there is none."""
        self.graph = graph
        self._anchor = anchor
        self.scope = scope

    def constant(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        """A weight of the graph, of the array's shape and type."""
        name = f"{PREFIX}{self.scope}/{name}"
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
        node.name = f"{PREFIX}{self.scope}/{name}"
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
