"""Steps over what works on each token and head alone: rotary embeddings and norms of keys, written as one node or out.

Such a block begins at the nearest tensor of its own shape that all of it comes from. Whatever else goes in must be
the same for every input, or not depend on heads, as positions and their angles do.
"""

from collections.abc import Iterator, Sequence
from math import prod

import onnx_ir as ir

from atpatch_onnx.matching.view import View

_BLOCKS = {
    ("", "RotaryEmbedding"), ("com.microsoft", "RotaryEmbedding"), ("", "RMSNormalization"), ("", "LayerNormalization"),
    ("", "SimplifiedLayerNormalization"), ("com.microsoft", "SimplifiedLayerNormalization"), ("", "LpNormalization"),
}  # fmt: skip
"""Single nodes that are one; norms are over the last axis."""

_INSIDE = {
    "Add", "Sub", "Mul", "Div", "Neg", "Pow", "Sqrt", "Reciprocal", "Cast", "Concat", "Slice", "Split", "Gather",
    "ReduceMean", "ReduceSum", "ReduceL2", "ReduceSumSquare", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Expand",
    "Max", "Identity", "Clip", "ScatterND", "Abs", "Where", "QuantizeLinear", "DequantizeLinear",
}  # fmt: skip
"""What blocks are written with; reductions over the last axis only."""

_ANGLES = {
    "Unsqueeze", "Squeeze", "Cast", "Mul", "Reshape", "Concat", "Slice", "Gather", "Expand", "Transpose",
    "QuantizeLinear", "DequantizeLinear",
}  # fmt: skip
"""What may stand between a cosine or a sine, or a table of them, and the keys."""

_MOVES = {
    "Slice", "Split", "Gather", "Reshape", "Transpose", "Unsqueeze", "Squeeze", "Expand", "Cast", "Identity",
    "QuantizeLinear", "DequantizeLinear",
}  # fmt: skip
"""Of these, the ones whose first input alone has entries."""

_LARGEST = 40
"""Nodes of a block at most."""

_MOVED = 6


def over_a_block(value: ir.Value, shape: Sequence[int], view: View) -> tuple[ir.Value | None, Sequence[ir.Node]]:
    """What the block that ends at `value` begins with, and its nodes; None and none where no block ends there."""
    node = value.producer()
    assert node is not None, "somebody computes it"
    if (node.domain, node.op_type) in _BLOCKS and view.sizes(node.inputs[0]) == tuple(shape):
        return node.inputs[0], (node,)
    if not _adds_a_bias(node, view):
        for source in _ancestors(value, shape, view):
            inside = _between(value, source, view)
            if inside is not None:
                return source, inside
    return None, ()


def _adds_a_bias(node: ir.Node, view: View) -> bool:
    """A projection ends with it: keys are what it gives. A single number, as norms add, is none."""
    added = [view.sizes(value) for value in node.inputs if view.is_static(value)]
    return node.op_type == "Add" and any(sizes is None or prod(sizes) > 1 for sizes in added)


def _ancestors(value: ir.Value, shape: Sequence[int], view: View) -> Iterator[ir.Value]:
    """Tensors of the shape that the value is computed from, the nearest first."""
    pending, seen = [value], {value}
    while pending and len(seen) < _LARGEST:
        node = pending.pop(0).producer()
        if node is None or node.op_type not in _INSIDE or node.domain != "":
            continue
        for source in _entries(node):
            if source in seen or view.is_static(source):
                continue
            seen.add(source)
            pending.append(source)
            if view.sizes(source) == tuple(shape):
                yield source


def _entries(node: ir.Node) -> list[ir.Value]:
    """The inputs whose entries go into a node's result: not shapes, axes and indices, which say where they go."""
    inputs = node.inputs[:1] if node.op_type in _MOVES else node.inputs
    return [value for value in inputs if value is not None]


def _between(value: ir.Value, source: ir.Value, view: View) -> list[ir.Node] | None:
    """The nodes between, if nothing goes in but the source, weights and angles."""
    nodes: list[ir.Node] = []
    pending, seen = [value], {source}
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if view.is_static(current) or _is_angle(current, view):
            continue
        node = current.producer()
        if node is None or node.op_type not in _INSIDE or node.domain != "" or _adds_a_bias(node, view):
            return None
        if len(nodes) == _LARGEST or (node.op_type.startswith("Reduce") and not _reduces_last(node, view)):
            return None
        nodes.append(node)
        pending.extend(_entries(node))
    return nodes


def _is_angle(value: ir.Value, view: View) -> bool:
    """Whether a tensor is made of positions alone: whole numbers, or cosines and sines, moved at most."""
    if value.dtype is not None and not value.dtype.is_floating_point():
        return True
    for _ in range(_MOVED):
        node = value.producer()
        if node is None:
            return False
        if node.op_type in ("Cos", "Sin", "Shape", "Range") or (
            node.op_type == "Gather" and view.is_static(node.inputs[0])
        ):
            return True
        if node.op_type not in _ANGLES or node.inputs[0] is None:
            return False
        value = node.inputs[0]
    return False


def _reduces_last(node: ir.Node, view: View) -> bool:
    rank = view.rank(node.inputs[0])
    if "axes" in node.attributes:
        axes = list(node.attributes["axes"].as_ints())
    else:
        given = view.constant(node.inputs[1]) if len(node.inputs) > 1 else None
        axes = [] if given is None else given.reshape(-1).tolist()
    return rank is not None and [axis % rank for axis in axes] == [rank - 1]
