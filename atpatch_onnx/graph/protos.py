"""Walks over the tensors of a file as protobuf holds them, before onnx-ir has seen it."""

import math
from collections.abc import Iterable, Iterator

import onnx
import onnx_ir as ir

TYPED = ("float_data", "int32_data", "string_data", "int64_data", "double_data", "uint64_data")
"""The fields of a tensor that hold elements one by one."""


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor of a file: weights and attributes, in subgraphs and functions too."""
    yield from _graph_tensors(model.graph)
    for function in model.functions:
        yield from (attribute.t for attribute in function.attribute_proto if attribute.HasField("t"))
        yield from (tensor for attribute in function.attribute_proto for tensor in attribute.tensors)
        yield from attribute_tensors(function.node)


def attribute_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    """Every tensor in the attributes of nodes, those in the nodes of their subgraphs included."""
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            yield from attribute.tensors
            if attribute.HasField("g"):
                yield from _graph_tensors(attribute.g)
            for subgraph in attribute.graphs:
                yield from _graph_tensors(subgraph)


def _graph_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    yield from attribute_tensors(graph.node)


def holds_content(tensor: onnx.TensorProto) -> bool:
    """Whether the elements are in the file itself: some files leave weights out, as others put them beside it."""
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        return False
    return tensor.HasField("raw_data") or 0 in tensor.dims or any(len(getattr(tensor, field)) for field in TYPED)


def tensor_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes a tensor's elements take; types of less than a byte are packed."""
    return (math.prod(map(int, tensor.dims)) * ir.DataType(tensor.data_type).bitwidth + 7) // 8
