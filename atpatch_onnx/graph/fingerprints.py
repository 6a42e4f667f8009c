"""Fingerprints: digests of a model's content, wherever its weights are stored."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import cast

import numpy as np
import onnx
import onnx_ir as ir

from atpatch_onnx.graph import protos
from atpatch_onnx.graph.external import external_folder, of_proto, stored, take_in
from atpatch_onnx.graph.parts import weights

FULL_LIMIT = 2**30
"""Bytes of weights up to which a fingerprint covers every byte."""

_SOURCE_LINES = "pkg.torch.onnx.stack_trace"
"""Node metadata in which torch's exporter notes the source lines behind a node, with the paths of the machine."""

_SAMPLE_BLOCKS = 16
_SAMPLE_BYTES = 4096


def fingerprint(model: ir.Model) -> str:
    """A digest of the model's content: every node, attribute, value, weight and metadata entry, in order.

    Two models have the same fingerprint exactly when they are equal node for node and weight for weight, wherever their
    weights are stored. Up to 1 GiB of weights every byte counts (`sha256:...`). Above that only shape, type and 16
    evenly spaced blocks of 4 KiB of each larger weight do, and the fingerprint says so (`sha256-sampled:...`).

    One metadata entry does not count: the source lines that torch's exporter notes at each node
    (`pkg.torch.onnx.stack_trace`). They hold the paths of installed packages, in which alone two machines' exports of
    one model differ.
    """
    sampled = sum(tensor.nbytes for tensor in weights(model).values()) > FULL_LIMIT
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
                take_in(tensor, source.read(_blocks(source.nbytes, sampled)))

    add(str(model.ir_version), repr(sorted(model.opset_imports.items())), repr(sorted(model.metadata_props.items())))
    add(str(model.producer_name), str(model.producer_version), str(model.domain), str(model.model_version))
    for identifier, function in sorted(model.functions.items()):
        function_proto = ir.to_proto(function)
        add_nodes(function_proto.node)
        add(repr(identifier), function_proto.SerializeToString(deterministic=True))
    graph = model.graph
    add(str(graph.name), repr(sorted(graph.metadata_props.items())))
    for group in (graph.inputs, graph.outputs, graph.initializers.values()):
        add("group")
        for value in group:
            add(_value_bytes(value))
    for node in graph:
        proto = ir.to_proto(node)
        add_nodes([proto])
        add(proto.SerializeToString(deterministic=True))
        for value in node.outputs:
            add(_value_bytes(value))
    for name, tensor in weights(model).items():
        add(name, str(tensor.dtype), repr(tuple(tensor.shape)), _tensor_digest(tensor, sampled))
    return f"sha256{'-sampled' if sampled else ''}:{digest.hexdigest()}"


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


def _value_bytes(value: ir.Value) -> bytes:
    return bytes(ir.serde.serialize_value(value).SerializeToString(deterministic=True))


def _tensor_digest(tensor: ir.TensorProtocol, sampled: bool) -> bytes:
    blocks = _blocks(tensor.nbytes, sampled)
    if isinstance(tensor, ir.ExternalTensor):
        content = stored(tensor).read(blocks)
    elif len(blocks) == 1 or tensor.dtype.bitwidth < 8:
        data = tensor.tobytes()
        content = b"".join(data[start : start + length] for start, length in blocks)
    else:  # in place: `tobytes` would copy gigabytes for a few blocks
        view = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
        content = b"".join(view[start : start + length].tobytes() for start, length in blocks)
    return hashlib.sha256(content).digest()


def _blocks(size: int, sampled: bool) -> list[tuple[int, int]]:
    """The blocks of a tensor that count, as (start, length)."""
    if not sampled or size <= _SAMPLE_BLOCKS * _SAMPLE_BYTES:
        return [(0, size)]
    starts = np.linspace(0, size - _SAMPLE_BYTES, _SAMPLE_BLOCKS).astype(np.int64)
    return [(int(start), _SAMPLE_BYTES) for start in starts]
