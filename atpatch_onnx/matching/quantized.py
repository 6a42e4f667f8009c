"""Tensors of whole numbers that stand for floats: what static quantization puts between the operators of a graph.

onnxruntime runs `DequantizeLinear -> operator -> QuantizeLinear` as one operator on whole numbers, which rounds
otherwise than the three of them. So nothing may stand between: what is read and replaced are the whole numbers,
dequantized and quantized again with the same scale, which gives each of them back.
"""

import numpy as np
import onnx_ir as ir

from atpatch_onnx.matching.sites import Quantization
from atpatch_onnx.matching.view import View

_MOVES = {
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Slice", "Split", "Gather", "Expand",
    "Dropout",
}  # fmt: skip
"""Operators that move whole numbers, which stand for the same floats behind."""

_MOVED = 20

_TYPES = (ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.UINT16, ir.DataType.INT16)

_SIXTEEN_BITS = 21
"""The opset from which on QuantizeLinear of onnx takes 16 bits; before, onnxruntime has its own."""


def quantization_of(value: ir.Value, view: View) -> Quantization | None:
    """How the numbers of a tensor stand for floats; None where they are floats, or have several scales."""
    node = _quantizer(value)
    if node is None:
        return None
    dtype = view.dtype(node.outputs[0])
    scale = view.constant(node.inputs[1])
    given = node.inputs[2] if len(node.inputs) > 2 else None
    zero_point = np.zeros(1, np.int8) if given is None else view.constant(given)
    if scale is None or zero_point is None or dtype not in _TYPES or (scale.size, zero_point.size) != (1, 1):
        return None
    number = float(scale.reshape(-1)[0])
    if scale.dtype != np.float32 or not np.isfinite(number) or number < float(np.finfo(np.float32).tiny):
        return None
    own = dtype.itemsize > 1 and view.opset < _SIXTEEN_BITS
    return Quantization(number, int(zero_point.reshape(-1)[0]), "com.microsoft" if own else "")


def has_other_scales(value: ir.Value, view: View) -> bool:
    """Whether a tensor holds whole numbers that stand for floats in a way that `quantization_of` does not read."""
    return _quantizer(value) is not None and quantization_of(value, view) is None


def _quantizer(value: ir.Value) -> ir.Node | None:
    """The QuantizeLinear that a tensor of whole numbers comes from."""
    for _ in range(_MOVED):
        node = value.producer()
        if node is None or node.domain != "":
            return None
        if node.op_type == "QuantizeLinear":
            return node
        if node.op_type not in _MOVES or node.inputs[0] is None:
            return None
        value = node.inputs[0]
    return None


def is_closed(value: ir.Value) -> bool:
    """Whether nothing may be put behind a tensor as it is: floats in the midst of what runs on whole numbers, or these.

    The floats between DequantizeLinear and what reads them, moved or not, or between an operator of dequantized tensors
    and its QuantizeLinear.
    """
    if _quantizer(value) is not None or _dequantized(value):
        return True
    node = value.producer()
    if node is None or not any(user.op_type == "QuantizeLinear" for user in value.consumers()):
        return False
    read = (None if source is None else source.producer() for source in node.inputs)
    return any(one is not None and one.op_type == "DequantizeLinear" for one in read)


_PASSED = _MOVES - {"Split", "Gather"}
"""onnxruntime moves a DequantizeLinear behind these, and crashes where an If is what follows (seen with 1.31)."""


def _dequantized(value: ir.Value) -> bool:
    """Whether a tensor is what a DequantizeLinear gives, moved at most."""
    for _ in range(_MOVED):
        node = value.producer()
        if node is None or node.domain != "" or not node.inputs or node.inputs[0] is None:
            return False
        if node.op_type == "DequantizeLinear":
            return _quantizer(node.inputs[0]) is not None
        if node.op_type not in _PASSED:
            return False
        value = node.inputs[0]
    return False
