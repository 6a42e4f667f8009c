"""Where the axes of a tensor come from: the samples, the features of a linear layer, or something else.

Exporters fold heads, windows and channels into the batch. Sizes alone do not tell an axis of 2 samples x 4 heads from
one of 2 samples x 4 windows. So the axis is followed back through the graph: a Reshape takes it apart into factors, a
Transpose moves them, and each factor ends at a model input's axis of samples, at the output features of a linear
layer (heads), at an Expand (copies, for samples or heads) or elsewhere (parts: windows, channels, positions).

Sizes are numbers here; of a graph with symbolic sizes, those of the first trial (`matching.shapes`).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import prod

import onnx_ir as ir

from atpatch_onnx.matching.linear import LINEAR
from atpatch_onnx.matching.view import View


class Source(StrEnum):
    """What a factor of an axis is; the value is its letter in a layout."""

    SAMPLES = "b"
    HEADS = "h"
    PARTS = "w"
    REPEATS = "r"
    """Copies: of a learned token for each sample, or of keys and values for each head that shares them."""


@dataclass(frozen=True)
class Factor:
    """A factor of an axis; the outer ones come first."""

    size: int
    source: Source


@dataclass(frozen=True)
class _Piece:
    """Entries of a tensor at flat distances that are multiples of `stride`, `size` of them."""

    value: ir.Value
    stride: int
    size: int


@dataclass(frozen=True)
class _Alternatives:
    """Pieces of several operands, each of which may be where a piece comes from."""

    pieces: tuple[_Piece, ...]


_Answer = Source | Sequence[_Piece | Factor] | _Alternatives | None
"""Where a piece comes from, what it is made of, or what it may come from; None: not known."""

_At = Callable[[ir.Value | None, int], _Alternatives | None]
"""The same piece on an axis of an input."""

_FLAT = {"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "QuantizeLinear", "DequantizeLinear"}
_BROADCASTING = {"Add", "Sub", "Mul", "Div", "Pow", "Where", "Min", "Max", "Sum", "Mean"}
_CUTS = {"Slice", "Split", "Concat", "Pad"}
_LIKE_INPUT = {"LabelEncoder", "MoE", "QMoE"}
_POOLS = {"Conv", "FusedConv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "ConvInteger"}


def factors(value: ir.Value, axis: int, view: View) -> tuple[Factor, ...] | None:
    """The factors of an axis, outer ones first, neighbours of one source merged; None where they cannot be told."""
    if (str(value.name), axis) not in view.told:
        view.told[str(value.name), axis] = _factors(value, axis, view)
    known: tuple[Factor, ...] | None = view.told[str(value.name), axis]
    return known


def _factors(value: ir.Value, axis: int, view: View) -> tuple[Factor, ...] | None:
    shape = view.sizes(value)
    if shape is None:
        return None
    found = _all_of([_Piece(value, prod(shape[axis + 1 :]), shape[axis])], view)
    if found is None:
        return None
    merged: list[Factor] = []
    for factor in found:
        if merged and merged[-1].source is factor.source:
            factor = Factor(merged.pop().size * factor.size, factor.source)
        merged.append(factor)
    return tuple(merged)


def roots(starts: Iterable[tuple[ir.Value, int]], view: View) -> frozenset[tuple[str, int]]:
    """The axes of the model's inputs that any of these axes comes from, along every operand that may carry it."""
    found: set[tuple[str, int]] = set()
    shaped = [(value, axis, view.sizes(value)) for value, axis in starts]
    pending: list[_Piece | Factor] = [
        _Piece(value, prod(shape[axis + 1 :]), shape[axis]) for value, axis, shape in shaped if shape is not None
    ]
    seen: set[_Piece | Factor] = set()
    while pending:
        piece = pending.pop()
        if piece in seen or piece.size == 1 or isinstance(piece, Factor):
            continue
        seen.add(piece)
        given = piece.value.producer() is None and not view.is_static(piece.value)
        apart = _apart(piece, view.sizes(piece.value) or ()) if given else None
        if apart is not None and len(apart) == 1:
            found.add((str(piece.value.name), apart[0][0]))
            continue
        answer = _step(piece, view)
        if isinstance(answer, _Alternatives):
            pending += answer.pieces
        elif answer is not None and not isinstance(answer, Source):
            pending += answer
    return frozenset(found)


