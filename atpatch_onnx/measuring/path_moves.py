"""How far something reaches through nodes that move entries: what is moved, is moved alike in what is reached.

A node is not followed where its places are not constant, or where it parts or joins the samples with anything else.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.measuring.path_values import (
    SAMPLES,
    Rule,
    Sizes,
    Told,
    UnfollowedError,
    broadcast,
    computed,
    constant,
    nowhere,
    number,
    numbers,
    operand,
    plain,
    sizes_of,
)

Array = NDArray[Any]


def _moved(one: Told, sizes: Sizes, move: Any) -> Told:
    """What is moved in the same way in all that is told of it."""
    return Told(sizes, np.asarray(move(one.reached)), None if one.known is None else np.asarray(move(one.known)))


def _shape(one: Told) -> list[int | None]:
    """A shape that the graph has computed."""
    if one.known is None or None in sizes_of(one):
        raise UnfollowedError
    return [None if size == SAMPLES else int(size) for size in one.known.reshape(-1)]


def _reshape(node: ir.Node, operands: Sequence[Told | None]) -> list[Told]:
    first, wanted = operand(operands, 0), _shape(operand(operands, 1))
    before = sizes_of(first)
    if not number(node, "allowzero", 0):
        if any(size == 0 and axis >= len(before) for axis, size in enumerate(wanted)):
            raise UnfollowedError
        wanted = [before[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    return [_reshaped(first, wanted)]


def _reshaped(first: Told, wanted: Sequence[int | None]) -> Told:
    """With other axes, -1 for what is left; the samples stay an axis, with as many entries before and behind them."""
    before, after = sizes_of(first), list(wanted)
    if after.count(-1) > 1 or before.count(None) > 1:
        raise UnfollowedError
    if -1 in after:
        known, place = prod(size for size in after if size not in (None, -1)), after.index(-1)
        whole = prod(plain(before))
        if None in after or None not in before:
            after[place] = whole // known if known else 0
        elif whole == known:
            after[place] = None
        else:
            raise UnfollowedError
    if after.count(None) != before.count(None) or prod(plain(before)) != prod(plain(after)):
        raise UnfollowedError
    if None in before and prod(plain(before)[: before.index(None)]) != prod(plain(after)[: after.index(None)]):
        raise UnfollowedError
    return _moved(first, tuple(after), lambda array: array.reshape(plain(after)))


def _flatten(node: ir.Node, operands: Sequence[Told | None]) -> list[Told]:
    first = operand(operands, 0)
    sizes, axis = sizes_of(first), number(node, "axis", 1)
    axis += len(sizes) * (axis < 0)

    def joined(part: Sizes) -> int | None:
        if None in part and prod(plain(part)) != 1:
            raise UnfollowedError
        return None if None in part else prod(plain(part))

    return [_reshaped(first, [joined(sizes[:axis]), joined(sizes[axis:])])]


def _transpose(node: ir.Node, operands: Sequence[Told | None]) -> list[Told]:
    first = operand(operands, 0)
    order = numbers(node, "perm", (), 0) or list(reversed(range(len(sizes_of(first)))))
    sizes = tuple(sizes_of(first)[axis] for axis in order)
    return [_moved(first, sizes, lambda array: array.transpose(order))]


def _squeeze(node: ir.Node, operands: Sequence[Told | None]) -> list[Told]:
    first = operand(operands, 0)
    axes, sizes = numbers(node, "axes", operands, 1), sizes_of(first)
    if axes is None:
        raise UnfollowedError
    gone = {axis % len(sizes) for axis in axes}
    if any(sizes[axis] != 1 for axis in gone):
        raise UnfollowedError
    left = tuple(size for axis, size in enumerate(sizes) if axis not in gone)
    return [_moved(first, left, lambda array: array.reshape(plain(left)))]


def _unsqueeze(node: ir.Node, operands: Sequence[Told | None]) -> list[Told]:
    first, axes = operand(operands, 0), numbers(node, "axes", operands, 1)
    if axes is None:
        raise UnfollowedError
    rank = len(sizes_of(first)) + len(axes)
    new, old = {axis % rank for axis in axes}, iter(sizes_of(first))
    sizes: Sizes = tuple(1 if axis in new else next(old) for axis in range(rank))
    return [_moved(first, sizes, lambda array: array.reshape(plain(sizes)))]


def _slice(node: ir.Node, operands: Sequence[Told | None]) -> list[Told]:
    first = operand(operands, 0)
    starts, ends = numbers(node, "starts", operands, 1), numbers(node, "ends", operands, 2)
    axes, steps = numbers(node, "axes", operands, 3), numbers(node, "steps", operands, 4)
    sizes = list(sizes_of(first))
    if starts is None or ends is None:
        raise UnfollowedError
    cuts = [slice(None)] * len(sizes)
    for place, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = (place if axes is None else axes[place]) % len(sizes)
        step, size = 1 if steps is None else steps[place], sizes[axis]
        if size is None or step < 1:
            raise UnfollowedError
        cuts[axis] = slice(start, end, step)
        sizes[axis] = len(range(size)[cuts[axis]])
    return [_moved(first, tuple(sizes), lambda array: array[tuple(cuts)])]


def _split(node: ir.Node, operands: Sequence[Told | None]) -> list[Told]:
    first, count = operand(operands, 0), len(node.outputs)
    sizes = sizes_of(first)
    axis = number(node, "axis", 0) % len(sizes)
    size = sizes[axis]
    if size is None:
        raise UnfollowedError
    parts = numbers(node, "split", operands, 1)
    if parts is None:
        each = -(-size // count)
        parts = [min(each, size - each * index) for index in range(count)]
    if sum(parts) != size or len(parts) != count or min(parts) < 0:
        raise UnfollowedError
    ends = np.cumsum(parts)
    return [
        _moved(
            first,
            (*sizes[:axis], part, *sizes[axis + 1 :]),
            lambda array, end=end, part=part: array.take(range(end - part, end), axis),
        )
        for part, end in zip(parts, ends.tolist(), strict=True)
    ]


def _concat(node: ir.Node, operands: Sequence[Told | None]) -> list[Told]:
    given = [one for one in operands if one is not None]
    shapes = [sizes_of(one) for one in given]
    axis = number(node, "axis", 0) % len(shapes[0])
    others = {(*sizes[:axis], *sizes[axis + 1 :]) for sizes in shapes}
    if len(others) > 1 or any(sizes[axis] is None for sizes in shapes):
        raise UnfollowedError
    size = sum(plain(sizes)[axis] for sizes in shapes)
    sizes = (*shapes[0][:axis], size, *shapes[0][axis + 1 :])
    known = [one.known for one in given if one.known is not None]
    return [
        Told(
            sizes,
            np.concatenate([one.reached for one in given], axis),
            np.concatenate(known, axis) if len(known) == len(given) else None,
        )
    ]


def _gather(node: ir.Node, operands: Sequence[Told | None]) -> list[Told]:
    """The same places of every sample; where they are not constant, any place."""
    first, which = operand(operands, 0), operand(operands, 1)
    sizes, found = sizes_of(first), sizes_of(which)
    axis = number(node, "axis", 0) % len(sizes)
    result = (*sizes[:axis], *found, *sizes[axis + 1 :])
    size = sizes[axis]
    if result.count(None) > 1 or size is None:
        raise UnfollowedError
    places = None if which.known is None else which.known.astype(np.int64)
    if places is not None and which.clean and bool(((places >= -size) & (places < size)).all()):
        return [_moved(first, result, lambda array: np.take(array, places, axis))]
    before, behind = (1,) * axis, (1,) * (len(sizes) - axis - 1)
    from_any = first.reached.any(axis=axis).reshape(*plain(sizes[:axis]), *[1] * len(found), *plain(sizes[axis + 1 :]))
    by_places = which.reached.reshape(*before, *plain(found), *behind)
    return [Told(result, np.asarray(np.broadcast_to(from_any | by_places, plain(result))))]


def _gather_nd(node: ir.Node, operands: Sequence[Told | None]) -> list[Told]:
    """Constant places on the first axes."""
    first, which = operand(operands, 0), operand(operands, 1)
    sizes, found = sizes_of(first), sizes_of(which)
    depth = found[-1]
    if which.known is None or None in found or depth is None or None in sizes[:depth] or number(node, "batch_dims", 0):
        raise UnfollowedError
    places = tuple(np.moveaxis(which.known.astype(np.int64), -1, 0))
    return [_moved(first, (*found[:-1], *sizes[depth:]), lambda array: array[places])]


def _expand(node: ir.Node, operands: Sequence[Told | None]) -> list[Told]:
    first = operand(operands, 0)
    sizes = broadcast(sizes_of(first), tuple(_shape(operand(operands, 1))))
    return [_moved(first, sizes, lambda array: np.broadcast_to(array, plain(sizes)))]


def _tile(node: ir.Node, operands: Sequence[Told | None]) -> list[Told]:
    first, times = operand(operands, 0), numbers(node, "", operands, 1)
    before = sizes_of(first)
    if times is None or any(size is None and count != 1 for size, count in zip(before, times, strict=True)):
        raise UnfollowedError
    sizes = tuple(None if size is None else size * count for size, count in zip(before, times, strict=True))
    return [_moved(first, sizes, lambda array: np.tile(array, times))]


def _shape_of(node: ir.Node, operands: Sequence[Told | None]) -> list[Told]:
    sizes = sizes_of(operand(operands, 0))
    start, end = number(node, "start", 0), number(node, "end", len(sizes))
    found = np.array([SAMPLES if size is None else size for size in sizes][start:end], np.int64)
    return [Told((len(found),), np.zeros(len(found), np.bool_), found)]


def _constant(node: ir.Node, operands: Sequence[Told | None]) -> list[Told]:
    found = computed(node, ())
    if found is None:
        raise UnfollowedError
    return [constant(found)]


def _filled(node: ir.Node, operands: Sequence[Told | None]) -> list[Told]:
    """`ConstantOfShape`: which number it is does not matter."""
    return [nowhere(tuple(_shape(operand(operands, 0))))]


def _range(node: ir.Node, operands: Sequence[Told | None]) -> list[Told]:
    found = computed(node, operands)
    if found is None:
        raise UnfollowedError
    return [constant(found)]


MOVES: Mapping[str, Rule] = {
    "Concat": _concat,
    "Constant": _constant,
    "ConstantOfShape": _filled,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "GatherND": _gather_nd,
    "Range": _range,
    "Reshape": _reshape,
    "Shape": _shape_of,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
"""By operator."""
