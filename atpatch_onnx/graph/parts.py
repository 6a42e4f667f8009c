"""What a model is made of: weights, tensors in attributes, names."""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence, Set

import onnx_ir as ir

from atpatch_onnx.errors import BakeError
from atpatch_onnx.graph.names import MIN_OPSET

Model = ir.Model
"""A model in memory, as onnx-ir holds it."""

_NUMBERS = frozenset({"value_float", "value_floats", "value_int", "value_ints"})
"""Attributes of a Constant that hold numbers without a tensor."""


LIFTED_IR = 4
"""The IR version from which on weights need not be inputs."""

_CUSTOM_OPS = "atpatch.custom_ops"


def copy(model: ir.Model) -> ir.Model:
    """An independent copy whose weights are shared, not copied; it needs the same libraries."""
    return with_custom_ops(model.clone(), custom_ops(model))


def custom_ops(model: ir.Model) -> tuple[str, ...]:
    """The libraries that operators of the model come from: given by those who opened it, never by a file."""
    return tuple(model.meta.get(_CUSTOM_OPS, ()))


def with_custom_ops(model: ir.Model, libraries: Iterable[str | os.PathLike[str]]) -> ir.Model:
    """The model itself, from now on with these libraries as well."""
    found = [*custom_ops(model), *(os.fspath(library) for library in libraries)]
    if found:
        model.meta[_CUSTOM_OPS] = tuple(dict.fromkeys(found))
    return model


LIFT_ADVICE = (
    "load lifts old files where that keeps every bit of drawn inputs; where it does not, export the model again, at "
    "opset 17 or later"
)
"""What to do with a model that is too old."""


def opset_version(model: ir.Model) -> int:
    """The version of the ONNX operators that the model imports."""
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 0))


def require_opset(model: ir.Model) -> None:
    """Refuse models whose operators, or whose weights among the inputs, are too old for what we add.

    Raises:
        BakeError: The model imports an opset before `MIN_OPSET`, or is of an IR version before `LIFTED_IR`.
    """
    if opset_version(model) < MIN_OPSET or model.ir_version < LIFTED_IR:
        raise BakeError(
            "the model's opset",
            expected=f"opset {MIN_OPSET} or later, IR version {LIFTED_IR} or later",
            found=f"opset {opset_version(model)}, IR version {model.ir_version}",
            advice=f"Read it with load: {LIFT_ADVICE}.",
        )


# Tensors


def weights(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """The initializers of the main graph and its subgraphs by name."""
    found: dict[str, ir.TensorProtocol] = {}
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                found[name] = value.const_value
    return found


def tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Every tensor of a model: weights and attributes, in subgraphs and functions too."""
    for value in _initializers(model):
        if value.const_value is not None:
            yield value.const_value
    for node in _nodes(model):
        for attribute in node.attributes.values():
            yield from _attribute_tensors(attribute)


def constant(value: ir.Value) -> ir.TensorProtocol | None:
    """The tensor that a weight or a Constant node holds; None for what is computed, and for sparse tensors.

    onnx-ir's `get_const_tensor` names the tensor in a Constant after its value, which would change the model, and
    its fingerprint. So it is asked for numbers only, of which it makes a new tensor.
    """
    node = value.producer()
    if value.const_value is not None or node is None or len(node.attributes) != 1:
        return value.const_value
    if node.op_type != "Constant" or node.domain != "":
        return None
    content = next(iter(node.attributes.values()))
    if content.name == "value":
        return next(iter(_attribute_tensors(content)), None)
    return ir.convenience.get_const_tensor(value) if content.name in _NUMBERS else None


def replace_tensors(model: ir.Model, change: Callable[[ir.TensorProtocol], ir.TensorProtocol]) -> None:
    """Put `change(tensor)` in place of every tensor of the model; it answers the tensor itself to leave it."""
    for value in _initializers(model):
        if value.const_value is not None:
            value.const_value = change(value.const_value)
    for node in _nodes(model):
        for name, attribute in list(node.attributes.items()):
            old = _attribute_tensors(attribute)
            new = [change(tensor) for tensor in old]
            if all(one is other for one, other in zip(old, new, strict=True)):
                continue
            node.attributes[name] = (
                ir.AttrTensor(name, new[0], attribute.doc_string)
                if attribute.type is ir.AttributeType.TENSOR
                else ir.AttrTensors(name, new, attribute.doc_string)
            )


def _initializers(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.initializers.values()
    for function in model.functions.values():
        for subgraph in function.subgraphs():
            yield from subgraph.initializers.values()


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _attribute_tensors(attribute: ir.Attr) -> Sequence[ir.TensorProtocol]:
    if attribute.type is ir.AttributeType.TENSOR:  # its value is taken as it is: `as_tensor` checks a protocol, slowly
        return () if attribute.is_ref() else (attribute.value,)
    if attribute.type is ir.AttributeType.TENSORS and not attribute.is_ref():
        return attribute.as_tensors()
    return ()


# Names


def all_names(model: ir.Model) -> set[str]:
    """Every name in use: of nodes, values and weights, subgraphs included."""
    found = {node.name for node in model.graph.all_nodes()}
    for graph in model.graphs():
        found |= {value.name for value in (*graph.inputs, *graph.initializers.values())}
        found |= {value.name for node in graph for value in node.outputs}
    return {name for name in found if name}


def unique_name(model: ir.Model, wanted: str) -> str:
    """`wanted`, or `wanted_2`, `wanted_3`, ... where a value or node of the main graph has that name already."""
    taken = {value.name for node in model.graph for value in node.outputs} | set(model.graph.initializers)
    taken |= {value.name for value in model.graph.inputs} | {node.name for node in model.graph}
    name, count = wanted, 1
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    return name


def undefined_value(model: ir.Model) -> str | None:
    """The name of a value that is used before any node computes it, if there is one: such a graph cannot be copied."""
    return _undefined(model.graph, frozenset())


def _undefined(graph: ir.Graph, outer: Set[ir.Value]) -> str | None:
    known = {*outer, *graph.inputs, *graph.initializers.values()}
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in known:
                return str(value.name)
        for attribute in node.attributes.values():
            for subgraph in subgraphs(attribute):
                missing = _undefined(subgraph, known)
                if missing is not None:
                    return missing
        known.update(node.outputs)
    return next((str(value.name) for value in graph.outputs if value not in known), None)


def subgraphs(attribute: ir.Attr) -> Iterable[ir.Graph]:
    """The graphs that an attribute holds."""
    if attribute.type is ir.AttributeType.GRAPH:
        return (attribute.as_graph(),)
    return attribute.as_graphs() if attribute.type is ir.AttributeType.GRAPHS else ()
