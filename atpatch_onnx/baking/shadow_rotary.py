"""The rotation of Q and K by their positions, as `GroupQueryAttention` does it."""

from dataclasses import dataclass

import onnx_ir as ir

from atpatch_onnx.baking.shadow_nodes import END, as_float, cast, ints, joined, length, part
from atpatch_onnx.baking.shadow_positions import Positions
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.matching.operands import integer, operand


def rotated(
    node: ir.Node, at: Insertion, query: ir.Value, key: ir.Value, positions: Positions
) -> tuple[ir.Value, ir.Value]:
    """Q and K, rotated by their positions in as many of their entries as the caches have columns for."""
    where = positions.queries
    given = operand(node, 9)
    if given is not None:
        where = _given(at, given, positions)
    rows = at.op("Squeeze", where, ints(at, "map/last_axis", 3), name="map/rotary_positions")
    cos, sin = _looked_up(node, at, 7, rows, "cos"), _looked_up(node, at, 8, rows, "sin")
    angles = _Angles(cos, sin, interleaved=bool(integer(node, "rotary_interleaved")))
    return _rotate(at, query, angles, "map/rotated_query"), _rotate(at, key, angles, "map/rotated_key")


def _given(at: Insertion, given: ir.Value, positions: Positions) -> ir.Value:
    """Positions from the node's input `[batch, queries]`; of a prompt, only the very first one is used."""
    given = cast(at, given, ir.DataType.INT64, "map/position_ids")
    flat = at.op("Reshape", given, ints(at, "map/all_positions", -1), name="map/flat_position_ids")
    first = part(at, flat, ints(at, "map/first", 0), ints(at, "map/second", 1), 0, "map/first_position")
    from_first = at.op("Add", positions.queries, first, name="map/positions_of_prompt")
    each = at.op("Reshape", given, ints(at, "map/each_position", 0, 1, -1, 1), name="map/positions_of_tokens")
    return at.op("Where", positions.prompt, from_first, each, name="map/given_positions")


def _looked_up(node: ir.Node, at: Insertion, index: int, rows: ir.Value, name: str) -> ir.Value:
    """Rows of a cache `[longest, pairs]`: float `[batch, 1, positions, pairs]`."""
    cache = operand(node, index)
    assert cache is not None, "the rule refuses a rotation without caches"
    return at.op("Gather", as_float(at, cache, f"map/{name}_cache"), rows, name=f"map/{name}")


@dataclass(frozen=True)
class _Angles:
    cos: ir.Value
    """float `[batch, 1, positions, pairs]`."""

    sin: ir.Value

    interleaved: bool
    """Whether pairs are neighbours of the last axis, else entries of its first and its second half."""


def _rotate(at: Insertion, value: ir.Value, angles: _Angles, name: str) -> ir.Value:
    """Rotate pairs of entries of the last axis; what no angle is for stays behind them."""
    pairs = length(at, angles.cos, 3, f"{name}_pairs")
    width = at.op("Add", pairs, pairs, name=f"{name}_width")
    split, merged = (_neighbours, _woven) if angles.interleaved else (_halves, _in_a_row)
    one, other = split(at, value, pairs, width, name)
    one_cos = at.op("Mul", one, angles.cos, name=f"{name}_one_cos")
    one_sin = at.op("Mul", one, angles.sin, name=f"{name}_one_sin")
    other_cos = at.op("Mul", other, angles.cos, name=f"{name}_other_cos")
    other_sin = at.op("Mul", other, angles.sin, name=f"{name}_other_sin")
    first = at.op("Sub", one_cos, other_sin, name=f"{name}_first")
    second = at.op("Add", other_cos, one_sin, name=f"{name}_second")
    rest = part(at, value, width, ints(at, f"{name}_end", END), 3, f"{name}_rest")
    return joined(at, merged(at, first, second, name), rest, 3, name)


def _halves(at: Insertion, value: ir.Value, pairs: ir.Value, width: ir.Value, name: str) -> tuple[ir.Value, ir.Value]:
    start = ints(at, f"{name}_start", 0)
    return part(at, value, start, pairs, 3, f"{name}_one"), part(at, value, pairs, width, 3, f"{name}_other")


def _in_a_row(at: Insertion, first: ir.Value, second: ir.Value, name: str) -> ir.Value:
    return joined(at, first, second, 3, f"{name}_entries")


def _neighbours(
    at: Insertion, value: ir.Value, pairs: ir.Value, width: ir.Value, name: str
) -> tuple[ir.Value, ir.Value]:
    even, odd, step = ints(at, f"{name}_even", 0), ints(at, f"{name}_odd", 1), ints(at, f"{name}_step", 2)
    one = part(at, value, even, width, 3, f"{name}_one", step)
    return one, part(at, value, odd, width, 3, f"{name}_other", step)


def _woven(at: Insertion, first: ir.Value, second: ir.Value, name: str) -> ir.Value:
    last = ints(at, f"{name}_pair_axis", 4)
    first = at.op("Unsqueeze", first, last, name=f"{name}_first_of_pair")
    second = at.op("Unsqueeze", second, last, name=f"{name}_second_of_pair")
    both = joined(at, first, second, 4, f"{name}_in_pairs")
    return at.op("Reshape", both, ints(at, f"{name}_flat", 0, 0, 0, -1), name=f"{name}_entries")
