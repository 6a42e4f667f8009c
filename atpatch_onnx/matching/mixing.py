"""Talking heads: weights, and norms, that mix the heads of a map in front of its softmax or behind it.

Each pair of a query and a key is mixed for itself. So keys and values stay those of their tokens, and what replaces
them in front of the attention needs to know no more than which heads there were before.

Talking-heads attention, arXiv 2003.02436; so in CaiT, DeepViT and EfficientFormerV2.
"""

from collections.abc import Callable, Sequence
from math import prod

import onnx_ir as ir

from atpatch_onnx.matching.chains import followed
from atpatch_onnx.matching.linear import weight_of
from atpatch_onnx.matching.normalized import Normalized
from atpatch_onnx.matching.products import spelled_out
from atpatch_onnx.matching.view import View

_NORMS = {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"}
_GROWING = {"Mul", "Where", "Expand"}
_ASKED = {"Shape", "Size"}
_FARTHEST = 2**11
"""Nodes that positions are looked for behind: exporters write out how they are counted."""


def mixed_axis(node: ir.Node, index: int, view: View) -> int | None:
    """The only axis along which a node mixes the entries of an operand, by weights or a norm; None: it does not."""
    before, after = view.sizes(node.inputs[index]), view.sizes(node.outputs[0])
    if before is None or after is None or len(before) != len(after):
        return None
    axis = _axis(node, index, len(before), view)
    if axis is None or [*before[:axis], *before[axis + 1 :]] != [*after[:axis], *after[axis + 1 :]]:
        return None
    return axis


def _axis(node: ir.Node, index: int, rank: int, view: View) -> int | None:
    if node.op_type in _NORMS:
        last = node.attributes.get_int("axis", -1) % rank == rank - 1
        return rank - 1 if index == 0 and last else None
    if node.op_type in ("Conv", "BatchNormalization"):
        fixed = all(view.is_static(value) for value in node.inputs[1:])
        return 1 if index == 0 and rank > 2 and fixed and (node.op_type != "Conv" or view.is_pointwise(node)) else None
    if weight_of(node, view) != 1 - index or len(node.inputs) != 2:
        return None
    if node.op_type == "MatMul":
        return rank - 1 if index == 0 else rank - 2
    if node.op_type != "Einsum":
        return None
    terms, _, result = spelled_out(node, view).partition("->")
    own = terms.split(",")[index]
    gone, come = [letter for letter in own if letter not in result], [one for one in result if one not in own]
    fits = len(gone) == len(come) == 1 and own.replace(gone[0], come[0]) == result
    return own.index(gone[0]) if fits else None


def mixed_operand(node: ir.Node, view: View) -> tuple[int, int] | None:
    """Which operand of a node is mixed along an axis, and along which one; None where none is."""
    for index in range(min(len(node.inputs), 2)):
        axis = mixed_axis(node, index, view)
        if axis is not None and not view.is_static(node.inputs[index]):
            return index, axis
    return None


def behind(softmax: Normalized, view: View) -> Callable[[ir.Node, int, Sequence[ir.Node]], bool]:
    """Whether the way from a softmax to its values leads over a node, by way of this operand, after a path.

    It does where heads are mixed, where one of the pieces of a map is taken, and where the same is added for every
    input; no more once the map has weighed something larger.
    """
    rank = view.rank(softmax.weights) or 0

    def leads(node: ir.Node, index: int, path: Sequence[ir.Node]) -> bool:
        if _grown(softmax.weights, path, view):
            return False
        if node.op_type == "Add":
            return all(same_for_all(value, view) for value in node.inputs if value is not node.inputs[index])
        if node.op_type == "Gather":
            where = view.constant(node.inputs[1])
            return index == 0 and where is not None and where.size == 1
        axis = mixed_axis(node, index, view)
        queries_and_keys = [_where(own, path, view) for own in _last_two(softmax, rank)]
        return axis is not None and queries_and_keys != [] and not {axis, None} & {*queries_and_keys}

    return leads


def in_front(softmax: Normalized, view: View) -> Callable[[ir.Node, Sequence[ir.Node]], int | None]:
    """The operand by way of which scores lead back over a node that mixes heads, given the path behind it."""
    rank = view.rank(softmax.scores) or 0
    before = range(rank - 2) if _last_two(softmax, rank) else ()

    def operand(node: ir.Node, path: Sequence[ir.Node]) -> int | None:
        found = mixed_operand(node, view)
        if found is None:
            return None
        index, axis = found
        return index if _where(axis, path, view) in before else None

    return operand


def _last_two(softmax: Normalized, rank: int) -> tuple[int, ...]:
    """The axes of queries and keys, in whatever order, of a map that has them last; none of another."""
    last = (rank - 2, rank - 1)
    return last if rank > 2 and softmax.axis % rank in last else ()


def _where(axis: int, path: Sequence[ir.Node], view: View) -> int | None:
    """Where a path takes an axis; None where it does not stay one."""
    position: int | None = axis
    for step in path:
        position = None if position is None else followed(step, position, view)
    return position


def _grown(start: ir.Value, path: Sequence[ir.Node], view: View) -> bool:
    before = view.sizes(start)
    for step in path:
        after = view.sizes(step.outputs[0])
        if before is None or after is None or (step.op_type in _GROWING and prod(after) > prod(before)):
            return True
        before = after
    return False


def same_for_all(value: ir.Value | None, view: View) -> bool:
    """Whether a value depends on no input's entries, at most on how many there are, as what is told of positions."""
    pending, seen = [value], {value}
    while pending:
        current = pending.pop()
        if current is None or view.is_static(current):
            continue
        node = current.producer()
        if node is None or len(seen) > _FARTHEST:
            return False
        fresh = [] if node.op_type in _ASKED else [source for source in node.inputs if source not in seen]
        seen.update(fresh)
        pending += fresh
    return True
