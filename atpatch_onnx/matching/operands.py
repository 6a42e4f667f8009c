"""What a fused node says of itself: its inputs and how many axes they have, its attributes."""

import onnx_ir as ir

from atpatch_onnx import graph

_STEPS = 6
"""How many nodes back the number of axes is looked for."""

_SAME_RANK = {"Cast", "Identity", "LayerNormalization", "RotaryEmbedding", "SkipLayerNormalization", "Dropout"}
_LARGER_RANK = {"Add", "Sub", "Mul", "Div", "MatMul", "FusedMatMul"}


def operand(node: ir.Node, index: int) -> ir.Value | None:
    """Input `index` of a node; None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def integer(node: ir.Node, name: str, default: int = 0) -> int:
    """An integer attribute of a node."""
    return node.attributes[name].as_int() if name in node.attributes else default


def real(node: ir.Node, name: str, default: float = 0.0) -> float:
    """A float attribute of a node."""
    return node.attributes[name].as_float() if name in node.attributes else default


def rank(value: ir.Value, steps: int = _STEPS) -> int | None:
    """The number of axes of a value, as declared or as the few nodes before it tell; None where it is not known.

    Tools that fuse attention leave the shapes of what they move undeclared.
    """
    if value.shape is not None:
        return len(value.shape)
    node = value.producer()
    if node is None or steps == 0:
        return None
    if node.op_type == "Transpose" and "perm" in node.attributes:
        return len(node.attributes["perm"].as_ints())
    if node.op_type == "EmbedLayerNormalization":  # its second output is a mask, one number a sample
        return 1 if len(node.outputs) > 1 and value is node.outputs[1] else 3
    if node.op_type == "Reshape":
        return _entries(operand(node, 1))
    count = 1 if node.op_type in _SAME_RANK else 2 if node.op_type in _LARGER_RANK else 0
    ranks = [None if source is None else rank(source, steps - 1) for source in node.inputs[:count]]
    known = [found for found in ranks if found is not None]
    return max(known) if len(known) == len(ranks) > 0 else None


def _entries(vector: ir.Value | None) -> int | None:
    """How many entries a tensor of one axis has; None where it is not known."""
    if vector is None:
        return None
    content = graph.constant(vector)
    shape = vector.shape if content is None else content.shape
    length = None if shape is None else shape[0]
    return length if isinstance(length, int) else None


def cut_axes(node: ir.Node) -> list[int] | None:
    """The axes along which a Slice, Split or Gather cuts, as it names them; None where they cannot be told."""
    if node.op_type == "Slice":
        axes = operand(node, 3)
        content = None if axes is None else graph.constant(axes)
        return None if content is None else [int(axis) for axis in content.numpy().reshape(-1)]
    return [integer(node, "axis")] if node.op_type in ("Split", "Gather") else None
