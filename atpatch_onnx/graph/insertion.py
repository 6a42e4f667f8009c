"""Adds nodes to a graph: every node, value and weight that this package brings is named and marked here."""

from collections.abc import Collection, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.errors import BakeError
from atpatch_onnx.graph.names import REPLACES_KEY, SITE_KEY, own_name


class Insertion:
    """Adds nodes behind an anchor, in call order; every node, value and weight is named `atpatch/<scope>/...`."""

    def __init__(self, graph: ir.Graph, scope: str, *, anchor: ir.Node | None = None, first: bool = False) -> None:
        """Add to `graph`: after `anchor`; where there is none, at its beginning or its end."""
        self.graph = graph
        self._anchor = anchor
        self._first = first
        self.scope = scope

    @property
    def end(self) -> ir.Node | None:
        """The node that was added last; the anchor where none was."""
        return self._anchor

    def constant(self, name: str, array: NDArray[np.generic], dtype: ir.DataType | None = None) -> ir.Value:
        """A weight of the graph, of the array's shape; of its type, or converted to `dtype`.

        Raises:
            BakeError: A number in it is not finite, or too large for the type.
        """
        name = own_name(self.scope, name)
        if name not in self.graph.initializers:
            with np.errstate(over="ignore"):
                array = np.asarray(array, None if dtype is None else dtype.numpy(), order="C")
            if not np.issubdtype(array.dtype, np.integer) and not np.isfinite(array).all():
                raise BakeError(
                    f"the weight {name}",
                    expected=f"finite numbers of {array.dtype}",
                    found="NaN, an infinity, or a number too large for this type",
                    advice="Fit the patch again: nobody can say what it would do.",
                )
            tensor = ir.Tensor(array, dtype=dtype, name=name)
            value = ir.Value(name=name, shape=ir.Shape(array.shape), const_value=tensor)
            value.dtype = tensor.dtype
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def op(
        self,
        op_type: str,
        *inputs: ir.Value,
        name: str,
        attributes: Sequence[ir.Attr] = (),
        shape: Sequence[int | str | None] = (),
        dtype: ir.DataType | None = None,
        domain: str = "",
    ) -> ir.Value:
        """Add an operator; the result is named `atpatch/<scope>/<name>`, its shape and type declared if given."""
        node = ir.Node(domain, op_type, inputs, attributes, name=own_name(self.scope, name))
        node.metadata_props[SITE_KEY] = self.scope
        result = node.outputs[0]
        result.name = node.name
        if shape:
            result.shape = ir.Shape(shape)
        if dtype is not None:
            result.dtype = dtype
        self._place(node)
        return result

    def reduce(self, op_type: str, value: ir.Value, axes: Sequence[int], *, name: str) -> ir.Value:
        """Add a reduction over these axes, which go; it takes them as an input from opset 18 on."""
        keep, opset = ir.AttrInt64("keepdims", 0), self.graph.opset_imports.get("", 0)
        if opset < 18:
            return self.op(op_type, value, name=name, attributes=[ir.AttrInt64s("axes", axes), keep])
        along = self.constant(f"{name}/axes", np.array(axes, np.int64))
        return self.op(op_type, value, along, name=name, attributes=[keep])

    def _place(self, node: ir.Node) -> None:
        if self._anchor is not None:
            self.graph.insert_after(self._anchor, node)
        elif self._first and len(self.graph):
            self.graph.insert_before(self.graph[0], node)
        else:
            self.graph.append(node)
        self._anchor = node


def hand_over(value: ir.Value, result: ir.Value, readers: Collection[ir.Node] | None = None) -> None:
    """Let the base's nodes read `result`, computed by one of our nodes, in place of `value`; the node remembers that.

    Where `value` is an output of the model, `result` becomes this output and takes its name.

    Args:
        value: Computed by the base; our own nodes go on reading it.
        result: Of the same shape and type.
        readers: The only nodes that read `result`; None: all that read `value`.
    """
    node = result.producer()
    assert node is not None, "it is computed by a node of the patch"
    node.metadata_props[REPLACES_KEY] = str(value.name)
    for reader, index in list(value.uses()):
        if SITE_KEY not in reader.metadata_props and (readers is None or reader in readers):
            reader.replace_input_with(index, result)
    graph = node.graph
    if readers is not None or graph is None or not value.is_graph_output():
        return
    for index, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[index] = result
    value.name, result.name = result.name, value.name


def hand_back(node: ir.Node) -> None:
    """Undo `hand_over`: the base's nodes and outputs have their own value again.

    Raises:
        ValueError: The value is not there.
    """
    name, result, graph = node.metadata_props[REPLACES_KEY], node.outputs[0], node.graph
    assert graph is not None, "it is a node of a graph"
    value = replaced_value(node)
    if value is None:
        raise ValueError(f"{name!r}, which {node.name!r} stands in for, is not among its inputs")
    for reader, index in list(result.uses()):
        if SITE_KEY not in reader.metadata_props:
            reader.replace_input_with(index, value)
    for index, output in enumerate(graph.outputs):
        if output is result:
            graph.outputs[index] = value
    if value.name != name:
        value.name, result.name = name, own_name(node.metadata_props[SITE_KEY], "replaced")


def replaced_value(node: ir.Node) -> ir.Value | None:
    """The base's value that the result of a node of the patch stands in for."""
    name, result = node.metadata_props.get(REPLACES_KEY), node.outputs[0]
    wanted = node.name if result.name == name else name  # names are exchanged where it is an output of the model
    inner = [value for attribute in node.attributes.values() for value in _captured(attribute)]
    read = (*node.inputs, *inner, _before_quantization(node))
    return next((value for value in read if value is not None and value.name == wanted), None)


def _before_quantization(node: ir.Node) -> ir.Value | None:
    """What is dequantized, chosen from by a Where, and quantized again by a node of the patch."""
    for op_type, index in (("QuantizeLinear", 0), ("Where", 2), ("DequantizeLinear", 0)):
        if node.op_type != op_type or SITE_KEY not in node.metadata_props:
            return None
        value = node.inputs[index]
        following = None if value is None else value.producer()
        if op_type == "DequantizeLinear" or following is None:
            return value
        node = following
    return None


def _captured(attribute: ir.Attr) -> list[ir.Value]:
    """The values that the branch in an attribute reads."""
    if attribute.type is not ir.AttributeType.GRAPH:
        return []
    return [value for node in attribute.as_graph() for value in node.inputs if value is not None]
