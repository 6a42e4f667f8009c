"""Which entries of a tensor are the keys (or values) of a site: followed back through the graph.

Every key entry has coordinates: map `n`, head `h` (`g`: heads that share it), token `k`, depth `d`. In a tensor
further back it lies at the flat index `start + sum of stride * coordinate`. A Reshape leaves that as it is;
Transpose, Slice, Split, Gather and Concat move it; an Expand drops a letter. What is no move but works on each token
and head alone, such as a rotary embedding or a norm of the keys, is stepped over as a whole (`blocks`).

Sizes are numbers here; of a graph with symbolic sizes, those of the first trial (`matching.shapes`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import onnx_ir as ir

from atpatch_onnx.matching.blocks import over_a_block
from atpatch_onnx.matching.layout import Layout
from atpatch_onnx.matching.view import View


@dataclass(frozen=True)
class Piece:
    """`size` entries at flat distances of `stride`; one letter may have several pieces, the outer ones first."""

    letter: str
    stride: int
    size: int


@dataclass(frozen=True)
class Part:
    """A piece, or a part of one, that lies on one axis of a tensor: `size` entries, `step` apart on that axis."""

    letter: str
    axis: int
    step: int
    size: int


@dataclass(frozen=True)
class Pieces:
    """Where the keys (or values) of a site are in a tensor."""

    value: ir.Value
    start: int
    pieces: tuple[Piece, ...]


def from_layout(value: ir.Value, layout: str, sizes: Mapping[str, int], view: View) -> Pieces | None:
    """All of a tensor, laid out as a pattern says; None where that does not fit its shape.

    Args:
        value: The tensor.
        layout: See `layout`.
        sizes: Of letters that are folded into one axis; one of each fold may be left out.
        view: The graph.
    """
    shape, axes = view.sizes(value), Layout.parse(layout).axes
    if shape is None or len(shape) != len(axes):
        return None
    parts: list[Part] = []
    for axis, letters in enumerate(axes):
        known = [sizes.get(letter) if len(letters) > 1 else shape[axis] for letter in letters]
        if known.count(None) > 1:
            return None
        rest = shape[axis] // max(prod(size for size in known if size), 1)
        own = [rest if size is None else size for size in known]
        if letters and prod(own) != shape[axis]:
            return None
        inner = [prod(own[index + 1 :]) for index in range(len(own))]
        parts += [
            Part(_UNITED.get(each, each), axis, step, size)
            for each, step, size in zip(letters, inner, own, strict=True)
        ]
    return rebuilt(value, [0] * len(shape), parts, shape)


_UNITED = {"b": "n", "w": "n"}
"""Samples and their parts are maps."""


def steps_back(first: Pieces, view: View) -> Iterator[tuple[Pieces, tuple[ir.Node, ...]]]:
    """The same entries in every tensor further back, the first one included, and the nodes stepped over until there.

    It ends where a projection, or anything else that is no move, computes them.
    """
    current: Pieces | None = first
    passed: tuple[ir.Node, ...] = ()
    while current is not None:
        yield current, passed
        current, nodes = _step(current, view)
        passed = (*passed, *nodes)


_Step = tuple[Pieces | None, Sequence[ir.Node]]
"""The entries one step further back, and the nodes stepped over; None where there is no such step."""

_NO_STEP: _Step = (None, ())


def _step(at: Pieces, view: View) -> _Step:
    node, shape = at.value.producer(), view.sizes(at.value)
    if node is None or shape is None or not node.inputs or node.inputs[0] is None or node.graph is not view.model.graph:
        return _NO_STEP
    if node.domain == "" and node.op_type in MOVES:
        moved = MOVES[node.op_type](at, node, shape, view)
        if moved is not None:
            return moved, (node,)
    scaled = _scaled(node, shape, view)
    if scaled is not None:
        return replace(at, value=scaled), (node,)
    source, nodes = over_a_block(at.value, shape, view)
    return (None if source is None else replace(at, value=source)), nodes


def _scaled(node: ir.Node, shape: Sequence[int], view: View) -> ir.Value | None:
    """What a number scales, where the node does that."""
    if node.domain != "" or node.op_type not in ("Mul", "Div"):
        return None
    for operand, other in zip(node.inputs, reversed(node.inputs), strict=True):
        single = other is not None and view.is_static(other) and prod(view.sizes(other) or ()) == 1
        if single and operand is not None and view.sizes(operand) == tuple(shape):
            return operand
        if node.op_type == "Div":
            return None
    return None


# Flat indices and axes


def split_by_axes(at: Pieces, shape: Sequence[int]) -> tuple[list[int], list[Part]] | None:
    """The coordinates of the start, and the pieces cut such that each lies on one axis; None where that fails."""
    if 0 in shape:
        return None
    start, rest = [], at.start
    for axis in range(len(shape)):
        inner = prod(shape[axis + 1 :])
        start.append(rest // inner)
        rest %= inner
    found: list[Part] = []
    for piece in at.pieces:
        parts = _on_axes(piece, shape)
        if parts is None:
            return None
        found += parts
    return start, found


def _on_axes(piece: Piece, shape: Sequence[int]) -> list[Part] | None:
    inner = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    if piece.size == 1:  # on an axis of one entry with this stride, if there is one
        lone = [axis for axis, extent in enumerate(shape) if extent == 1 and inner[axis] == piece.stride]
        others = [axis for axis in range(len(shape)) if inner[axis] <= piece.stride]
        axis = [*lone, *others, len(shape) - 1][0]
        return [Part(piece.letter, axis, max(piece.stride // max(inner[axis], 1), 1), 1)]
    low, high, parts = piece.stride, piece.stride * piece.size, []
    for axis, extent in enumerate(shape):
        begin, end = max(low, inner[axis]), min(high, inner[axis] * extent)
        if begin >= end:
            continue
        if end % begin or begin % low or begin % inner[axis]:
            return None
        parts.append(Part(piece.letter, axis, begin // inner[axis], end // begin))
    return parts if prod(part.size for part in parts) == piece.size else None


def rebuilt(value: ir.Value, start: Sequence[int], parts: Sequence[Part], shape: Sequence[int]) -> Pieces:
    """The reverse of `split_by_axes`, in a tensor of this shape."""
    strides = [prod(shape[axis + 1 :]) for axis in range(len(shape))]
    flat = sum(at * stride for at, stride in zip(start, strides, strict=True))
    return Pieces(value, flat, tuple(Piece(part.letter, part.step * strides[part.axis], part.size) for part in parts))


# The moves: each answers the same entries in its first input, or None


def flat(at: Pieces, node: ir.Node, shape: Sequence[int], view: View) -> Pieces | None:
    """Reshape and the like: flat indices stay what they are."""
    source = node.inputs[0]
    before = None if source is None else view.sizes(source)
    return None if source is None or before is None or prod(before) != prod(shape) else replace(at, value=source)


def transposed(at: Pieces, node: ir.Node, shape: Sequence[int], view: View) -> Pieces | None:
    """Transpose."""
    apart, source = split_by_axes(at, shape), node.inputs[0]
    if apart is None or source is None:
        return None
    start, parts = apart
    perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(len(shape))[::-1]
    before, begin = [0] * len(shape), [0] * len(shape)
    for axis, own in enumerate(perm):
        before[own], begin[own] = shape[axis], start[axis]
    return rebuilt(source, begin, [replace(part, axis=perm[part.axis]) for part in parts], before)


def cut(at: Pieces, node: ir.Node, shape: Sequence[int], view: View) -> Pieces | None:
    """Split, Slice, and Gather of one entry: the same entries, further along."""
    source = node.inputs[0]
    before = None if source is None else view.sizes(source)
    if source is None or before is None:
        return None
    offsets = _OFFSETS[node.op_type](at, node, before, view)
    if offsets is None:
        return None
    if node.op_type == "Gather":  # a single index takes the axis away, which changes no flat index
        shape = [1 if offset is not None else extent for extent, offset in zip(before, offsets, strict=True)]
    apart = split_by_axes(at, shape)
    if apart is None:
        return None
    start, parts = apart
    return rebuilt(source, [one + (other or 0) for one, other in zip(start, offsets, strict=True)], parts, before)


_Offsets = list[int | None] | None
"""How far along each axis a cut begins; None of an axis that is not cut."""


def _of_gather(at: Pieces, node: ir.Node, before: Sequence[int], view: View) -> _Offsets:
    where, axis = view.constant(node.inputs[1]), _axis(node, len(before))
    if where is None or where.size != 1 or view.is_static(node.inputs[0]):
        return None
    return [int(where.reshape(-1)[0]) % extent if own == axis else None for own, extent in enumerate(before)]


def _of_split(at: Pieces, node: ir.Node, before: Sequence[int], view: View) -> _Offsets:
    axis, earlier = _axis(node, len(before)), 0
    for output in node.outputs:
        if output is at.value:
            return [earlier if own == axis else None for own in range(len(before))]
        sizes = view.sizes(output)
        if sizes is None:
            return None
        earlier += sizes[axis]
    return None


def _of_slice(at: Pieces, node: ir.Node, before: Sequence[int], view: View) -> _Offsets:
    inputs = [*node.inputs, None, None, None][1:5]
    given = [None if value is None else view.constant(value) for value in inputs]
    starts, _, axes, steps = given
    unread = [value is not None and content is None for value, content in zip(inputs[2:], given[2:], strict=True)]
    if starts is None or any(unread) or (steps is not None and set(steps.reshape(-1).tolist()) != {1}):
        return None
    chosen = range(starts.size) if axes is None else axes.reshape(-1).tolist()
    offsets: list[int | None] = [None] * len(before)
    for begin, axis in zip(starts.reshape(-1).tolist(), chosen, strict=True):
        extent = before[axis]
        offsets[axis % len(before)] = min(begin, extent) if begin >= 0 else max(begin + extent, 0)
    return offsets


_OFFSETS: Mapping[str, Callable[[Pieces, ir.Node, Sequence[int], View], _Offsets]] = {
    "Gather": _of_gather,
    "Split": _of_split,
    "Slice": _of_slice,
}


def _axis(node: ir.Node, rank: int) -> int:
    return (node.attributes["axis"].as_int() if "axis" in node.attributes else 0) % rank


def expanded(at: Pieces, node: ir.Node, shape: Sequence[int], view: View) -> Pieces | None:
    """Expand: copies for heads that share keys go; copies for maps or tokens are not followed."""
    source = node.inputs[0]
    given, apart = (None if source is None else view.sizes(source)), split_by_axes(at, shape)
    if source is None or given is None or apart is None:
        return None
    before = [1] * (len(shape) - len(given)) + list(given)
    copied = [old == 1 < new for old, new in zip(before, shape, strict=True)]
    start, parts = apart
    if any(copied[part.axis] and part.letter in "nkd" for part in parts):
        return None
    begin = [0 if copied[axis] else own for axis, own in enumerate(start)]
    return rebuilt(source, begin, [part for part in parts if not copied[part.axis]], before)


def joined(at: Pieces, node: ir.Node, shape: Sequence[int], view: View) -> Pieces | None:
    """Concat: what joins a cache; else the operand in which all of the entries lie."""
    axis, apart = _axis(node, len(shape)), split_by_axes(at, shape)
    operands = [value for value in node.inputs if value is not None]
    sizes = [view.sizes(value) for value in operands]
    if apart is None or any(size is None for size in sizes):
        return None
    start, parts = apart
    own, known = [part for part in parts if part.axis == axis], [size for size in sizes if size is not None]
    if [(part.letter, part.step, part.size) for part in own] == [("k", 1, shape[axis])]:
        if len(operands) != 2 or not _is_cache(operands[0], view) or _is_cache(operands[1], view):
            return None
        new = [replace(part, size=known[1][axis]) if part.axis == axis else part for part in parts]
        return rebuilt(operands[1], start, new, known[1])
    low, before = start[axis], 0
    high = low + sum(part.step * (part.size - 1) for part in own) + 1
    for operand, size in zip(operands, known, strict=True):
        if before <= low and high <= before + size[axis]:
            return rebuilt(operand, [*start[:axis], low - before, *start[axis + 1 :]], parts, size)
        before += size[axis]
    return None


_MOVED = 8
"""How many nodes may stand between a cache and where the new tokens join it: beams reorder it, for one."""


def _is_cache(value: ir.Value, view: View) -> bool:
    """Whether a tensor is an input of the model, moved at most."""
    for _ in range(_MOVED):
        node = value.producer()
        if node is None:
            return value.is_graph_input() and not view.is_static(value)
        if node.op_type not in MOVES or node.inputs[0] is None:
            return False
        value = node.inputs[0]
    return False


MOVES: Mapping[str, Callable[[Pieces, ir.Node, Sequence[int], View], Pieces | None]] = {
    **dict.fromkeys(("Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Cast", "CastLike", "Dropout"), flat),
    **dict.fromkeys(("QuantizeLinear", "DequantizeLinear"), flat),
    **dict.fromkeys(("Split", "Slice", "Gather"), cut),
    "Transpose": transposed,
    "Expand": expanded,
    "Concat": joined,
}
