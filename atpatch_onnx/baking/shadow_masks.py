"""What `MultiHeadAttention` and `Attention` add to their scores: bias, padding and causality."""

import numpy as np
import onnx_ir as ir

from atpatch_onnx.baking.shadow_nodes import cast, counted, floats, ints, joined, length, part
from atpatch_onnx.baking.shadow_scores import LOWEST, added_bias
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.matching.operands import integer, known_rank, real

_MASK_FILTER = -10000.0
"""What the kernels add to the score of a padded key, unless the node says otherwise."""


def added(
    node: ir.Node,
    at: Insertion,
    query: ir.Value,
    key: ir.Value,
    *,
    mask: ir.Value | None,
    bias: ir.Value | None,
    past: ir.Value | None,
) -> tuple[ir.Value, ...]:
    """Bias and mask, each only where the node has it: float, broadcast to `[batch, heads, queries, keys]`.

    Args:
        node: `MultiHeadAttention` or `Attention`.
        at: Where the nodes go.
        query: Q `[batch, heads, queries, depth]`.
        key: K `[batch, heads, keys, depth]`, with the past.
        mask: The node's padding mask, of 1 to 3 axes.
        bias: The node's attention bias.
        past: int64 `[1]`: how many of the keys are from the past.

    Raises:
        BakeError: It is not known how many axes the mask has.
    """
    terms = added_bias(at, bias)
    hidden = None if mask is None else _padded(node, at, mask, query, key)
    causal = integer(node, "unidirectional")
    if hidden is None and not causal:
        return terms
    filters = floats(at, "map/no_mask", 0)
    if hidden is not None:
        padding = floats(at, "map/mask_filter", real(node, "mask_filter_value", _MASK_FILTER))
        filters = at.op("Where", hidden, padding, filters, name="map/padding_mask")
    if causal:  # in place of the padding's filter, not on top of it
        lowest = floats(at, "map/causal_filter", LOWEST)
        filters = at.op("Where", _later(at, query, key, past), lowest, filters, name="map/causal_mask")
    return (*terms, filters)


def _later(at: Insertion, query: ir.Value, key: ir.Value, past: ir.Value | None) -> ir.Value:
    """The keys after each query: bool `[queries, keys]`. The last query sees all keys, however many there are."""
    count = length(at, query, 2, "map/query_count")
    rows = counted(at, count, "map/query_number", -1, 1)
    keys = counted(at, length(at, key, 2, "map/causal_keys"), "map/causal_key_number", -1)
    positions = rows if past is None else at.op("Add", rows, past, name="map/query_position")
    later = at.op("Greater", keys, positions, name="map/later")
    last = at.op("Sub", count, ints(at, "map/one_query", 1), name="map/last_query")
    return at.op("And", later, at.op("Less", rows, last, name="map/before_last"), name="map/causally_hidden")


def _padded(node: ir.Node, at: Insertion, mask: ir.Value, query: ir.Value, key: ir.Value) -> ir.Value:
    """The keys that the mask hides: bool, broadcasts to `[batch, 1, queries, keys]`."""
    axes = known_rank(mask)
    if axes == 1:
        return _outside(node, at, mask, query, key)
    mask = at.op("Unsqueeze", mask, ints(at, "map/mask_axes", *range(1, 5 - axes)), name="map/mask")
    zero = at.constant("map/no_key", np.array([0], np.int32))
    hidden = at.op("LessOrEqual", cast(at, mask, ir.DataType.INT32, "map/mask_numbers"), zero, name="map/padded")
    if axes == 2 and node.op_type == "Attention":  # it ignores a mask of one column, unless there is but one key
        columns = length(at, mask, 3, "map/mask_columns")
        counts = at.op("Equal", columns, length(at, key, 2, "map/mask_keys"), name="map/mask_counts")
        hidden = at.op("And", hidden, counts, name="map/padded_keys")
    return hidden


def _outside(node: ir.Node, at: Insertion, mask: ir.Value, query: ir.Value, key: ir.Value) -> ir.Value:
    """The keys behind each sample's last one, and before its first where the mask says that too.

    A mask of one axis begins with the ends, one a sample; what follows is of use to `Attention` only.
    """
    mask = cast(at, mask, ir.DataType.INT64, "map/mask_numbers")
    batch = length(at, query, 0, "map/batch")
    keys = counted(at, length(at, key, 2, "map/key_count"), "map/key_number", -1)
    column = ints(at, "map/per_sample", -1, 1, 1, 1)
    ends = part(at, mask, ints(at, "map/mask_start", 0), batch, 0, "map/ends")
    ends = at.op("Reshape", ends, column, name="map/key_ends")
    hidden = at.op("GreaterOrEqual", keys, ends, name="map/behind_end")
    if node.op_type != "Attention":
        return hidden
    starts = at.op("Reshape", _starts(at, mask, batch), column, name="map/key_starts")
    before = at.op("Less", keys, starts, name="map/before_start")
    return at.op("Or", hidden, before, name="map/padded")


def _starts(at: Insertion, mask: ir.Value, batch: ir.Value) -> ir.Value:
    """Where the keys of each sample start: int64 `[batch]`; 0 where a mask of one axis does not say that.

    It does where it is twice as long as the batch. What follows the ends in other lengths is of no use to the kernel.
    """
    twice = at.op("Add", batch, batch, name="map/two_batches")
    has_starts = at.op("Equal", at.op("Shape", mask, name="map/mask_length"), twice, name="map/has_starts")
    zeros = at.op("Expand", ints(at, "map/from_first", 0), batch, name="map/from_first_keys")
    second = part(at, joined(at, mask, zeros, 0, "map/mask_and_zeros"), batch, twice, 0, "map/second_part")
    return at.op("Where", has_starts, second, zeros, name="map/starts")
