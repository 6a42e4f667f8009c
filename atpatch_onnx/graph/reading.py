"""Reading a model file, which is untrusted input: what is no sound model is refused with a reason."""

import os
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnx_ir as ir

from atpatch_onnx.errors import ModelFileError
from atpatch_onnx.graph import protos
from atpatch_onnx.graph.external import check_external_data, read_from
from atpatch_onnx.graph.parts import all_names, undefined_value

ModelOrPath = ir.Model | str | os.PathLike[str]
"""A model in memory, or where it lies."""

_DATA_TYPES = {int(kind) for kind in ir.DataType if kind is not ir.DataType.UNDEFINED}


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Read an `.onnx` file. Weights in external data stay on disk.

    Raises:
        ModelFileError: The file is missing, truncated or no ONNX model, or its external data is missing, shorter than
            the model says, or outside the model's folder.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelFileError(
            str(path),
            expected="an ONNX file",
            found="a folder" if path.is_dir() else "nothing there",
            advice="Check the path.",
        )
    try:
        proto = onnx.load(str(path), load_external_data=False, format="protobuf")
    except Exception as error:  # protobuf's DecodeError has no public home across its backends
        raise _not_onnx(path, f"bytes that do not parse ({type(error).__name__})") from error
    if not proto.ir_version or not proto.HasField("graph") or not proto.opset_import:
        raise _not_onnx(path, "bytes without a graph, an IR version or an opset")
    _check_tensors(proto, path)
    check_external_data(proto, path)
    try:
        model = ir.from_proto(proto)
    except Exception as error:
        raise _not_onnx(path, f"a graph that is not well formed ({error})") from error
    untyped = [attribute for attribute in _attributes(model) if attribute.type is ir.AttributeType.UNDEFINED]
    if untyped:
        raise _not_onnx(path, f"the attribute {untyped[0].name!r} without a type")
    broken = next((text for text in _texts(model) if text is not None and not isinstance(text, str)), None)
    if broken is not None:
        raise _not_onnx(path, f"the name {broken!r}, which is no text")
    missing = undefined_value(model)
    if missing is not None:
        raise _not_onnx(path, f"a graph that uses the value {missing!r} before it is there")
    read_from(model, path.parent.resolve())
    return model


def as_model(model: ModelOrPath) -> ir.Model:
    """A model as it is, or read from its path."""
    return model if isinstance(model, ir.Model) else load(model)


def _not_onnx(path: Path, found: str) -> ModelFileError:
    return ModelFileError(
        str(path),
        expected="a complete ONNX model",
        found=found,
        advice="Export the model again, or copy the file again if it was cut short.",
    )


def _check_tensors(proto: onnx.ModelProto, path: Path) -> None:
    """Tensors must have a type, and as many bytes as their shape says."""
    for tensor in protos.tensors(proto):
        if tensor.data_type not in _DATA_TYPES:
            raise _not_onnx(path, f"the tensor {tensor.name!r} of the unknown type {tensor.data_type}")
        if tensor.HasField("raw_data") and len(tensor.raw_data) != protos.tensor_bytes(tensor):
            raise _not_onnx(path, f"the tensor {tensor.name!r} with {len(tensor.raw_data)} bytes for {tensor.dims}")


def _attributes(model: ir.Model) -> Iterator[ir.Attr]:
    return (attribute for node in model.graph.all_nodes() for attribute in node.attributes.values())


def _texts(model: ir.Model) -> Iterator[object]:
    """What must be text. Bytes that are none are handed on by protobuf as bytes, and break what comes later."""
    yield from (model.producer_name, model.producer_version, model.domain, model.doc_string)
    yield from (graph.name for graph in model.graphs())
    yield from (text for entry in model.metadata_props.items() for text in entry)
    yield from all_names(model)
    for node in model.graph.all_nodes():
        yield from (node.op_type, node.domain, node.overload, node.doc_string, *node.attributes)
