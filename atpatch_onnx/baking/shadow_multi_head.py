"""`MultiHeadAttention`: projections made before it, together or apart, and a past that is joined."""

import onnx_ir as ir

from atpatch_onnx.baking.shadow_masks import added
from atpatch_onnx.baking.shadow_nodes import (
    KEY,
    QKV,
    QUERY,
    VALUE,
    apart,
    as_float,
    entry,
    heads_first,
    ints,
    joined,
    length,
    three_parts,
)
from atpatch_onnx.baking.shadow_scores import Scores, attention_map
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.matching.operands import integer, known_rank, operand, real


def write(node: ir.Node, at: Insertion) -> tuple[ir.Value, ir.Value]:
    """The map and the values; see `shadow.map_and_values`."""
    heads = integer(node, "num_heads")
    query, key, value = _projections(node, at, heads)
    past_key, past_value = operand(node, 6), operand(node, 7)
    past = None
    if past_key is not None and past_value is not None:
        past = length(at, past_key, 2, "map/past_length")
        key = joined(at, as_float(at, past_key, "map/past_key"), key, 2, "map/all_keys")
        value = joined(at, as_float(at, past_value, "values/past"), value, 2, "values/all")
    terms = added(node, at, query, key, mask=operand(node, 4), bias=operand(node, 5), past=past)
    return attention_map(at, query, key, Scores(heads, heads, real(node, "scale"), added=terms)), value


def _projections(node: ir.Node, at: Insertion, heads: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Q, K and V of each head `[batch, heads, positions, depth]`, new ones only, with bias.

    They come packed in one input `[batch, positions, heads, 3, depth]`; or Q apart `[batch, positions, heads * depth]`,
    and K and V packed `[batch, positions, heads, 2, depth]`, like Q, or one row a head, as they are returned.
    """
    query, key, value, bias = (operand(node, index) for index in range(4))
    assert query is not None, "query is required by the op"
    if known_rank(query) == 5:
        query, key, value = _unpacked(at, query, QKV, _bias_of_heads(at, bias, heads))
        return query, key, value
    biases = _bias_of_widths(at, bias, query)
    query = apart(at, _biased(at, query, biases[0], QUERY), heads, QUERY)
    assert key is not None, "the rule refuses three axes of Q alone"
    key_rank = known_rank(key)
    if key_rank == 5:  # the rule refuses a bias
        key, value = _unpacked(at, key, (KEY, VALUE), (None, None))
        return query, key, value
    assert value is not None, "the rule refuses a key without a value"
    if key_rank == 4:  # past any bias
        return query, as_float(at, key, f"{KEY}_float"), as_float(at, value, f"{VALUE}_float")
    key = apart(at, _biased(at, key, biases[1], KEY), heads, KEY)
    value = apart(at, _biased(at, value, biases[2], VALUE), heads, VALUE)
    return query, key, value


_Biases = tuple[ir.Value | None, ...]
"""Of each projection; None where it has none."""


def _unpacked(at: Insertion, packed: ir.Value, names: tuple[str, ...], biases: _Biases) -> list[ir.Value]:
    """The parts `[batch, heads, positions, depth]` of `[batch, positions, heads, parts, depth]`."""
    parts = [entry(at, packed, index, 3, f"{name}_part") for index, name in enumerate(names)]
    return [
        heads_first(at, _biased(at, value, bias, name), name)
        for value, bias, name in zip(parts, biases, names, strict=True)
    ]


def _biased(at: Insertion, value: ir.Value, bias: ir.Value | None, name: str) -> ir.Value:
    value = as_float(at, value, f"{name}_float")
    return value if bias is None else at.op("Add", value, bias, name=f"{name}_with_bias")


def _bias_of_heads(at: Insertion, bias: ir.Value | None, heads: int) -> _Biases:
    """The biases of Q, of K and of V, `[heads, depth]` each."""
    if bias is None:
        return (None, None, None)
    shape = ints(at, "map/bias_shape", 3, heads, -1)
    of_heads = at.op("Reshape", as_float(at, bias, "map/bias"), shape, name="map/bias_of_heads")
    return tuple(entry(at, of_heads, index, 0, f"{name}_bias") for index, name in enumerate(QKV))


def _bias_of_widths(at: Insertion, bias: ir.Value | None, query: ir.Value) -> _Biases:
    """The biases of Q, of K and of V, `[heads * depth]` each; V's depth may be another one."""
    if bias is None:
        return (None, None, None)
    width = length(at, query, 2, "map/width")
    cuts = (width, at.op("Add", width, width, name="map/two_widths"))
    return tuple(three_parts(at, as_float(at, bias, "map/bias"), cuts, 0, [f"{name}_bias" for name in QKV]))
