"""Types that onnx-ir does not read, such as the maps that ZipMap returns: taken out of a file, and put back.

Only outputs of the model may have one: nothing of the patch reads them, and they pass through as they are.
"""

from collections.abc import Iterator, Mapping

import onnx
import onnx_ir as ir

_KEPT = "atpatch.type"


def has_map(kind: onnx.TypeProto) -> bool:
    """Whether a type is a map, or a sequence or an optional of maps."""
    if kind.HasField("map_type"):
        return True
    inner = kind.WhichOneof("value")
    return inner in ("sequence_type", "optional_type") and has_map(getattr(kind, inner).elem_type)


def take_out(proto: onnx.ModelProto) -> Mapping[str, bytes]:
    """Take the types of outputs that are maps out of a file, in place; they are answered by name."""
    found = {}
    for output in proto.graph.output:
        if has_map(output.type):
            found[output.name] = output.type.SerializeToString(deterministic=True)
            output.ClearField("type")
    return found


def keep(model: ir.Model, types: Mapping[str, bytes]) -> None:
    """Note them at the outputs; copies of the model have them as well."""
    for output in model.graph.outputs:
        if str(output.name) in types:
            output.meta[_KEPT] = types[str(output.name)]


def kept(value: ir.Value) -> Iterator[bytes]:
    """The type that was taken out at a value, if one was."""
    if _KEPT in value.meta:
        yield value.meta[_KEPT]


def put_back(proto: onnx.ModelProto, model: ir.Model) -> None:
    """Put them into the model's file."""
    for info, output in zip(proto.graph.output, model.graph.outputs, strict=True):
        for content in kept(output):
            info.type.ParseFromString(content)
