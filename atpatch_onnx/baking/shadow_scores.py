"""From Q and K to the map: the product, what becomes of its scores, the softmax."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from atpatch_onnx.baking.shadow_nodes import END, as_float, axis, cast, floats, ints, joined, length, part, sizes
from atpatch_onnx.graph.insertion import Insertion

LOWEST = float(np.finfo(np.float32).min)
"""What the kernels put in place of a score that causality hides: its weight is exactly 0."""


@dataclass(frozen=True)
class Scores:
    """What the scores of Q and K go through on their way to the map."""

    heads: int
    kv_heads: int
    scale: float
    """0: one over the square root of the depth."""

    softcap: float = 0.0
    """0: none."""

    added: tuple[ir.Value, ...] = ()
    """Biases and masks, float, that broadcast to `[batch, heads, queries, keys]`."""

    visible: ir.Value | None = None
    """bool, broadcasts to `[batch, heads, queries, keys]`: all else has a weight of exactly 0."""

    floor: float = -np.inf
    """Where something is added and not every key is visible: a key is seen only if its score stays above this."""

    sink: ir.Value | None = None
    """float `[1, heads or 1, 1, 1]`: the score of one more key that has no value."""


def attention_map(at: Insertion, query: ir.Value, key: ir.Value, scores: Scores) -> ir.Value:
    """The map float `[batch, heads, queries, keys]`.

    Args:
        at: Where the nodes go.
        query: float `[batch, heads, queries, depth]`.
        key: float `[batch, kv heads, keys, depth]`.
        scores: What becomes of their product.
    """
    logits = at.op("Mul", _product(at, query, key, scores), _factor(at, query, scores.scale), name="map/scores")
    if scores.softcap > 0:
        cap = floats(at, "map/cap", scores.softcap)
        tanh = at.op("Tanh", at.op("Div", logits, cap, name="map/share_of_cap"), name="map/tanh")
        logits = at.op("Mul", tanh, cap, name="map/capped")
    for index, term in enumerate(scores.added):
        logits = at.op("Add", logits, term, name=f"map/plus_{index}")
    if scores.visible is None:
        return _softmax(at, logits, scores.sink)
    visible = scores.visible
    if scores.added:
        above = at.op("Greater", logits, floats(at, "map/floor", scores.floor), name="map/above_floor")
        visible = at.op("And", visible, above, name="map/visible")
    hidden = floats(at, "map/hidden", -np.inf)
    weights = _softmax(at, at.op("Where", visible, logits, hidden, name="map/visible_scores"), scores.sink)
    # softmax knows no weights of a row that sees no key: they are zero
    return at.op("Where", visible, weights, floats(at, "map/zero", 0), name="map/visible_weights")


def added_bias(at: Insertion, bias: ir.Value | None) -> tuple[ir.Value, ...]:
    """What an operator's `attention_bias` adds to the scores: nothing where there is none."""
    return () if bias is None else (as_float(at, bias, "map/attention_bias"),)


def _product(at: Insertion, query: ir.Value, key: ir.Value, scores: Scores) -> ir.Value:
    """Q K, `[batch, heads, queries, keys]`."""
    columns = at.op("Transpose", key, name="map/key_columns", attributes=[ir.AttrInt64s("perm", [0, 1, 3, 2])])
    if scores.heads == scores.kv_heads:
        return at.op("MatMul", query, columns, name="map/product")
    # heads of a group meet the same keys: one after the other they are one long head
    to_groups = ints(at, "map/to_groups", 0, scores.kv_heads, -1, 0)
    query = at.op("Reshape", query, to_groups, name="map/query_groups")
    product = at.op("MatMul", query, columns, name="map/product")
    to_heads = ints(at, "map/to_heads", 0, scores.heads, -1, 0)
    return at.op("Reshape", product, to_heads, name="map/product_of_heads")


def _factor(at: Insertion, query: ir.Value, scale: float) -> ir.Value:
    """The factor of Q K: float `[1]`."""
    if scale:
        return floats(at, "map/scale", scale)
    depth = cast(at, length(at, query, 3, "map/depth"), ir.DataType.FLOAT, "map/float_depth")
    return at.op("Reciprocal", at.op("Sqrt", depth, name="map/root"), name="map/scale")


def _softmax(at: Insertion, logits: ir.Value, sink: ir.Value | None) -> ir.Value:
    """Softmax over the keys; the sink is one more column before them, left out of the result."""
    if sink is None:
        return at.op("Softmax", logits, name="map/weights", attributes=[axis(-1)])
    rows = sizes(at, logits, 0, 3, "map/rows")
    column = joined(at, rows, ints(at, "map/one_key", 1), 0, "map/column")
    both = joined(at, at.op("Expand", sink, column, name="map/sinks"), logits, 3, "map/with_sink")
    weights = at.op("Softmax", both, name="map/weights_with_sink", attributes=[axis(-1)])
    return part(at, weights, ints(at, "map/after_sink", 1), ints(at, "map/last_key", END), 3, "map/weights")
