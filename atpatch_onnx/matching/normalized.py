"""A softmax, whatever writes it: one node, or exponentials divided by their sum, as exporters and optimizers write it.

    Softmax(x)
    Exp(x) / sum Exp(x)              both masked or not; the sum kept, reshaped, converted, guarded; times a reciprocal
    Pow(2, x) / sum Pow(2, x)        or of another number
    Exp(LogSoftmax(x))
    Exp(x - ReduceLogSumExp(x)),  Exp(x - Log(sum Exp(x)))

In front of each may stand `x - max(x)`, which is walked over as any other scaling of the scores is.
"""

from collections.abc import Set
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from atpatch_onnx import graph
from atpatch_onnx.matching.view import View

ANCHORS = frozenset({("", "Softmax"), ("", "Div"), ("", "Mul"), ("", "Exp")})

_FARTHEST = 12

_SHAPED = {"Cast", "CastLike", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Expand"}
_GUARDS = {"Add", "Max", "Clip"}
"""What keeps a sum from being zero, with a number."""

_SUMS = {"ReduceSum", "ReduceL1"}


@dataclass(frozen=True)
class Normalized:
    """A softmax, as one node or written out."""

    node: ir.Node
    """The last of its nodes."""

    scores: ir.Value
    weights: ir.Value
    axis: int
    masked: bool = False
    """Whether exponentials are taken away before they are summed."""


def read_softmax(node: ir.Node, view: View) -> Normalized | None:
    """The softmax that ends at a node; None where none does."""
    if node.op_type in ("Softmax", "LogSoftmax"):
        found: _Found = node.inputs[0], node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    else:
        found = _of_logarithm(node, view) if node.op_type == "Exp" else _of_quotient(node, view)
    scores, axis, *masked = found
    return None if scores is None or axis is None else Normalized(node, scores, node.outputs[0], axis, bool(masked))


_Found = tuple[ir.Value | None, int | None] | tuple[ir.Value | None, int | None, bool]
"""The scores and the axis; a third where exponentials are masked."""

_NONE: _Found = (None, None)


def _of_quotient(node: ir.Node, view: View) -> _Found:
    """Of `a / b`, or of `a * c` where `c` is one over `b`."""
    first, second = node.inputs
    pairs = [(first, second)] if node.op_type == "Div" else [(first, _inverted(second)), (second, _inverted(first))]
    for above, below in pairs:
        shares = _behind(above)
        exponential = None if shares is None else _masked(shares)
        if shares is not None and exponential is not None:
            axis = _summed_along(below, shares, view)
            if axis is not None:
                scores = _exponent(exponential)
                return (scores, axis) if exponential is shares else (scores, axis, True)
    return _NONE


def divided_behind(node: ir.Node, view: View) -> ir.Node | None:
    """The product of exponentials with values that a node divides by their sum; None where it does not."""
    if node.op_type not in ("Div", "Mul"):
        return None
    first, second = node.inputs
    pairs = [(first, second)] if node.op_type == "Div" else [(first, _inverted(second)), (second, _inverted(first))]
    for above, below in pairs:
        product = _behind(above)
        for operand in product.inputs if product is not None and product.op_type in ("MatMul", "Einsum") else ():
            shares = _behind(operand)
            if shares is not None and _masked(shares) and _summed_along(below, shares, view) is not None:
                return product
    return None


def _masked(node: ir.Node) -> ir.Node | None:
    """The exponential that a node is, or that it takes entries away from."""
    if _exponent(node) is not None:
        return node
    candidates = {"Mul": node.inputs[:2], "Where": node.inputs[1:3]}.get(node.op_type, ())
    found = (_behind(value) for value in candidates)
    return next((inner for inner in found if inner is not None and _exponent(inner) is not None), None)


def _exponent(node: ir.Node) -> ir.Value | None:
    """What a node raises e, or another number, to; None where it does not."""
    if node.op_type == "Exp":
        return node.inputs[0]
    base = _number(node.inputs[0]) if node.op_type == "Pow" else None
    return node.inputs[1] if base is not None and base > 1 else None


def _inverted(value: ir.Value | None) -> ir.Value | None:
    """What a value is one over."""
    node = _behind(value)
    if node is None:
        return None
    if node.op_type == "Reciprocal":
        return node.inputs[0]
    if node.op_type == "Div" and _number(node.inputs[0]) == 1:
        return node.inputs[1]
    return node.inputs[0] if node.op_type == "Pow" and _number(node.inputs[1]) == -1 else None


def _of_logarithm(node: ir.Node, view: View) -> _Found:
    """Of the exponential of a softmax's logarithm."""
    inner = _behind(node.inputs[0])
    if inner is None:
        return _NONE
    if inner.op_type == "LogSoftmax":
        found = read_softmax(inner, view)
        return _NONE if found is None else (found.scores, found.axis)
    if inner.op_type != "Sub":
        return _NONE
    scores, taken = inner.inputs[0], _behind(inner.inputs[1], also=_GUARDS)
    if taken is None or scores is None:
        return _NONE
    if taken.op_type == "ReduceLogSumExp" and taken.inputs[0] is scores:
        return scores, _axis(taken, view)
    exponential = None if taken.op_type != "Log" else _exponential_below(taken.inputs[0])
    if exponential is None or exponential.inputs[0] is not scores:
        return _NONE
    return scores, _summed_along(taken.inputs[0], exponential, view)


def _exponential_below(value: ir.Value | None) -> ir.Node | None:
    total = _behind(value, also=_GUARDS)
    return _behind(total.inputs[0]) if total is not None and total.op_type in _SUMS else None


def _summed_along(value: ir.Value | None, exponential: ir.Node, view: View) -> int | None:
    """The axis along which a value is the sum of these exponentials; None where it is none."""
    total = _behind(value, also=_GUARDS)
    if total is None or not total.inputs or _behind(total.inputs[0]) is not exponential:
        return None
    if total.op_type == "MatMul" and view.is_static(total.inputs[1]):  # with a column of ones
        ones = view.constant(total.inputs[1])
        return -1 if ones is not None and bool((ones == 1).all()) else None
    return _axis(total, view) if total.op_type in _SUMS else None


def _axis(node: ir.Node, view: View) -> int | None:
    """The only axis that a reduction is along; it is an attribute or an input, as the opset has it."""
    if "axes" in node.attributes:
        axes = np.array(node.attributes["axes"].as_ints())
    else:
        given = view.constant(node.inputs[1]) if len(node.inputs) > 1 else None
        axes = np.zeros(0, np.int64) if given is None else given.reshape(-1)
    return int(axes[0]) if axes.size == 1 else None


def _behind(value: ir.Value | None, also: Set[str] = frozenset()) -> ir.Node | None:
    """The node that computes a value, but for conversions and reshapes, and operators of `also` with a number."""
    for _ in range(_FARTHEST):
        node = None if value is None else value.producer()
        if node is None or node.domain != "":
            return None
        if node.op_type in _SHAPED:
            value = node.inputs[0]
        elif node.op_type in also:
            free = [operand for operand in node.inputs if operand is not None and not _is_number(operand)]
            if len(free) != 1:
                return node
            value = free[0]
        else:
            return node
    return None


def _is_number(value: ir.Value) -> bool:
    return _number(value) is not None


def _number(value: ir.Value | None) -> float | None:
    """The number that a weight of one entry holds."""
    tensor = None if value is None else graph.constant(value)
    return float(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None
