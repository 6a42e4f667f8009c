"""Where a site's keys and values are read and replaced: as far back as they are per token.

The last tensor on the way back (`pieces`) with the maps and the tokens each on a separate axis, or both on one,
that holds nothing but the keys (or the values) and that nobody else reads. Where there is none, the maps may be spread
over several axes, as samples and windows are, and then tokens, as rows and columns of an image are. Where queries,
keys and values are one tensor that nobody cuts apart, it is that one, and a replacement leaves its other columns as
they are.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise
from math import prod

import onnx_ir as ir

from atpatch_onnx.matching.pieces import MOVES, Part, Pieces, split_by_axes, steps_back
from atpatch_onnx.matching.quantized import is_closed, quantization_of
from atpatch_onnx.matching.sites import Place
from atpatch_onnx.matching.view import View

_LOOKING_ON = frozenset({"Shape", "Size", "IsNaN"})
"""Operators that read a tensor without handing its entries on."""

_MOVED_OUT = frozenset({"Transpose", "Reshape", "Unsqueeze", "Squeeze", "Identity", "Cast", "Concat"}) | {
    "QuantizeLinear",
    "DequantizeLinear",
}
"""Operators that may stand between keys and the cache that they are returned into."""

_FARTHEST = 40
"""Nodes between keys and the anchor at most."""


def key_place(keys: Pieces, reader: ir.Node, anchor: ir.Node, view: View) -> Place | None:
    """Where keys are replaced; None where it cannot be told.

    Args:
        keys: Where they meet the queries.
        reader: The node in which they do.
        anchor: The softmax, or the operator that is all of the attention. What leads to it alone, such as a second
            product of keys with positions, reads the same keys.
        view: The graph.
    """
    return _best(_places(keys, _Readers(reader, anchor), view))


def value_place(
    values: Pieces, reader: ir.Node, key: Place, order: Mapping[str, int], view: View, *, cut: bool
) -> Place | None:
    """Where values are replaced: flags are known behind the keys, so only nodes behind these may read them.

    Args:
        values: Where they meet the map.
        reader: The node in which they do.
        key: Where the site's keys are replaced.
        order: Position of each value's node in the graph.
        view: The graph.
        cut: Whether the keys are there without those of a cache that meet the queries as well: so must values be.
    """
    known = order.get(key.value, -1)

    def in_time(place: Place) -> bool:
        if place.value == key.value:
            return True
        uses = [use.node for use in view.values[place.value].uses() if use.node.op_type not in _LOOKING_ON]
        readers = [reader] if place.reader is not None else uses
        return all(order.get(_first_output(node), known + 1) > known for node in readers)

    found = [place for place in _places(values, _Readers(reader), view) if in_time(place)]
    return _best([place for place in found if without_cache(place, values, view) == cut])


def first_place(pieces: Pieces, view: View, *, cut: bool | None = None) -> str | None:
    """The nearest tensor with keys (or values) token by token, whoever else reads it; `cut` as in `value_place`."""
    found = (_place(at, view) for at, _ in steps_back(pieces, view) if at.value.name not in view.static)
    known = (place for place in found if place is not None)
    return next((at.value for at in known if cut is None or without_cache(at, pieces, view) == cut), None)


def without_cache(place: Place, met: Pieces, view: View) -> bool:
    """Whether a place has fewer tokens than meet the queries (or the map): others came out of a cache."""
    sizes = view.inferred.sizes[place.value]
    own = prod(size for letters, size in zip(place.axes, sizes, strict=True) if letters)
    return own != prod(piece.size for piece in met.pieces if piece.letter in "nk")


def _best(places: list[Place]) -> Place | None:
    """The last one of the least spread, and of those of keys (or values) alone, if there is one."""
    least = min(map(_spread, places), default=None)
    together = [place for place in places if _spread(place) == least]
    found = [place for place in together if place.whole] or together
    return found[-1] if found else None


def _spread(place: Place) -> tuple[bool, bool]:
    """Whether tokens, and whether maps, stand on several axes."""
    tokens, maps = (sum(letter in letters for letters in place.axes) > 1 for letter in "kn")
    return tokens, maps


@dataclass(frozen=True)
class _Readers:
    """The nodes that may read keys (or values) as the attention does."""

    reader: ir.Node
    anchor: ir.Node | None = None
    passed: tuple[ir.Node, ...] = ()

    def alone(self, value: ir.Value) -> bool:
        """Whether nothing else reads a value."""
        return all(self._ours(use.node) for use in value.uses())

    def _ours(self, node: ir.Node) -> bool:
        if node is self.reader or node in self.passed:
            return True
        return self._hands_out(node) or self._ends_in_anchor(node)

    def _hands_out(self, node: ir.Node) -> bool:
        """Whether a node asks for sizes only, or moves a value to where no more is done: a cache is an output."""
        if node.op_type in _LOOKING_ON:
            return True
        result, users = node.outputs[0], [use.node for use in node.outputs[0].uses()]
        leads_on = result.is_graph_output() or bool(users)
        return node.op_type in _MOVED_OUT and leads_on and all(self._hands_out(user) for user in users)

    def _ends_in_anchor(self, node: ir.Node) -> bool:
        """Whether a node leads to the anchor alone, and not by way of the queries."""
        pending, seen = [node], {node}
        while pending and self.anchor is not None:
            current = pending.pop()
            if current is self.reader or len(seen) > _FARTHEST or any(out.is_graph_output() for out in current.outputs):
                return False
            users = {use.node for out in current.outputs for use in out.uses()} - seen - {self.anchor}
            seen |= users
            pending += users
        return self.anchor is not None


def _places(first: Pieces, readers: _Readers, view: View) -> list[Place]:
    """All possible ones, the nearest to the attention first."""
    return list(_possible(first, readers, view))


def _possible(first: Pieces, readers: _Readers, view: View) -> Iterator[Place]:
    quantized: int | None = None
    for pieces, passed in steps_back(first, view):
        place = _place(pieces, view)
        if place is not None and place.quantization is not None:
            quantized = len(passed)
        elif quantized is not None and all(node.op_type in MOVES for node in passed[quantized:]):
            place = None  # a QuantizeLinear behind it commutes with what lies between, and runtimes move it there
        ours = replace(readers, passed=passed).alone(pieces.value)
        if place is not None and pieces.value.name not in view.static:
            if not place.whole or ours:
                yield place
            elif not passed:
                yield replace(place, reader=view.in_graph(next(out for out in readers.reader.outputs if out.name)))
        shape = view.sizes(pieces.value)
        if not ours and shape is not None and prod(piece.size for piece in pieces.pieces) == prod(shape):
            return  # whatever is further back, others see as well


def _first_output(node: ir.Node) -> str:
    return str(next(value.name for value in node.outputs if value.name))


def _each_in_one(own: Sequence[Part], parts: Sequence[Part]) -> bool:
    """Whether there is all of one letter and then all of the other, outer ones first, as windows of a grid are not.

    Args:
        own: The parts of maps and tokens, outer ones first.
        parts: All parts, those of a letter in their order.
    """
    runs = [letter for letter, _ in groupby(own, key=lambda part: part.letter)]
    order = [[parts.index(part) for part in own if part.letter == letter] for letter in runs]
    return len(runs) == len(set(runs)) and all(places == sorted(places) for places in order)


def _place(pieces: Pieces, view: View) -> Place | None:
    """The entries as maps, tokens and features; None where these do not stand on separate axes."""
    shape = view.sizes(pieces.value)
    apart = None if shape is None else split_by_axes(pieces, shape)
    if shape is None or apart is None or pieces.value.name in view.stands_for:
        return None
    quantization = quantization_of(pieces.value, view)
    if quantization is None and is_closed(pieces.value):
        return None
    start, parts = apart
    axes, outer_first = [], []
    for axis, extent in enumerate(shape):
        own = sorted((part for part in parts if part.axis == axis), key=lambda part: -part.step)
        letters = "".join(dict.fromkeys(part.letter for part in own if part.letter in "nk"))
        if letters:
            dense = all(one.step == other.step * other.size for one, other in pairwise(own))
            lone = all(part.letter in letters or part.size == 1 for part in own)
            whole = not start[axis] and prod(part.size for part in own) == extent
            if not (dense and lone and whole):
                return None
            outer_first += [part for part in own if part.size > 1]
        axes.append(letters)
    known = view.shape(pieces.value) or ()
    unknown = [letters for letters, size in zip(axes, known, strict=True) if not (letters or isinstance(size, int))]
    alone = all(piece.size == 1 for piece in pieces.pieces if piece.letter == "n")
    if alone and "k" in axes and not any("n" in letters for letters in axes):
        axes[axes.index("k")] = "nk"  # the tokens of the only map
    order = "".join(letter for letter, _ in groupby("".join(axes)))
    if order not in ("nk", "kn") or unknown or not _each_in_one(outer_first, parts):
        return None
    sizes = tuple(1 if letters else extent for letters, extent in zip(axes, shape, strict=True))
    strides = [prod(sizes[axis + 1 :]) for axis in range(len(sizes))]

    def steps(letters: str) -> tuple[tuple[int, int], ...]:
        own = [part for letter in letters for part in parts if part.letter == letter and part.size > 1]
        return tuple((part.step * strides[part.axis], part.size) for part in own)

    heads, depth = steps("hg"), steps("d")
    return Place(
        value=str(pieces.value.name),
        axes=tuple(axes),
        sizes=sizes,
        heads=prod(size for _, size in heads),
        depth=prod(size for _, size in depth),
        start=sum(at * strides[axis] for axis, at in enumerate(start) if not axes[axis]),
        steps=(*heads, *depth),
        quantization=quantization,
    )
