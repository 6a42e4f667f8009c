"""Bring a site's tensors to the canonical four axes in the graph, and back: `matching.layout` as ONNX nodes.

A tensor that has the canonical axes already costs nothing. Otherwise folded axes are taken apart by a Reshape, brought
into order by a Transpose, and merged by a Reshape; the way back takes its shape from the tensor it stands in for.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.matching.layout import Layout
from atpatch_onnx.matching.sites import Dim

_Piece = int | tuple[int] | ir.Value
"""A size of a Reshape: a number (-1: the rest), the axis of the input it is copied from, or a value int64 `[1]`."""


def to_canonical(at: Insertion, native: ir.Value, layout: Layout, sizes: Mapping[str, Dim], name: str) -> ir.Value:
    """Bring a tensor to the canonical axes.

    Args:
        at: Where the nodes are added.
        native: The tensor.
        layout: Its layout.
        sizes: Sizes of the letters that are folded into one axis (one of each fold may be left out), and of heads that
            are two axes, under `hg`.
        name: What the nodes are called.
    """
    if layout.is_canonical:
        return native
    value = native
    if _is_folded(layout):
        pieces: list[_Piece] = []
        for index, axis in enumerate(layout.axes):
            pieces += [(index,)] if len(axis) == 1 else [_number(sizes.get(letter)) for letter in axis]
        value = _reshape(at, value, pieces, f"{name}/split")
    value = _transpose(at, value, layout.permutation, f"{name}/ordered")
    if _is_merged(layout):
        groups, ordered = layout.groups, layout.ordered
        merged: list[_Piece] = [
            (ordered.index(group),) if len(group) == 1 else (-1 if group else 1) for group in groups
        ]
        if merged.count(-1) > 1:  # both maps and heads are two axes: the number of heads is known
            merged[1] = _number(sizes.get("hg"))
        value = _reshape(at, value, merged, f"{name}/canonical")
    return value


def from_canonical(
    at: Insertion, result: ir.Value, native: ir.Value, layout: Layout, sizes: Mapping[str, Dim], name: str
) -> ir.Value:
    """Bring a result with the canonical axes to the layout and shape of `native`; arguments as for `to_canonical`."""
    if layout.is_canonical:
        return result
    if _is_merged(layout):
        pieces: list[_Piece] = []
        for index, group in enumerate(layout.groups):
            if len(group) == 1:
                pieces.append((index,))
            for letter in group if len(group) > 1 else "":
                if letter in layout.axes:
                    pieces.append(axis_size(at, native, layout.axes.index(letter), f"{name}/{letter}"))
                else:
                    pieces.append(_number(sizes.get(letter)))
        result = _reshape(at, result, pieces, f"{name}/apart")
    inverse = [layout.permutation.index(axis) for axis in range(len(layout.permutation))]
    result = _transpose(at, result, inverse, f"{name}/reordered")
    if _is_folded(layout):
        own = layout.letters.index
        joined: list[_Piece] = [(own(axis),) if len(axis) == 1 else (-1 if axis else 1) for axis in layout.axes]
        result = _reshape(at, result, joined, f"{name}/native")
    return result


def _is_folded(layout: Layout) -> bool:
    return any(len(axis) != 1 for axis in layout.axes)


def _is_merged(layout: Layout) -> bool:
    return any(len(group) != 1 for group in layout.groups)


def _number(size: Dim) -> int:
    return size if isinstance(size, int) else -1


def _transpose(at: Insertion, value: ir.Value, perm: Sequence[int], name: str) -> ir.Value:
    if list(perm) == sorted(perm):
        return value
    return _typed_like(value, at.op("Transpose", value, name=name, attributes=[ir.AttrInt64s("perm", perm)]))


def _reshape(at: Insertion, value: ir.Value, pieces: Sequence[_Piece], name: str) -> ir.Value:
    """Reshape to sizes of which some are copied from the axes of `value`; Reshape itself copies in place (0).

    The sizes are not taken from the tensor that the result stands in for: one more use of that may cost it its bits in
    float16 (see `emission`).
    """
    fixed = [0 if piece == (index,) else piece for index, piece in enumerate(pieces)]
    if all(isinstance(piece, int) for piece in fixed):
        shape = at.constant(f"{name}/shape", np.array(fixed, np.int64))
        return _typed_like(value, at.op("Reshape", value, shape, name=name))
    parts = []
    for index, piece in enumerate(pieces):
        if isinstance(piece, int):
            parts.append(at.constant(f"{name}/size_{index}", np.array([piece], np.int64)))
        elif isinstance(piece, tuple):
            parts.append(axis_size(at, value, piece[0], f"{name}/size_{index}"))
        else:
            parts.append(piece)
    shape = at.op("Concat", *parts, name=f"{name}/shape", attributes=[ir.AttrInt64("axis", 0)])
    return _typed_like(value, at.op("Reshape", value, shape, name=name))


def _typed_like(value: ir.Value, moved: ir.Value) -> ir.Value:
    moved.type = value.type
    return moved


def axis_size(at: Insertion, value: ir.Value, axis: int, name: str) -> ir.Value:
    """The size of one axis, int64 `[1]`."""
    attributes = [ir.AttrInt64("start", axis), ir.AttrInt64("end", axis + 1)]
    return at.op("Shape", value, name=name, attributes=attributes)
