"""Reading a model file, which is untrusted input: what is no sound model is refused with a reason."""

import os
from pathlib import Path

import onnx
import onnx_ir as ir

from atpatch_onnx.errors import ModelFileError, one_line
from atpatch_onnx.graph.external import check_external_data, read_from
from atpatch_onnx.graph.kept_types import keep, take_out
from atpatch_onnx.graph.one_reading import check_one_reading
from atpatch_onnx.graph.parts import replace_tensors

ModelOrPath = ir.Model | str | os.PathLike[str]
"""A model in memory, or where it lies."""


def load(path: str | os.PathLike[str]) -> ir.Model:
    """Read an `.onnx` file. Weights in external data stay on disk.

    Raises:
        ModelFileError: The file is missing, truncated or no ONNX model, readers could understand it differently, or its
            external data is missing, shorter than the model says, or outside the model's folder.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelFileError(
            str(path),
            expected="an ONNX file",
            found="a folder" if path.is_dir() else "nothing there",
            advice="Check the path.",
        )
    content = path.read_bytes()
    if path.suffix.lower() == ".ort" or content[4:8] == b"ORTM":
        raise _not_onnx(path, "a file that onnxruntime may read in its own format")
    try:
        proto = onnx.load_model_from_string(content)
    except Exception as error:  # protobuf's DecodeError has no public home across its backends
        raise _not_onnx(path, f"bytes that do not parse ({type(error).__name__})") from error
    if proto.ByteSize() != len(content):  # such as a field that stands twice, of which readers keep the last
        raise _not_onnx(path, f"{len(content) - proto.ByteSize()} bytes that readers pass over")
    del content
    if not proto.ir_version or not proto.HasField("graph") or not proto.opset_import:
        raise _not_onnx(path, "bytes without a graph, an IR version or an opset")
    check_one_reading(proto, path)
    check_external_data(proto, path)
    types = take_out(proto)
    try:
        model = ir.from_proto(proto)
    except Exception as error:
        raise _not_onnx(path, f"a graph that is not well formed ({_cause(error)})") from error
    keep(model, types)
    read_from(model, path.parent.resolve())
    replace_tensors(model, _named_once)
    return model


class _NamedOnce(ir.serde.TensorProtoTensor):
    """A tensor in the file's own protobuf, that is not given the name it has.

    onnx-ir names each weight anew whenever a model is written. protobuf takes memory for each name, and gives none back
    before the file's last tensor is gone: a session that swaps patches for days would grow by every name, every time.
    """

    __slots__ = ()

    @property
    def name(self) -> str:
        return self.raw.name

    @name.setter
    def name(self, value: str | None) -> None:
        if value is None:
            self.raw.ClearField("name")
        elif value != self.raw.name:
            self.raw.name = value


def _named_once(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    return _NamedOnce(tensor.raw) if type(tensor) is ir.serde.TensorProtoTensor else tensor


def _not_onnx(path: Path, found: str) -> ModelFileError:
    return ModelFileError(
        str(path),
        expected="a complete ONNX model",
        found=found,
        advice="Export the model again, or copy the file again if it was cut short.",
    )


def _cause(error: BaseException) -> str:
    """What onnx-ir said first: what it says later is where, with all that is there."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)
