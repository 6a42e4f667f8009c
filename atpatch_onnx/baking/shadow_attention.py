"""`Attention`: projects one input itself; its past is joined."""

import onnx_ir as ir

from atpatch_onnx.baking.shadow_masks import added
from atpatch_onnx.baking.shadow_nodes import QKV, apart, as_float, entry, ints, joined, length, three_parts
from atpatch_onnx.baking.shadow_scores import Scores, attention_map
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.matching.operands import integer, operand, real


def write(node: ir.Node, at: Insertion) -> tuple[ir.Value, ir.Value]:
    """The map and the values; see `shadow.map_and_values`."""
    heads = integer(node, "num_heads")
    query, key, value = _projections(node, at, heads)
    cache = operand(node, 4)
    past = None
    if cache is not None:
        past = length(at, cache, 3, "map/past_length")
        cache = as_float(at, cache, "map/past")
        key = joined(at, entry(at, cache, 0, 0, "map/past_keys"), key, 2, "map/all_keys")
        value = joined(at, entry(at, cache, 1, 0, "values/past"), value, 2, "values/all")
    terms = added(node, at, query, key, mask=operand(node, 3), bias=operand(node, 5), past=past)
    return attention_map(at, query, key, Scores(heads, heads, real(node, "scale"), added=terms)), value


def _projections(node: ir.Node, at: Insertion, heads: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Q, K and V of each head `[batch, heads, positions, depth]`, new ones only, with bias."""
    source, weights, bias = (operand(node, index) for index in range(3))
    assert source is not None, "input is required by the op"
    assert weights is not None, "weights are required by the op"
    weights = as_float(at, weights, "map/projection_weights")
    projected = at.op("MatMul", as_float(at, source, "map/input"), weights, name="map/projection")
    if bias is not None:
        projected = at.op("Add", projected, as_float(at, bias, "map/bias"), name="map/projection_with_bias")
    parts = three_parts(at, projected, _cuts(node, at, weights), 2, [f"{name}_part" for name in QKV])
    query, key, value = (apart(at, part, heads, name) for part, name in zip(parts, QKV, strict=True))
    return query, key, value


def _cuts(node: ir.Node, at: Insertion, weights: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Where K and V begin in the projection of all three: int64 `[1]` each."""
    if "qkv_hidden_sizes" in node.attributes:
        query_width, key_width, _ = node.attributes["qkv_hidden_sizes"].as_ints()
        return ints(at, "map/keys_start", query_width), ints(at, "map/values_start", query_width + key_width)
    third = at.op("Div", length(at, weights, 1, "map/width"), ints(at, "map/three", 3), name="map/third")
    return third, at.op("Add", third, third, name="map/two_thirds")
