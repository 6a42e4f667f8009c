"""Walks along chains of nodes that only reshape, mask or scale: from the softmax to V, and back to Q and K."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import onnx_ir as ir

from atpatch_onnx.matching.view import View

PRODUCTS = {
    "MatMul", "Einsum", "Gemm", "FusedMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
}  # fmt: skip

_MOVES = {
    "Cast", "CastLike", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Slice", "Dropout", "Identity",
    "QuantizeLinear", "DequantizeLinear",
}  # fmt: skip
"""Operators that move, cut or convert the entries of their first input."""

_FORWARD = dict.fromkeys((*_MOVES, "Split", "DynamicQuantizeLinear"), (0,)) | {
    "Where": (1, 2),
    "Mul": (0, 1),
    "Div": (0,),
}
_BACK = dict.fromkeys((*_MOVES, "Tanh", "Clip", "Flatten"), (0,)) | {
    "Add": (0, 1),
    "Sub": (0, 1),
    "Mul": (0, 1),
    "Div": (0,),
    "Where": (1, 2),
    "Concat": None,
    "Min": None,
    "Max": None,
    "Neg": (0,),
    "ScatterND": (0,),
}
"""Operators to walk through, with the operands that carry the entries (None: all)."""

WALKED = frozenset(_BACK)
"""Those that `back` walks through."""


@dataclass(frozen=True)
class Meeting:
    """Where a chain ended: `node` took `value` as its operand `index`, after `path` (in walking order)."""

    node: ir.Node
    index: int
    value: ir.Value
    path: tuple[ir.Node, ...]

    @property
    def is_product(self) -> bool:
        """Whether the chain ended at a product of matrices."""
        return self.node.op_type in PRODUCTS


def forward(
    value: ir.Value, over: Callable[[ir.Node, int, Sequence[ir.Node]], bool] = lambda node, index, path: False
) -> Iterator[Meeting]:
    """Every node that the entries of `value` meet after moves, guards and scalings, in graph order of each fan-out.

    Args:
        value: Where the walk begins.
        over: Whether it leads over another node as well, by way of this operand, after a path.
    """
    stack: list[tuple[ir.Value, tuple[ir.Node, ...]]] = [(value, ())]
    seen = {value}
    while stack:
        current, path = stack.pop()
        for use in current.uses():
            known = use.idx in _FORWARD.get(use.node.op_type, ()) and use.node.domain == ""
            if known or over(use.node, use.idx, path):
                outputs = use.node.outputs if use.node.op_type == "Split" else use.node.outputs[:1]
                fresh = [output for output in outputs if output not in seen]
                seen.update(fresh)
                stack += [(following, (*path, use.node)) for following in fresh]
            else:
                yield Meeting(use.node, use.idx, current, path)


@dataclass(frozen=True)
class Product:
    """A product of matrices found on the way back; `path` leads from there to the start, in graph order."""

    node: ir.Node
    path: tuple[ir.Node, ...]


def back(
    value: ir.Value, over: Callable[[ir.Node, Sequence[ir.Node]], int | None] = lambda node, path: None
) -> Iterator[Product]:
    """The products that the entries of `value` were computed from; the first operand of each node comes first.

    Args:
        value: Where the walk begins.
        over: The operand by way of which it leads over a node that is none of those known, given the path behind it.
    """
    stack: list[tuple[ir.Value, tuple[ir.Node, ...]]] = [(value, ())]
    seen = set()
    while stack:
        current, path = stack.pop()
        node = current.producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        beyond = over(node, path)
        if beyond is not None:
            source = node.inputs[beyond]
            assert source is not None, "it is mixed"
            stack.append((source, (node, *path)))
            continue
        if node.op_type in PRODUCTS:
            yield Product(node, path)
            continue
        if node.op_type not in _BACK or node.domain != "":
            continue
        operands = _BACK[node.op_type]
        for index in reversed(range(len(node.inputs)) if operands is None else operands):
            operand = node.inputs[index]
            if operand is not None:
                stack.append((operand, (node, *path)))


def followed(step: ir.Node, position: int, view: View) -> int | None:
    """Where a step takes an axis of its first operand; None where the axis does not stay one axis."""
    before, after = view.sizes(step.inputs[0]), view.sizes(step.outputs[0])
    if step.op_type == "Transpose":
        rank = view.rank(step.inputs[0]) or 0
        perm = step.attributes["perm"].as_ints() if "perm" in step.attributes else range(rank)[::-1]
        return list(perm).index(position) if position in perm else None
    if step.op_type == "Gather" and before is not None and after is not None and len(after) < len(before):
        axis = step.attributes.get_int("axis", 0) % len(before)
        return None if position == axis else position - (position > axis)
    if step.op_type not in ("Reshape", "Squeeze", "Unsqueeze"):
        return position
    if before is None or after is None:
        return None
    stride = prod(before[position + 1 :])
    for axis, size in enumerate(after):
        if (size, prod(after[axis + 1 :])) == (before[position], stride):
            return axis
    return None


def can_hide(path: tuple[ir.Node, ...], view: View) -> bool:
    """Whether the nodes between the product of Q and K and the softmax can push a weight to zero.

    Scalings cannot, nor can a finite bias that is part of the weights. Whatever is not known is taken for a mask.
    """
    return any(_hides(node, view) for node in path)


def _hides(node: ir.Node, view: View) -> bool:
    if node.op_type in ("Where", "ScatterND"):
        return True
    if node.op_type not in {"Add", "Sub", "Min", "Max", "Concat"}:
        return False
    if _subtracts_maximum(node):
        return False
    added = [operand for operand in node.inputs if view.is_static(operand) or entries(operand, view) is not None]
    return not added or any(is_mask(operand, view) for operand in added)


def is_mask(operand: ir.Value | None, view: View) -> bool:
    """Whether a mask or bias can hide a key: false only where every entry is True, or finite and small."""
    content = entries(operand, view)
    if content is None:
        return True
    if content.dtype == np.bool_:
        return not bool(content.all())
    return bool((~(np.abs(content.astype(np.float32)) < _HIDING)).any())


def entries(value: ir.Value | None, view: View) -> np.ndarray | None:
    """The distinct entries that a value made of constants can have; None where it depends on more than constants.

    transformers writes a mask that hides nothing as a constant of True, expanded to the batch, and for decomposed
    attention selected by it: `Where(Expand(True), 0, -inf)`.
    """
    content = view.constant(value)
    if content is not None:
        return np.unique(content)
    node = None if value is None else value.producer()
    if node is None or node.domain != "":
        return None
    if node.op_type in _RESHAPES:
        return entries(node.inputs[0], view)
    if node.op_type == "Cast" and node.attributes["to"].as_int() == ir.DataType.BOOL:
        content = entries(node.inputs[0], view)
        return None if content is None else np.unique(content.astype(np.bool_))
    if node.op_type == "Where":
        condition = entries(node.inputs[0], view)
        chosen = [index for index, truth in ((1, True), (2, False)) if condition is None or truth in condition]
        parts = [entries(node.inputs[index], view) for index in chosen]
        known = [part for part in parts if part is not None]
        return np.unique(np.concatenate(known)) if known and len(known) == len(parts) else None
    return None


_RESHAPES = frozenset({"Expand", "Reshape", "Unsqueeze", "Squeeze", "Transpose", "Identity"})

_HIDING = 1000.0
"""A bias of this size and more hides a key for good: exp(-1000) is zero in every float type."""


def _subtracts_maximum(node: ir.Node) -> bool:
    second = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] is not None else None
    return node.op_type == "Sub" and second is not None and second.op_type == "ReduceMax"