def _search(start: _Piece, view: View) -> tuple[Factor, ...] | None:
    """Follow a piece back along every operand that may carry it, until one leads to the samples, without copies.

    Else the best answer: a class token, copied for each sample or frame, stands beside the patches of the image in one
    Concat, and the patches tell.
    """
    best: tuple[Factor, ...] | None = None
    pending, seen = [start], set()
    while pending:
        piece = pending.pop()
        if piece in seen:
            continue
        seen.add(piece)
        answer = _step(piece, view)
        if answer is None:
            continue
        if isinstance(answer, _Alternatives):
            pending.extend(reversed(answer.pieces))
            continue
        if isinstance(answer, Source):
            found: tuple[Factor, ...] | None = (Factor(piece.size, answer),)
        else:
            found = _all_of(answer, view)
        if found is not None and (best is None or _clarity(found) > _clarity(best)):
            best = found
            if _clarity(best) == (True, True):
                break
    return best


def _clarity(found: Sequence[Factor]) -> tuple[bool, bool]:
    """Whether an answer names the samples, and whether it names no copies."""
    sources = {factor.source for factor in found}
    return Source.SAMPLES in sources, Source.REPEATS not in sources


def _all_of(pieces: Sequence[_Piece | Factor], view: View) -> tuple[Factor, ...] | None:
    """The factors of several pieces, one after the other; of sizes of one there is nothing to tell."""
    found = [(piece,) if isinstance(piece, Factor) else _search(piece, view) for piece in pieces if piece.size > 1]
    return None if None in found else tuple(factor for factors in found for factor in factors or ())


def _step(piece: _Piece, view: View) -> _Answer:
    """One node further back: the source of the piece, or the pieces of the node's inputs that it comes from."""
    value, node = piece.value, piece.value.producer()
    shape = view.sizes(value)
    if shape is None:
        return None
    apart = _apart(piece, shape)
    if apart is None:
        return None
    if len(apart) > 1:
        return [_Piece(value, stride, size) for _, stride, size in apart]
    axis, stride, size = apart[0]
    if view.is_static(value):
        return Source.PARTS
    if node is None:
        is_batch = axis == view.batch.get(str(value.name), 0)
        alone = all(len(view.shape(other) or ()) < 2 for other in view.model.graph.inputs)
        return Source.SAMPLES if is_batch and (len(shape) > 1 or alone) else Source.PARTS
    source = node.inputs[0] if node.inputs else None
    if source is None:
        return None
    if node.op_type in _FLAT:
        return _Alternatives((_Piece(source, stride, size),))
    inner = stride // prod(shape[axis + 1 :])
    return _through(node, value, shape, axis, inner, size, view)


def _through(
    node: ir.Node, value: ir.Value, shape: Sequence[int], axis: int, inner: int, size: int, view: View
) -> _Answer:
    """The same of a node that may change sizes; the piece lies within one axis, `inner` entries apart."""

    def at(source: ir.Value | None, index: int) -> _Alternatives | None:
        sizes = None if source is None else view.sizes(source)
        if source is None or sizes is None or not -len(sizes) <= index < len(sizes):
            return None
        return _Alternatives((_Piece(source, inner * prod(sizes[index % len(sizes) + 1 :]), size),))

    source, last = node.inputs[0], len(shape) - 1
    given = view.sizes(source)
    if node.op_type == "Transpose":
        perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else range(last, -1, -1)
        return at(source, perm[axis])
    if node.op_type in LINEAR:
        return _through_product(node, shape, axis, view, at)
    if node.op_type in _POOLS:
        if axis > 1 and node.op_type in ("Conv", "FusedConv") and view.is_pointwise(node):
            return at(source, axis)
        return (at(source, 0), Source.HEADS)[axis] if axis < 2 else Source.PARTS
    if node.op_type in ("Gather", "GatherND", "GatherElements"):
        return _through_gather(node, axis, view, at)
    if node.op_type in _CUTS:
        operands = [operand for operand in node.inputs if operand is not None]
        whole = _any_of(operands if node.op_type == "Concat" else operands[:1], shape, axis, view, at)
        joined = _joined(operands, axis, view) if node.op_type == "Concat" and size == shape[axis] else None
        return whole or joined or _part_of(source, axis, view, size)
    if node.op_type == "Einsum":
        return _through_einsum(node, axis, view, at)
    carried = _any_of(_carriers(node, view), shape, axis, view, at)
    if carried is not None:
        return carried
    if node.op_type in ("Expand", "Tile") and given is not None:
        return Source.REPEATS if len(given) < len(shape) - axis or given[axis - len(shape)] == 1 else None
    return None


