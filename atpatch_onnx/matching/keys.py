"""Where the keys of decomposed attention meet the queries: which operand of the product, and which axis is which.

The axes are those of the map, followed back from the product with the values to the product of queries and keys.
"""

from collections.abc import Sequence, Set
from math import prod

import onnx_ir as ir

from atpatch_onnx.matching.mixing import mixed_operand
from atpatch_onnx.matching.pieces import MOVES, Part, Pieces, rebuilt, split_by_axes
from atpatch_onnx.matching.products import spelled_out
from atpatch_onnx.matching.view import View

_FARTHEST = 40
"""Nodes between the two products at most."""

_TRANSPOSED = (("transA",), ("transB",))


def keys_of(at: Pieces, scores: ir.Node, path: Sequence[ir.Node], view: View) -> Pieces | None:
    """Where the keys are in the operand that they are of `scores`; None where it cannot be told.

    Args:
        at: The letters of the map where it meets the values.
        scores: The product of queries and keys.
        path: Nodes between both, among them all that mix heads.
        view: The graph.
    """
    mixing = {node for node in path if mixed_operand(node, view) is not None}
    for _ in range(_FARTHEST):
        node = at.value.producer()
        if node is scores:
            return _operand(at, scores, view)
        following = None if node is None else _before(at, node, scores, mixing, view)
        if following is None:
            return None
        at = following
    return None


def _before(at: Pieces, node: ir.Node, scores: ir.Node, mixing: Set[ir.Node], view: View) -> Pieces | None:
    """The same entries in the operand of a node that leads on to the scores."""
    if node in mixing:
        return _unmixed(at, node, view)
    shape = view.sizes(at.value)
    sources = [value for value in node.inputs if value is not None and _leads_to(value, scores, mixing)]
    source = next((value for value in sources if view.sizes(value) == shape), sources[0] if sources else None)
    sizes = None if source is None else view.sizes(source)
    if shape is None or source is None or sizes is None:
        return None
    if node.op_type == "Concat":  # a sink beside the keys, cut off again behind the softmax
        apart = split_by_axes(at, shape)
        return None if apart is None else rebuilt(source, *apart, sizes)
    if node.op_type in MOVES and source is node.inputs[0]:
        return MOVES[node.op_type](at, node, shape, view)
    if sizes == shape:
        return Pieces(source, at.start, at.pieces)
    apart = split_by_axes(at, shape)  # broadcast over axes that the scores do not have
    lead = len(shape) - len(sizes)
    if apart is None or lead < 0 or any(part.axis < lead and part.size > 1 for part in apart[1]):
        return None
    kept = [Part(part.letter, part.axis - lead, part.step, part.size) for part in apart[1] if part.axis >= lead]
    fits = all(sizes[part.axis] == shape[part.axis + lead] for part in kept)
    return rebuilt(source, apart[0][lead:], kept, sizes) if fits else None


def _unmixed(at: Pieces, node: ir.Node, view: View) -> Pieces | None:
    """What some heads are mixed of: all heads, of the same queries and keys."""
    found, shape = mixed_operand(node, view), view.sizes(at.value)
    apart = None if shape is None else split_by_axes(at, shape)
    if found is None or apart is None:
        return None
    index, axis = found
    source, (start, parts) = node.inputs[index], apart
    sizes = view.sizes(source)
    if source is None or sizes is None or any(part.letter not in "hg" for part in _on(axis, parts) if part.size > 1):
        return None
    kept = [part for part in parts if part not in _on(axis, parts)]
    start[axis] = 0
    return rebuilt(source, start, [*kept, Part("h", axis, 1, sizes[axis])], sizes)


def _on(axis: int, parts: Sequence[Part]) -> list[Part]:
    return [part for part in parts if part.axis == axis]


