"""A tensor has one content, in one place, of the size that its shape says, whoever reads it."""

import math
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from onnx import TensorProto

from atpatch_onnx.graph.one_schema import Refusal
from atpatch_onnx.graph.protos import TYPED, tensor_bytes

_TWICE = frozenset({TensorProto.COMPLEX64, TensorProto.COMPLEX128})
"""Types whose elements are two numbers each."""

_FIELDS: dict[int, str] = {
    TensorProto.FLOAT: "float_data",
    TensorProto.COMPLEX64: "float_data",
    TensorProto.DOUBLE: "double_data",
    TensorProto.COMPLEX128: "double_data",
    TensorProto.INT64: "int64_data",
    TensorProto.UINT64: "uint64_data",
    TensorProto.UINT32: "uint64_data",
    TensorProto.STRING: "string_data",
}
"""Where a type's elements lie if not in `raw_data`; those of all others lie in `int32_data`."""

_ENTRIES = frozenset({"location", "offset", "length", "checksum"})
"""Not onnxruntime's own `prepacked_...`: it runs what lies there in place of the weight, and does not compare them."""

_DATA_TYPES = {int(kind): kind for kind in ir.DataType if kind is not ir.DataType.UNDEFINED}
_LARGEST = 2**63 - 1


def check_content(tensor: TensorProto, refusal: Refusal) -> None:
    """Refuse a tensor that readers may take for different ones.

    A tensor without any content is none of them: nothing runs it, but its graph may be looked at.

    Raises:
        Exception: What `refusal` makes.
    """
    where = f"the tensor {tensor.name!r}"
    kind = _DATA_TYPES.get(tensor.data_type)
    if kind is None:
        raise refusal(where, "a type that ONNX has", f"the unknown type {tensor.data_type}")
    sizes = list(tensor.dims)
    if any(size < 0 for size in sizes) or math.prod(max(size, 1) for size in sizes) * 16 > _LARGEST:
        raise refusal(where, "a shape that memory can hold", f"the shape {sizes}")
    if tensor.HasField("segment"):
        raise refusal(where, "its whole content in one piece", "a segment, which most readers take for the whole")
    kept = list(_kept(tensor))
    if len(kept) > 1:
        raise refusal(where, "one content", f"{' and '.join(kept)}, of which readers choose different ones")
    if tensor.data_location == TensorProto.EXTERNAL:
        _check_entries(tensor, refusal, where)
    elif "raw_data" in kept:
        _check_raw(tensor, kind, refusal, where)
    elif kept:
        _check_typed(tensor, kind, kept[0], refusal, where)


def _kept(tensor: TensorProto) -> Iterator[str]:
    """The fields that hold content."""
    if tensor.HasField("raw_data"):
        yield "raw_data"
    yield from (name for name in TYPED if len(getattr(tensor, name)))
    if tensor.external_data or tensor.data_location == TensorProto.EXTERNAL:
        yield "external data"


def _check_raw(tensor: TensorProto, kind: ir.DataType, refusal: Refusal, where: str) -> None:
    if kind is ir.DataType.STRING:
        raise refusal(where, "text in string_data", "text in raw_data")
    raw, wanted = tensor.raw_data, tensor_bytes(tensor)
    if len(raw) != wanted:
        raise refusal(where, f"{wanted} bytes", f"{len(raw)} bytes for {list(tensor.dims)}")
    if kind is ir.DataType.BOOL and raw and max(raw) > 1:
        raise refusal(where, "0 or 1 for each bool", f"the byte {max(raw)}")


def _check_typed(tensor: TensorProto, kind: ir.DataType, field: str, refusal: Refusal, where: str) -> None:
    wanted = _FIELDS.get(tensor.data_type, "int32_data")
    if field != wanted:
        raise refusal(where, f"elements of type {kind.name} in {wanted}", f"some in {field}")
    elements = math.prod(tensor.dims)
    bits = 8 if kind is ir.DataType.STRING else kind.bitwidth
    count = -(-elements * bits // 8) if bits in (2, 4) else elements * (2 if tensor.data_type in _TWICE else 1)
    held = getattr(tensor, field)
    if len(held) != count:
        raise refusal(where, f"{count} entries in {field}", f"{len(held)} for {list(tensor.dims)}")
    if field == "int32_data" or kind is ir.DataType.UINT32:
        bits = 1 if kind is ir.DataType.BOOL else max(bits, 8)
        lowest = -(2 ** (bits - 1)) if 8 <= bits <= 32 and field == "int32_data" else 0
        numbers = np.array(held)
        if numbers.size and (int(numbers.min()) < lowest or int(numbers.max()) >= 2**bits):
            raise refusal(where, f"numbers that {kind.name} can hold", f"{numbers.min()} to {numbers.max()}")


def _check_entries(tensor: TensorProto, refusal: Refusal, where: str) -> None:
    keys = [entry.key for entry in tensor.external_data]
    if len(set(keys)) < len(keys):
        raise refusal(where, "each entry of its external data once", ", ".join(map(repr, keys)))
    unknown = [key for key in keys if key not in _ENTRIES]
    if unknown:
        raise refusal(where, f"external data by {', '.join(sorted(_ENTRIES))}", f"the entry {unknown[0]!r}")
    for entry in tensor.external_data:
        if entry.key in ("offset", "length") and not (entry.value.isascii() and entry.value.isdigit()):
            raise refusal(where, f"a whole number as {entry.key} of its external data", repr(entry.value))
    if _DATA_TYPES[tensor.data_type] is ir.DataType.STRING:
        raise refusal(where, "text in string_data", "text in external data")
