"""How far something reaches through what a node computes: which entries of a result may depend on it.

A rule may say that more is reached than is, never less:

| operators | what of a result is reached |
|---|---|
| elementwise | where any operand is |
| products, sums, norms, softmax | all entries that are computed of one that is reached |
| `Where` with a constant condition | what is chosen |
| those that move entries | see `measuring.path_moves` |
| any other | there is no rule |
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.measuring.path_moves import MOVES
from atpatch_onnx.measuring.path_values import (
    Bools,
    Rule,
    Sizes,
    Told,
    UnfollowedError,
    broadcast,
    computed,
    counts_samples,
    number,
    numbers,
    operand,
    plain,
    sizes_of,
)


def follow(node: ir.Node, operands: Sequence[Told | None]) -> list[Told]:
    """What is told of the results of a node.

    Raises:
        UnfollowedError: There is no rule for it.
    """
    rule = _RULES.get(node.op_type)
    if rule is None or node.domain not in ("", "ai.onnx"):
        raise UnfollowedError
    given = [one for one in operands if one is not None]
    if any(one.sizes is None for one in given):
        raise UnfollowedError
    return rule(node, operands)


def _elementwise(node: ir.Node, operands: Sequence[Told | None]) -> list[Told]:
    given = [one for one in operands if one is not None]
    sizes = broadcast(*(sizes_of(one) for one in given))
    reached = np.zeros(plain(sizes), np.bool_)
    for one in given:
        reached |= one.reached
    return [Told(sizes, reached, _fits(computed(node, operands), sizes))]


def _fits(known: NDArray[np.generic] | None, sizes: Sizes) -> NDArray[np.generic] | None:
    return known if known is not None and known.shape == plain(sizes) else None


def _passed(node: ir.Node, operands: Sequence[Told | None]) -> list[Told]:
    """The first operand as it is; the others say nothing but a type."""
    first = operand(operands, 0)
    known = first.known
    if node.op_type != "Identity" and known is not None and not counts_samples(known):
        known = _fits(computed(node, operands), sizes_of(first))
    return [Told(first.sizes, first.reached, known)]


def _where(node: ir.Node, operands: Sequence[Told | None]) -> list[Told]:
    condition, yes, no = (operand(operands, index) for index in range(3))
    if condition.known is None or not condition.clean:
        return _elementwise(node, operands)
    sizes = broadcast(*(sizes_of(one) for one in (condition, yes, no)))
    shape = plain(sizes)
    chosen = np.broadcast_to(condition.known.astype(np.bool_), shape)
    reached = np.where(chosen, np.broadcast_to(yes.reached, shape), np.broadcast_to(no.reached, shape))
    return [Told(sizes, reached, _fits(computed(node, operands), sizes))]


# Sums over axes


def _mixed(one: Told, axes: Sequence[int]) -> Bools:
    """What is reached where everything along these axes is computed of everything."""
    return np.asarray(np.broadcast_to(one.reached.any(axis=tuple(axes), keepdims=True), one.reached.shape))


def _normalized(node: ir.Node, operands: Sequence[Told | None]) -> list[Told]:
    """Norms over the axes from `axis` on, scaled and shifted, with means and deviations where they are asked for."""
    first = operand(operands, 0)
    rank = len(sizes_of(first))
    axes = range(number(node, "axis", -1) % rank, rank)
    reached = _mixed(first, axes)
    for other in operands[1:]:
        if other is not None and not other.clean:
            raise UnfollowedError
    rows = np.asarray(first.reached.any(axis=tuple(axes), keepdims=True))
    small = Told((*sizes_of(first)[: axes[0]], *[1] * len(axes)), rows)
    return [Told(first.sizes, reached), *[small] * (len(node.outputs) - 1)]


def _along(node: ir.Node, operands: Sequence[Told | None]) -> list[Told]:
    """Softmax and its like, along one axis: files have opset 15 or a later one."""
    first = operand(operands, 0)
    rank = len(sizes_of(first))
    axes = numbers(node, "", operands, 1) if node.op_type == "CumSum" else [number(node, "axis", -1)]
    if not axes:
        raise UnfollowedError
    return [Told(first.sizes, _mixed(first, [axes[0] % rank]))]


def _reduced(node: ir.Node, operands: Sequence[Told | None]) -> list[Told]:
    first = operand(operands, 0)
    if node.op_type.startswith("Arg"):
        axes: list[int] | None = [number(node, "axis", 0)]
    else:
        axes = numbers(node, "axes", operands, 1)
    rank = len(sizes_of(first))
    if not axes and number(node, "noop_with_empty_axes", 0):
        return [first]
    chosen = sorted({axis % rank for axis in axes}) if axes else list(range(rank))
    keep = bool(number(node, "keepdims", 1))
    reached = first.reached.any(axis=tuple(chosen), keepdims=keep)
    sizes: Sizes = tuple(
        1 if axis in chosen else size for axis, size in enumerate(sizes_of(first)) if keep or axis not in chosen
    )
    same = node.op_type in ("ReduceMax", "ReduceMin") or None not in (sizes_of(first)[axis] for axis in chosen)
    return [Told(sizes, np.asarray(reached), _fits(computed(node, operands) if same else None, sizes))]


def _product(node: ir.Node, operands: Sequence[Told | None]) -> list[Told]:
    one, other = operand(operands, 0), operand(operands, 1)
    first, second = sizes_of(one), sizes_of(other)
    if min(len(first), len(second)) < 2:
        raise UnfollowedError
    sizes = (*broadcast(first[:-2], second[:-2]), first[-2], second[-1])
    rows, columns = one.reached.any(axis=-1, keepdims=True), other.reached.any(axis=-2, keepdims=True)
    return [Told(sizes, np.asarray(np.broadcast_to(rows | columns, plain(sizes))))]


def _gemm(node: ir.Node, operands: Sequence[Told | None]) -> list[Told]:
    turned = [
        Told(tuple(reversed(sizes_of(one))), one.reached.T) if number(node, name, 0) else one
        for one, name in ((operand(operands, 0), "transA"), (operand(operands, 1), "transB"))
    ]
    [found] = _product(node, turned)
    added = operands[2] if len(operands) > 2 else None
    return [found] if added is None else _elementwise_of(found, added)


def _elementwise_of(*given: Told) -> list[Told]:
    sizes = broadcast(*(sizes_of(one) for one in given))
    reached = np.zeros(plain(sizes), np.bool_)
    for one in given:
        reached |= one.reached
    return [Told(sizes, reached)]


def _attention(node: ir.Node, operands: Sequence[Told | None]) -> list[Told]:
    """A query's result is computed of it, and of all keys, values and masks."""
    if len(node.outputs) > 1 or any(one is not None and not one.clean for one in operands[1:]):
        raise UnfollowedError
    queries, values = operand(operands, 0), operand(operands, 2)
    sizes, width = sizes_of(queries), sizes_of(values)[-1]
    if len(sizes) == 3:
        groups = number(node, "q_num_heads", 1), number(node, "kv_num_heads", 1)
        width = None if width is None else width // groups[1] * groups[0]
    rows = queries.reached.any(axis=-1, keepdims=True)
    found = (*sizes[:-1], width)
    return [Told(found, np.asarray(np.broadcast_to(rows, plain(found))))]


