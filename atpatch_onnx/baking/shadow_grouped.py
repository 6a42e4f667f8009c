"""`GroupQueryAttention`: samples of lengths of their own, rotation, a cache that may have room to spare."""

import numpy as np
import onnx_ir as ir

from atpatch_onnx.baking.shadow_cache import in_slots, slots_of_keys
from atpatch_onnx.baking.shadow_nodes import QKV, apart, as_float, ints, three_parts
from atpatch_onnx.baking.shadow_positions import positions_of, visible_keys
from atpatch_onnx.baking.shadow_rotary import rotated
from atpatch_onnx.baking.shadow_scores import LOWEST, Scores, added_bias, attention_map
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.matching.operands import integer, operand, real


def write(node: ir.Node, at: Insertion) -> tuple[ir.Value, ir.Value]:
    """The map and the values; see `shadow.map_and_values`."""
    heads, kv_heads = integer(node, "num_heads"), integer(node, "kv_num_heads")
    query, key, value = _projections(node, at, heads, kv_heads)
    positions = positions_of(node, at, query)
    if integer(node, "do_rotary"):
        query, key = rotated(node, at, query, key, positions)
    past_key, past_value = operand(node, 3), operand(node, 4)
    if past_key is not None and past_value is not None:
        slots = slots_of_keys(at, past_key, key, positions, kv_heads)
        key = in_slots(at, as_float(at, past_key, "map/past_key"), key, slots, "map/all_keys")
        value = in_slots(at, as_float(at, past_value, "values/past"), value, slots, "values/all")
    sink, softcap = _sink(node, at), real(node, "softcap")
    # the kernel that most nodes get starts each row's maximum at the lowest float, and sees only what lies above
    plain = integer(node, "causal", 1) and not softcap and sink is None
    scores = Scores(
        heads,
        kv_heads,
        real(node, "scale"),
        softcap=softcap,
        added=added_bias(at, operand(node, 10)),
        visible=visible_keys(node, at, positions),
        floor=LOWEST if plain else -np.inf,
        sink=sink,
    )
    return attention_map(at, query, key, scores), value


def _projections(node: ir.Node, at: Insertion, heads: int, kv_heads: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Q `[batch, heads, queries, depth]`, K and V `[batch, kv heads, queries, depth]`, new ones only."""
    query, key, value = (operand(node, index) for index in range(3))
    assert query is not None, "query is required by the op"
    if key is None or value is None:  # one input, with the heads of K and V behind those of Q
        packed = apart(at, as_float(at, query, "map/packed_float"), heads + 2 * kv_heads, "map/packed")
        cuts = ints(at, "map/keys_start", heads), ints(at, "map/values_start", heads + kv_heads)
        query, key, value = three_parts(at, packed, cuts, 1, QKV)
        return query, key, value
    parts = zip((query, key, value), (heads, kv_heads, kv_heads), QKV, strict=True)
    query, key, value = (apart(at, as_float(at, part, f"{name}_float"), count, name) for part, count, name in parts)
    return query, key, value


def _sink(node: ir.Node, at: Insertion) -> ir.Value | None:
    """The sink's score, float `[1, heads or 1, 1, 1]`: of each head, or 0; None where there is no sink."""
    sink = operand(node, 11)
    if sink is not None:
        per_head = ints(at, "map/per_head", 1, -1, 1, 1)
        return at.op("Reshape", as_float(at, sink, "map/head_sink"), per_head, name="map/sink")
    if integer(node, "smooth_softmax"):
        return at.constant("map/sink", np.zeros((1, 1, 1, 1), np.float32))
    return None
