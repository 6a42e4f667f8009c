"""Where the queries and keys of `GroupQueryAttention` are in their sequences, and who sees whom."""

from dataclasses import dataclass

import onnx_ir as ir

from atpatch_onnx.baking.shadow_nodes import cast, counted, ints, length
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.matching.operands import integer, operand


@dataclass(frozen=True)
class Positions:
    """Where the queries and keys of each sample are in its sequence; int64."""

    past: ir.Value
    """`[batch, 1, 1, 1]`: keys in the cache, and so the position of the first query."""

    queries: ir.Value
    """`[batch, 1, queries, 1]`."""

    keys: ir.Value
    """`[keys]`: 0, 1, 2, ... up to the longest sequence of the batch."""

    lengths: ir.Value
    """`[batch, 1, 1, 1]`: keys of the sequence, old and new."""

    prompt: ir.Value
    """bool `[1]`: whether all keys are new, whatever the cache holds."""


def positions_of(node: ir.Node, at: Insertion, query: ir.Value) -> Positions:
    """What `seqlens_k` (the number of each sample's last key) and `total_sequence_length` say."""
    last, total = operand(node, 5), operand(node, 6)
    assert last is not None, "seqlens_k is required by the op"
    assert total is not None, "total_sequence_length is required by the op"
    last = at.op("Reshape", last, ints(at, "map/per_sample", -1, 1, 1, 1), name="map/last_key_numbers")
    last = cast(at, last, ir.DataType.INT64, "map/last_keys")
    lengths = at.op("Add", last, ints(at, "map/one", 1), name="map/lengths")
    total = cast(at, total, ir.DataType.INT64, "map/total")
    total = at.op("Reshape", total, ints(at, "map/one_element", 1), name="map/total_length")
    count = length(at, query, 2, "map/query_count")
    prompt = at.op("Equal", count, total, name="map/is_prompt")
    cached = at.op("Sub", lengths, count, name="map/cached")
    past = at.op("Where", prompt, ints(at, "map/nothing_cached", 0), cached, name="map/past_lengths")
    rows = counted(at, count, "map/query_number", 1, 1, -1, 1)
    queries = at.op("Add", rows, past, name="map/query_positions")
    return Positions(past, queries, counted(at, total, "map/key_number", -1), lengths, prompt)


def visible_keys(node: ir.Node, at: Insertion, positions: Positions) -> ir.Value:
    """The keys that a query sees: its sequence's, up to its own, within the window.

    bool, broadcasts to `[batch, heads, queries, keys]`.
    """
    visible = at.op("Less", positions.keys, positions.lengths, name="map/in_sequence")
    if integer(node, "causal", 1):
        seen = at.op("LessOrEqual", positions.keys, positions.queries, name="map/not_later")
        visible = at.op("And", visible, seen, name="map/visible_keys")
    window = integer(node, "local_window_size", -1)
    if window >= 0:
        before = at.op("Sub", positions.queries, ints(at, "map/window", window), name="map/before_window")
        near = at.op("Greater", positions.keys, before, name="map/in_window")
        visible = at.op("And", visible, near, name="map/visible_in_window")
    return visible
