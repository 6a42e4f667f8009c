"""A graph in plain operators: onnxruntime's quantized ones as DequantizeLinear, the operator of floats, QuantizeLinear.

    QLinearMatMul(a, b) -> y    is read as    MatMul(DequantizeLinear(a), DequantizeLinear(b)), QuantizeLinear -> y
    BiasSoftmax(x, bias) -> y                 Softmax(Add(x, bias)) -> y

So the rules know one form of each. The copy is for reading only: it has all the values of the graph under their names,
and some more, of which `Plain.stands_for` says where they would be in the graph.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from atpatch_onnx import graph as graphs


@dataclass(frozen=True)
class Plain:
    """A model in plain operators."""

    model: ir.Model
    """The model itself where all its operators are."""

    stands_for: Mapping[str, str]
    """Values that the graph does not have: the first output of the node of the graph that computes them inside."""


@dataclass(frozen=True)
class _Quantized:
    """How an operator is read: the operator of floats, and where its operands and its result are quantized."""

    op_type: str
    operands: Sequence[int]
    """Inputs that are quantized; scale and zero point follow each."""

    result: int
    """Input that is the scale of the result, in front of its zero point."""

    plain: Sequence[int] = ()
    """Inputs that come first, as they are."""


def _unary(op_type: str) -> Callable[[ir.Node], _Quantized]:
    return lambda _: _Quantized(op_type, (0,), 3)


def _binary(op_type: str, result: int = 6) -> Callable[[ir.Node], _Quantized]:
    return lambda _: _Quantized(op_type, (0, 3), result)


_READINGS: Mapping[str, Callable[[ir.Node], _Quantized]] = {
    "QLinearMatMul": _binary("MatMul"),
    "QLinearAdd": _binary("Add"),
    "QLinearMul": _binary("Mul"),
    "QLinearConv": _binary("Conv"),  # a bias adds to features only
    "QGemm": _binary("Gemm", 7),
    "QLinearSoftmax": _unary("Softmax"),
    "QLinearSigmoid": _unary("Sigmoid"),
    "QLinearLeakyRelu": _unary("LeakyRelu"),
    "QLinearConcat": lambda node: _Quantized("Concat", range(2, len(node.inputs), 3), 0),
    "QLinearWhere": lambda _: _Quantized("Where", (1, 4), 7, (0,)),
}
"""Inputs as onnxruntime documents them (docs/ContribOperators.md), and onnx QLinearMatMul and QLinearConv."""

_FUSED = "BiasSoftmax"

_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")
"""onnxruntime has its own of these for types that onnx's took later, with the same inputs."""


def in_plain_operators(model: ir.Model) -> Plain:
    """The model, or a copy of it in which no operator is one of these of onnxruntime's own. Weights are shared."""
    if not any(_is_read(node) for node in model.graph.all_nodes()):
        return Plain(model, {})
    copy, names = graphs.copy(model), graphs.all_names(model)
    prefix, stands_for = "plain", dict[str, str]()
    while any(name.startswith(prefix) for name in names):
        prefix += "_"
    for number, node in enumerate([node for node in copy.graph.all_nodes() if _is_read(node)]):
        if node.op_type in _CONVERSIONS:
            node.domain = ""
            continue
        written = _unfused(node) if node.op_type == _FUSED else _written(node, _READINGS[node.op_type](node))
        base, last = str(node.outputs[0].name), written[-1]
        for place, one in enumerate(written[:-1]):
            one.outputs[0].name = f"{prefix}/{number}/{place}"
            stands_for[str(one.outputs[0].name)] = base
        assert node.graph is not None, "it is a node of a graph"
        ir.convenience.replace_nodes_and_values(node.graph, node, [node], written, node.outputs, last.outputs)
    return Plain(copy, stands_for)


def _is_read(node: ir.Node) -> bool:
    if node.op_type in _CONVERSIONS:
        return node.domain == "com.microsoft"
    last = "channels_last" in node.attributes and node.attributes["channels_last"].as_int()
    if node.op_type == _FUSED:
        return node.domain == "com.microsoft"
    return node.op_type in _READINGS and node.domain in ("", "com.microsoft") and not last


def _unfused(node: ir.Node) -> list[ir.Node]:
    """A softmax and the bias that is added to its scores."""
    name = node.name or str(node.outputs[0].name)
    added = ir.Node("", "Add", node.inputs[:2], name=name)
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    return [added, ir.Node("", "Softmax", added.outputs, [ir.AttrInt64("axis", axis)], name=name)]


def _written(node: ir.Node, reading: _Quantized) -> list[ir.Node]:
    """The nodes that a node is read as, all with its label."""
    name = node.name or str(node.outputs[0].name)
    operands = [
        ir.Node("", "DequantizeLinear", node.inputs[index : index + 3], name=name) for index in reading.operands
    ]
    schema = onnx.defs.get_schema(reading.op_type)
    attributes = [attribute for attribute in node.attributes.values() if attribute.name in schema.attributes]
    inputs = [*(node.inputs[index] for index in reading.plain), *(one.outputs[0] for one in operands)]
    written = [*operands, ir.Node("", reading.op_type, inputs, attributes, name=name)]
    scale = node.inputs[reading.result : reading.result + 2]
    if scale and scale[0] is not None:  # QGemm returns floats where it has none
        written.append(ir.Node("", "QuantizeLinear", [written[-1].outputs[0], *scale], name=name))
    return written