def _leads_to(value: ir.Value, node: ir.Node, mixing: Set[ir.Node]) -> bool:
    """Whether a value is computed from what a node gives, by other nodes than products; its shape and type apart.

    Products that mix heads lead on.
    """
    pending, seen = [value], {value}
    while pending and len(seen) < 4 * _FARTHEST:
        producer = pending.pop(0).producer()
        if producer is node:
            return True
        ends = producer is None or producer.op_type in ("MatMul", "Gemm", "Conv", "Shape", "Size")
        if producer is None or (ends and producer not in mixing):
            continue
        sources = producer.inputs[:1] if producer.op_type == "CastLike" else producer.inputs
        fresh = [source for source in sources if source is not None and source not in seen]
        seen.update(fresh)
        pending += fresh
    return False


def _operand(at: Pieces, scores: ir.Node, view: View) -> Pieces | None:
    shape = view.sizes(at.value)
    apart = None if shape is None else split_by_axes(at, shape)
    if shape is None or apart is None:
        return None
    parts = [part for part in apart[1] if part.letter != "q"]
    places = {part.axis for part in parts if part.letter == "k"}
    if len(places) != 1:
        return None
    if prod(shape[-2:]) == 1:  # one query, one key: flat indices do not tell the axes apart, and softmax has the last
        places = {len(shape) - 1}
    place = places.pop()
    if scores.op_type == "Einsum":
        return _of_einsum(scores, apart[0], parts, place, view)
    return _of_product(scores, apart[0], parts, place, shape, view)


def _of_product(
    scores: ir.Node, start: Sequence[int], parts: Sequence[Part], place: int, shape: Sequence[int], view: View
) -> Pieces | None:
    index = {len(shape) - 1: 1, len(shape) - 2: 0}.get(place)
    operand = None if index is None else scores.inputs[index]
    sizes = None if operand is None else view.sizes(operand)
    named = {name for name in scores.attributes if scores.attributes[name].type is ir.AttributeType.INT}
    set_ = {name for name in named if scores.attributes[name].as_int()}
    if index is None or operand is None or sizes is None or any(name.startswith("transBatch") for name in set_):
        return None
    rank = len(sizes)
    last_is_token = (index == 1) != bool(set_ & set(_TRANSPOSED[index]))
    token, depth = (rank - 1, rank - 2) if last_is_token else (rank - 2, rank - 1)
    found, begin = [Part("d", depth, 1, sizes[depth])], [0] * rank
    begin[token] = start[place]
    for own in range(rank - 2):
        begin[own] = start[own + len(shape) - rank] if sizes[own] > 1 else 0
    for part in parts:
        own = part.axis - (len(shape) - rank)
        if part.letter == "k":
            found.append(Part("k", token, part.step, part.size))
        elif own < 0 or sizes[own] == 1 < shape[part.axis]:
            if part.letter == "n":
                return None
        else:
            found.append(Part(part.letter, own, part.step, part.size))
    return rebuilt(operand, begin, found, sizes)


def _of_einsum(scores: ir.Node, start: Sequence[int], parts: Sequence[Part], place: int, view: View) -> Pieces | None:
    terms, _, result = spelled_out(scores, view).partition("->")
    operands = terms.split(",")
    if len(operands) != 2 or place >= len(result):
        return None
    index = 0 if result[place] in operands[0] else 1
    term, operand = operands[index], scores.inputs[index]
    sizes = None if operand is None else view.sizes(operand)
    depth = [letter for letter in term if letter in operands[1 - index] and letter not in result]
    if operand is None or sizes is None or len(sizes) != len(term) or len(depth) != 1:
        return None
    found = [Part("d", term.index(depth[0]), 1, sizes[term.index(depth[0])])]
    found += [
        Part(part.letter, term.index(result[part.axis]), part.step, part.size)
        for part in parts
        if result[part.axis] in term
    ]
    begin = [start[result.index(letter)] if letter in result else 0 for letter in term]
    return rebuilt(operand, begin, found, sizes)
