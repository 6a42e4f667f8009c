"""Fingerprints: digests of a model's content, wherever its weights are stored."""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import cast

import onnx
import onnx_ir as ir

from atpatch_onnx.graph import protos
from atpatch_onnx.graph.digests import BLOCK, tensor_digest
from atpatch_onnx.graph.external import external_folder, of_proto, take_in
from atpatch_onnx.graph.kept_types import kept

IN_ONE = 2**30
"""Bytes of weights up to which each is digested in one piece; above that in blocks, several at a time."""

_SOURCE_LINES = "pkg.torch.onnx.stack_trace"
"""Node metadata in which torch's exporter notes the source lines behind a node, with the paths of the machine."""

_QUANTIZATION = "quant_parameter_tensor_names"
"""Where onnx-ir keeps a value's quantization annotation."""


def fingerprint(model: ir.Model) -> str:
    """A digest of the model's content: every node, attribute, value, weight and metadata entry, in order.

    Two models have the same fingerprint exactly when they are equal node for node and weight for weight, wherever their
    weights are stored; every byte counts. Up to 1 GiB of weights the fingerprint is `sha256:...`; above that large
    weights are digested in blocks (`sha256-blocks:...`), about a second for each GiB, or as fast as the disk is.

    One metadata entry does not count: the source lines that torch's exporter notes at each node
    (`pkg.torch.onnx.stack_trace`). They hold the paths of installed packages, in which alone two machines' exports of
    one model differ.
    """
    in_blocks = sum(tensor.nbytes for _, tensor in _weights(model)) > IN_ONE
    folder = external_folder(model)
    digest = hashlib.sha256()

    def add(*parts: str | bytes) -> None:
        for part in parts:
            data = part.encode() if isinstance(part, str) else part
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)

    def add_nodes(nodes: Iterable[onnx.NodeProto]) -> None:
        _drop_source_lines(nodes)
        for tensor in protos.attribute_tensors(nodes):
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                source = of_proto(tensor, cast(Path, folder))
                take_in(tensor, source.tobytes() if source.nbytes < BLOCK else tensor_digest(source, True))

    add(str(model.ir_version), repr(sorted(model.opset_imports.items())), repr(sorted(model.metadata_props.items())))
    add(str(model.producer_name), str(model.producer_version), str(model.domain), str(model.model_version))
    for identifier, function in sorted(model.functions.items()):
        function_proto = ir.to_proto(function)
        add_nodes(function_proto.node)
        add(repr(identifier), function_proto.SerializeToString(deterministic=True))
    if model.device_configurations:
        add(repr(model.device_configurations))
    graph = model.graph
    add(str(graph.name), repr(sorted(graph.metadata_props.items())))
    for group in (graph.inputs, graph.outputs, graph.initializers.values()):
        add("group")
        for value in group:
            add(*_value_parts(value))
    for node in graph:
        proto = ir.to_proto(node)
        add_nodes([proto])
        add(proto.SerializeToString(deterministic=True))
        for value in node.outputs:
            add(*_value_parts(value))
    for name, tensor in _weights(model):
        add(name, str(tensor.dtype), repr(tuple(tensor.shape)), tensor_digest(tensor, in_blocks))
        if tensor.metadata_props:
            add(repr(sorted(tensor.metadata_props.items())))
    return f"sha256{'-blocks' if in_blocks else ''}:{digest.hexdigest()}"


def _weights(model: ir.Model) -> Iterator[tuple[str, ir.TensorProtocol]]:
    """The initializers of every graph, each by itself: two branches may have one of the same name.

    Names are those that a file would have: a tensor in memory may have another than its value.
    """
    for graph in model.graphs():
        for name, value in graph.initializers.items():
            if value.const_value is not None:
                yield name, value.const_value


def _drop_source_lines(nodes: Iterable[onnx.NodeProto]) -> None:
    """Remove the entry `pkg.torch.onnx.stack_trace` from nodes and the nodes of their subgraphs, in place."""
    for node in nodes:
        kept = [entry for entry in node.metadata_props if entry.key != _SOURCE_LINES]
        if len(kept) < len(node.metadata_props):
            del node.metadata_props[:]
            node.metadata_props.extend(kept)
        for attribute in node.attribute:
            for subgraph in (attribute.g, *attribute.graphs):
                _drop_source_lines(subgraph.node)


def _value_parts(value: ir.Value) -> Iterator[bytes | str]:
    """What is said of a value: its type, shape and metadata, and what it is quantized by."""
    yield bytes(ir.serde.serialize_value(value).SerializeToString(deterministic=True))
    yield from kept(value)
    annotation = value.meta.get(_QUANTIZATION)
    if annotation:
        yield repr(sorted(annotation.items()))