def _any_of(operands: Sequence[ir.Value], shape: Sequence[int], axis: int, view: View, at: _At) -> _Alternatives | None:
    """The piece on every operand that has the axis, aligned from the last one, in its full size."""
    found: list[_Piece] = []
    for operand in operands:
        sizes = view.sizes(operand) or ()
        own = axis - (len(shape) - len(sizes))
        if own >= 0 and sizes[own] == shape[axis]:
            piece = at(operand, own)
            found.extend(piece.pieces if piece is not None else ())
    return _Alternatives(tuple(found)) if found else None


def _carriers(node: ir.Node, view: View) -> list[ir.Value]:
    """The operands that may carry an axis on, the largest first; of operators that do not broadcast the first one."""
    operands = node.inputs[:1]
    if node.op_type in _BROADCASTING:
        operands = node.inputs[1:] if node.op_type == "Where" else node.inputs
    dynamic = [operand for operand in operands if operand is not None and not view.is_static(operand)]
    return sorted(dynamic, key=lambda operand: -prod(view.sizes(operand) or (0,)))


def _through_product(node: ir.Node, shape: Sequence[int], axis: int, view: View, at: _At) -> _Answer:
    first, second = node.inputs[:2]
    last = len(shape) - 1
    if view.is_weight(second) or node.op_type not in ("MatMul", "FusedMatMul"):
        return Source.HEADS if axis == last else at(first, axis)
    if view.is_weight(first) and axis == last - 1:
        return Source.HEADS
    if axis == last:
        return at(second, -1)
    if axis == last - 1:
        return at(first, -2)
    return _any_of([operand for operand in (first, second) if operand is not None], shape, axis, view, at)


def _through_einsum(node: ir.Node, axis: int, view: View, at: _At) -> _Answer:
    terms, _, result = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    if not result or "." in terms:
        return None
    letter = result[axis]
    for operand, term in zip(node.inputs, terms.split(","), strict=True):
        if letter in term:
            return Source.HEADS if view.is_static(operand) else at(operand, term.index(letter))
    return None


def _through_gather(node: ir.Node, axis: int, view: View, at: _At) -> _Answer:
    data, indices = node.inputs[:2]
    where = view.sizes(indices)
    if node.op_type == "GatherElements":
        return at(data, axis) if view.sizes(data) == view.sizes(node.outputs[0]) else at(indices, axis)
    if where is None or node.op_type == "GatherND":
        return None
    sizes = view.sizes(data)
    cut = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    if sizes is None:
        return None
    cut %= len(sizes)
    if axis < cut:
        return at(data, axis)
    if axis >= cut + len(where):
        return Source.HEADS if view.is_static(data) else at(data, axis - len(where) + 1)
    counted = not view.is_static(data) and indices is not None and factors(indices, axis - cut, view) is None
    if view.is_static(indices) or counted:  # such as those of windows, which are not inputs but positions
        return _part_of(data, cut, view)
    return at(indices, axis - cut)


def _part_of(source: ir.Value | None, axis: int, view: View, size: int = 0) -> Source | Sequence[Factor] | None:
    """What a part of an axis is: what all of it is, if that is one thing; a part of the samples is nothing known.

    One of several parts that come first leaves what they are parts of.
    """
    whole = None if source is None else factors(source, axis, view)
    if whole and whole[0].source is Source.PARTS and size == prod(factor.size for factor in whole[1:]):
        return whole[1:]
    if whole is None or any(factor.source is Source.SAMPLES for factor in whole):
        return None
    return Source.HEADS if {factor.source for factor in whole} == {Source.HEADS} else Source.PARTS


def _joined(operands: Sequence[ir.Value], axis: int, view: View) -> Sequence[_Piece | Factor] | None:
    """Several batches one after the other are parts of each sample, the parts coming first."""
    sizes = {view.sizes(operand) for operand in operands}
    shape = sizes.pop()
    if sizes or shape is None or axis != 0:
        return None
    return [Factor(len(operands), Source.PARTS), _Piece(operands[0], prod(shape[1:]), shape[0])]


def _apart(piece: _Piece, shape: Sequence[int]) -> list[tuple[int, int, int]] | None:
    """The axes that a piece runs over, as (axis, stride, size), outer ones first; None where it cuts across them."""
    low, high = piece.stride, piece.stride * piece.size
    found = []
    for axis, extent in enumerate(shape):
        inner = prod(shape[axis + 1 :])
        start, end = max(low, inner), min(high, inner * extent)
        if start >= end:
            continue
        if end % start or start % low or start % inner:
            return None
        found.append((axis, start, end // start))
    return found if found and prod(size for *_, size in found) == piece.size else None
