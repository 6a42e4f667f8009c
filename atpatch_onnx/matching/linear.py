"""Linear layers of every kind: a product with weights, whatever holds these, leaves positions where they are."""

import onnx_ir as ir

from atpatch_onnx.matching.view import View

_PACKED = {"MatMulNBits", "MatMulBnb4", "MatMulFpQ4"}
"""Products of onnxruntime's own domain whose weights are packed numbers: they are always the second input."""

LINEAR = _PACKED | {
    "MatMul", "Gemm", "FusedMatMul", "FusedMatMulActivation", "TransposeMatMul", "FusedGemm", "GemmFastGelu",
    "GemmFloat8", "MatMulInteger", "MatMulIntegerToFloat", "MatMulInteger16", "DynamicQuantizeMatMul", "QLinearMatMul",
    "QGemm", "QOrderedMatMul", "SparseToDenseMatMul",
}  # fmt: skip
"""Operators that are linear layers where one of their first two inputs is a weight (`weight_of`)."""

_SECOND = {"QLinearMatMul": 3, "QGemm": 3}
"""Where the second operand is another input than the second; these are read as plain products in the main graph."""


def weight_of(node: ir.Node, view: View) -> int | None:
    """Which operand of a product, 0 or 1, is a weight; None where none is."""
    if node.op_type in _PACKED:
        return 1
    second = _SECOND.get(node.op_type, 1)
    operands = [node.inputs[index] for index in (0, second) if index < len(node.inputs)]
    return next((place for place, value in enumerate(operands) if view.is_weight(value)), None)