_ELEMENTWISE = (
    "Abs", "Acos", "Add", "And", "Asin", "Atan", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "Ceil", "Celu", "Clip",
    "Cos", "Div", "Elu", "Equal", "Erf", "Exp", "Floor", "Gelu", "Greater", "GreaterOrEqual", "HardSigmoid",
    "HardSwish", "IsInf", "IsNaN", "LeakyRelu", "Less", "LessOrEqual", "Log", "Max", "Mean", "Min", "Mish", "Mod",
    "Mul", "Neg", "Not", "Or", "PRelu", "Pow", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Sin",
    "Softplus", "Softsign", "Sqrt", "Sub", "Sum", "Swish", "Tan", "Tanh", "ThresholdedRelu", "Xor",
)  # fmt: skip

_REDUCTIONS = ["L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"]

_RULES: Mapping[str, Rule] = {
    **MOVES,
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(("Identity", "Cast", "CastLike"), _passed),
    **dict.fromkeys((f"Reduce{name}" for name in _REDUCTIONS), _reduced),
    **dict.fromkeys(("ArgMax", "ArgMin"), _reduced),
    **dict.fromkeys(("Softmax", "LogSoftmax", "CumSum"), _along),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), _normalized),
    "Where": _where,
    "MatMul": _product,
    "Gemm": _gemm,
    "Attention": _attention,
}
