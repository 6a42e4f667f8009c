"""One layer of attention each, its keys and values written as exporters write them: recipes of where they stand.

`[batch, 6, 16]` goes in as `x`, a cache as `past_key` and `past_value` where there is one.
"""

import numpy as np
from onnx import TensorProto
from place_drafts import DEPTH, FLOATS, HEADS, KV_HEADS, KV_WIDTH, TOKENS, WHOLE, WIDTH, Draft, Recipe, Written

POSITIONS = {"positions": (WHOLE, ("batch", TOKENS))}


# Decomposed


def apart(s: Draft) -> Written:
    q, k, v = (s.linear("x") for _ in range(3))
    keys, values = s.apart(k), s.apart(v)
    return Written(s.attention(s.apart(q), keys, values), k, v, keys, values)


def without_bias(s: Draft) -> Written:
    q, k, v = (s.linear("x", bias=False) for _ in range(3))
    keys, values = s.apart(k), s.apart(v)
    return Written(s.attention(s.apart(q), keys, values), k, v, keys, values)


def scaled_keys(s: Draft) -> Written:
    """As some exporters do, keys are scaled before the product."""
    q, k, v = (s.linear("x") for _ in range(3))
    keys, values = s.op("Mul", s.apart(k), s.number(0.5)), s.apart(v)
    return Written(s.attention(s.apart(q), keys, values), k, v)


def read_by_others(s: Draft) -> Written:
    """What the projection gives is an output as well: keys are replaced where the attention alone reads them."""
    q, k, v = (s.linear("x") for _ in range(3))
    more = s.op("Abs", k)
    split = s.reshape(k, 0, -1, HEADS, DEPTH)
    keys, values = s.transpose(split, 0, 2, 1, 3), s.apart(v)
    return Written(s.attention(s.apart(q), keys, values), split, v, keys, values, (more,))


def split(s: Draft) -> Written:
    q, k, v = s.outputs("Split", s.linear("x", 3 * WIDTH), count=3, axis=-1, num_outputs=3)
    keys, values = s.apart(k), s.apart(v)
    return Written(s.attention(s.apart(q), keys, values), k, v, keys, values)


def sliced(s: Draft) -> Written:
    packed = s.linear("x", 3 * WIDTH)
    q, k, v = (
        s.op("Slice", packed, s.sizes(i * WIDTH), s.sizes((i + 1) * WIDTH), s.sizes(2), s.sizes(1)) for i in range(3)
    )
    keys, values = s.apart(k), s.apart(v)
    return Written(s.attention(s.apart(q), keys, values), k, v, keys, values)


def gathered(s: Draft) -> Written:
    """As timm: `[3, batch, heads, tokens, depth]`, and one of three."""
    packed = s.transpose(s.reshape(s.linear("x", 3 * WIDTH), 0, -1, 3, HEADS, DEPTH), 2, 0, 3, 1, 4)
    q, k, v = (s.op("Gather", packed, s.weight(np.array(i)), axis=0) for i in range(3))
    return Written(s.attention(q, k, v), k, v, k, v)


def never_apart(s: Draft) -> Written:
    """A packed projection that is cut on two sides of the scores: the cuts are read by others too."""
    packed = s.linear("x", 3 * WIDTH)
    q, k, v = s.outputs("Split", packed, count=3, axis=-1, num_outputs=3)
    more = s.op("Add", s.op("Abs", k), s.op("Abs", v))
    return Written(s.attention(s.apart(q), s.apart(k), s.apart(v)), "", "", extra=(more,))


def cached(s: Draft) -> Written:
    q, k, v = s.linear("x"), s.linear("x", KV_WIDTH), s.linear("x", KV_WIDTH)
    keys, values = s.apart(k, KV_HEADS), s.apart(v, KV_HEADS)
    all_keys = s.op("Concat", "past_key", keys, axis=2)
    all_values = s.op("Concat", "past_value", values, axis=2)
    y = s.attention(s.apart(q), repeated(s, all_keys), repeated(s, all_values))
    return Written(y, k, v, keys, values, (all_keys, all_values))


def repeated(s: Draft, y: str) -> str:
    """Copies for the heads that share keys and values."""
    y = s.op("Expand", s.op("Unsqueeze", y, s.sizes(2)), s.sizes(1, 1, HEADS // KV_HEADS, 1, 1))
    return s.reshape(y, 0, HEADS, -1, DEPTH)


def grouped(s: Draft) -> Written:
    q, k, v = s.linear("x"), s.linear("x", KV_WIDTH), s.linear("x", KV_WIDTH)
    keys, values = s.apart(k, KV_HEADS), s.apart(v, KV_HEADS)
    return Written(s.attention(s.apart(q), repeated(s, keys), repeated(s, values)), k, v, keys, values)


def tokens_first(s: Draft) -> Written:
    x = s.transpose("x", 1, 0, 2)
    q, k, v = (s.linear(x) for _ in range(3))
    heads = (s.transpose(s.reshape(y, TOKENS, -1, DEPTH), 1, 0, 2) for y in (q, k, v))
    q, keys, values = (s.reshape(y, -1, HEADS, TOKENS, DEPTH) for y in heads)
    return Written(s.attention(q, keys, values), k, v, keys, values)


def by_gemm(s: Draft) -> Written:
    """A linear layer of two axes: samples and tokens are one."""
    x = s.reshape("x", -1, WIDTH)
    q, k, v = (s.op("Gemm", x, s.normal(WIDTH, WIDTH), s.normal(WIDTH)) for _ in range(3))
    q, keys, values = (s.transpose(s.reshape(y, -1, TOKENS, HEADS, DEPTH), 0, 2, 1, 3) for y in (q, k, v))
    return Written(s.attention(q, keys, values), k, v, keys, values)


def by_convolution(s: Draft) -> Written:
    """Of one position: features come before tokens."""
    x = s.transpose("x", 0, 2, 1)
    q, k, v = (s.op("Conv", x, s.normal(WIDTH, WIDTH, 1), s.normal(WIDTH)) for _ in range(3))
    q, keys, values = (s.transpose(s.reshape(y, 0, HEADS, DEPTH, -1), 0, 1, 3, 2) for y in (q, k, v))
    return Written(s.attention(q, keys, values), k, v, keys, values)


def on_a_grid(s: Draft) -> Written:
    """Tokens on two axes: keys stand token by token behind the Reshape only."""
    x = s.reshape(s.transpose("x", 0, 2, 1), 0, WIDTH, 2, TOKENS // 2)
    q, k, v = (s.op("Conv", x, s.normal(WIDTH, WIDTH, 1, 1), s.normal(WIDTH)) for _ in range(3))
    q, k, v = (s.reshape(y, 0, HEADS, DEPTH, TOKENS) for y in (q, k, v))
    q, keys, values = (s.transpose(y, 0, 1, 3, 2) for y in (q, k, v))
    return Written(s.attention(q, keys, values), k, v, keys, values)


def disentangled(s: Draft) -> Written:
    """As DeBERTa: keys meet positions in a product of their own, and both are one softmax."""
    q, k, v = (s.linear("x") for _ in range(3))
    q, keys, values = (s.apart(y) for y in (q, k, v))
    of_positions = s.transpose(s.op("MatMul", keys, s.normal(HEADS, DEPTH, TOKENS)), 0, 1, 3, 2)
    scores = s.op("Add", s.op("MatMul", q, s.transpose(keys, 0, 1, 3, 2)), of_positions)
    y = s.op("MatMul", s.op("Softmax", scores, axis=-1), values)
    return Written(s.reshape(s.transpose(y, 0, 2, 1, 3), 0, -1, WIDTH), k, v, keys, values)


def queries_are_keys(s: Draft) -> Written:
    """One projection for both: a flagged token keeps its query, so keys are replaced where they are on their own."""
    k, v = s.linear("x"), s.linear("x")
    split = s.reshape(k, 0, -1, HEADS, DEPTH)
    keys, values = s.transpose(split, 0, 2, 1, 3), s.apart(v)
    return Written(s.attention(s.apart(k), keys, values), split, v, keys, values)


# Between the projection and the product


def angles(s: Draft) -> tuple[str, str]:
    """Cosines and sines of positions, `[batch, 1, tokens, depth]`."""
    where = s.op("Unsqueeze", s.op("Cast", "positions", to=FLOATS), s.sizes(2))
    half = s.op("Mul", where, s.number(*(10.0 ** -np.arange(DEPTH // 2))))
    whole = s.op("Unsqueeze", s.op("Concat", half, half, axis=-1), s.sizes(1))
    return s.op("Cos", whole), s.op("Sin", whole)


def rotated(s: Draft, y: str, cosines: str, sines: str) -> str:
    first = s.op("Slice", y, s.sizes(0), s.sizes(DEPTH // 2), s.sizes(3))
    second = s.op("Slice", y, s.sizes(DEPTH // 2), s.sizes(DEPTH), s.sizes(3))
    turned = s.op("Concat", s.op("Neg", second), first, axis=-1)
    return s.op("Add", s.op("Mul", y, cosines), s.op("Mul", turned, sines))


def rotary_written_out(s: Draft) -> Written:
    q, k, v = s.linear("x"), s.linear("x", KV_WIDTH), s.linear("x", KV_WIDTH)
    found = angles(s)
    q, keys = (rotated(s, s.apart(y, heads), *found) for y, heads in ((q, HEADS), (k, KV_HEADS)))
    values = s.apart(v, KV_HEADS)
    return Written(s.attention(q, repeated(s, keys), repeated(s, values)), k, v, values=values)


def rotary_as_an_op(s: Draft) -> Written:
    q, k, v = s.linear("x"), s.linear("x", KV_WIDTH), s.linear("x", KV_WIDTH)
    table = np.outer(np.arange(16), 10.0 ** -np.arange(DEPTH // 2)).astype(np.float32)
    found = "positions", s.weight(np.cos(table)), s.weight(np.sin(table))
    domain = {"domain": "com.microsoft"}
    q, keys = (s.op("RotaryEmbedding", s.apart(y, heads), *found, **domain) for y, heads in ((q, HEADS), (k, KV_HEADS)))
    values = s.apart(v, KV_HEADS)
    return Written(s.attention(q, repeated(s, keys), repeated(s, values)), k, v, values=values)


def normed(s: Draft, y: str) -> str:
    """Divided by the root of its mean square, and scaled."""
    squares = s.op("ReduceMean", s.op("Pow", y, s.number(2.0)), s.sizes(-1), keepdims=1)
    return s.op("Mul", s.op("Div", y, s.op("Sqrt", s.op("Add", squares, s.number(1e-6)))), s.normal(DEPTH))


def key_norm(s: Draft) -> Written:
    q, k, v = (s.linear("x", bias=False) for _ in range(3))
    keys, values = normed(s, s.apart(k)), s.apart(v)
    return Written(s.attention(normed(s, s.apart(q)), keys, values), k, v, values=values)


def key_norm_and_rotary(s: Draft) -> Written:
    q, k, v = (s.linear("x", bias=False) for _ in range(3))
    found = angles(s)
    keys, values = rotated(s, normed(s, s.apart(k)), *found), s.apart(v)
    return Written(s.attention(rotated(s, normed(s, s.apart(q)), *found), keys, values), k, v, values=values)


def layer_norm_of_keys(s: Draft) -> Written:
    q, k, v = (s.linear("x") for _ in range(3))
    values = s.apart(v)
    keys = s.op("LayerNormalization", s.apart(k), s.normal(DEPTH), s.normal(DEPTH), axis=-1)
    return Written(s.attention(s.apart(q), keys, values), k, v, values=values)


def _over_tokens(s: Draft, k: str) -> str:
    return s.op("Div", k, s.op("ReduceMean", s.op("Abs", k), s.sizes(2), keepdims=1))


def norm_over_tokens(s: Draft) -> Written:
    """A mean over tokens mixes them: keys are what comes behind it."""
    q, k, v = (s.linear("x") for _ in range(3))
    keys = _over_tokens(s, s.apart(k))
    values = s.apart(v)
    return Written(s.attention(s.apart(q), keys, values), keys, v, keys, values)


def values_first(s: Draft) -> Written:
    """What is flagged is known behind the keys: values that were moved before are replaced where they are read then."""
    q, k, v = (s.linear("x") for _ in range(3))
    k, values = s.apart(k), s.apart(v)
    keys = _over_tokens(s, k)
    return Written(s.attention(s.apart(q), keys, values), keys, values, keys, values)


def gated_keys(s: Draft) -> Written:
    """A gate of the input is no angle and no weight: keys are what comes behind it."""
    q, k, v = (s.linear("x") for _ in range(3))
    gate = s.op("Unsqueeze", s.transpose(s.op("Sigmoid", s.linear("x", HEADS)), 0, 2, 1), s.sizes(3))
    keys, values = s.op("Mul", s.apart(k), gate), s.apart(v)
    return Written(s.attention(s.apart(q), keys, values), keys, v, keys, values)


def cache_behind(s: Draft) -> Written:
    """New tokens before those of a cache: not how caches are joined, so keys are all of them."""
    q, k, v = s.linear("x"), s.linear("x", KV_WIDTH), s.linear("x", KV_WIDTH)
    keys = s.op("Concat", s.apart(k, KV_HEADS), "past_key", axis=2)
    values = s.op("Concat", s.apart(v, KV_HEADS), "past_value", axis=2)
    return Written(s.attention(s.apart(q), repeated(s, keys), repeated(s, values)), keys, values, keys, values)


def tiled_heads(s: Draft) -> Written:
    """Copies by Tile are not followed: every copy is a separate head."""
    q, k, v = s.linear("x"), s.linear("x", DEPTH), s.linear("x", DEPTH)
    keys, values = (s.op("Tile", s.apart(y, 1), s.sizes(1, HEADS, 1, 1)) for y in (k, v))
    return Written(s.attention(s.apart(q), keys, values), keys, values, keys, values)


# Operators


def op_attention(s: Draft) -> Written:
    """4-D."""
    q, k, v = s.linear("x"), s.linear("x", KV_WIDTH), s.linear("x", KV_WIDTH)
    keys, values = s.apart(k, KV_HEADS), s.apart(v, KV_HEADS)
    y = s.op("Attention", s.apart(q), keys, values)
    return Written(s.reshape(s.transpose(y, 0, 2, 1, 3), 0, -1, WIDTH), k, v, keys, values)


def op_attention_packed(s: Draft) -> Written:
    """3-D."""
    q, k, v = s.linear("x"), s.linear("x", KV_WIDTH), s.linear("x", KV_WIDTH)
    return Written(s.op("Attention", q, k, v, q_num_heads=HEADS, kv_num_heads=KV_HEADS), k, v)


def op_attention_with_past(s: Draft) -> Written:
    q, k, v = s.linear("x"), s.linear("x", KV_WIDTH), s.linear("x", KV_WIDTH)
    keys, values = s.apart(k, KV_HEADS), s.apart(v, KV_HEADS)
    y, *present = s.outputs("Attention", s.apart(q), keys, values, "", "past_key", "past_value", count=3)
    return Written(s.reshape(s.transpose(y, 0, 2, 1, 3), 0, -1, WIDTH), k, v, keys, values, tuple(present))


def _grouped_query(s: Draft, q: str, k: str, v: str, *rotary: str) -> list[str]:
    total = s.weight(np.array(TOKENS, np.int32))
    return s.outputs(
        "GroupQueryAttention", q, k, v, "", "", "lengths", total, *rotary,
        count=3, domain="com.microsoft", num_heads=HEADS, kv_num_heads=KV_HEADS, do_rotary=int(bool(rotary)),
    )  # fmt: skip


WIDE = 16
"""Depth of a head, of which this operator wants a multiple of eight, or of sixteen where it rotates."""


def grouped_query(s: Draft) -> Written:
    q, k, v = s.linear("x", HEADS * WIDE), s.linear("x", KV_HEADS * WIDE), s.linear("x", KV_HEADS * WIDE)
    y, keys, values = _grouped_query(s, q, k, v)
    return Written(y, k, v, keys, values)


def grouped_query_packed(s: Draft) -> Written:
    packed = s.linear("x", (HEADS + 2 * KV_HEADS) * WIDE)
    y, keys, values = _grouped_query(s, packed, "", "")
    return Written(y, packed, packed, keys, values)


def grouped_query_rotary(s: Draft) -> Written:
    packed = s.linear("x", (HEADS + 2 * KV_HEADS) * WIDE)
    table = np.outer(np.arange(16), 10.0 ** -np.linspace(0, 1, WIDE // 2)).astype(np.float32)
    y, _, values = _grouped_query(s, packed, "", "", s.weight(np.cos(table)), s.weight(np.sin(table)))
    return Written(y, packed, packed, None, values)


def multi_head(s: Draft) -> Written:
    q, k, v = (s.linear("x") for _ in range(3))
    y, keys, values = s.outputs(
        "MultiHeadAttention", q, k, v, count=3, domain="com.microsoft", num_heads=HEADS, unidirectional=0
    )
    return Written(y, k, v, keys, values)


def multi_head_with_bias(s: Draft) -> Written:
    """The operator adds the bias: what it adds to keys and values is taken off the neutral ones."""
    q, k, v = (s.linear("x", bias=False) for _ in range(3))
    y, keys, values = s.outputs(
        "MultiHeadAttention", q, k, v, s.normal(3 * WIDTH), count=3, domain="com.microsoft", num_heads=HEADS
    )
    return Written(y, k, v, keys, values)


def multi_head_packed(s: Draft) -> Written:
    packed = s.linear("x", 3 * WIDTH)
    y = s.op("MultiHeadAttention", s.reshape(packed, 0, -1, HEADS, 3, DEPTH), domain="com.microsoft", num_heads=HEADS)
    return Written(y, packed, packed)


def multi_head_packed_keys(s: Draft) -> Written:
    packed = s.linear("x", 2 * WIDTH)
    stacked = s.reshape(packed, 0, -1, HEADS, 2, DEPTH)
    y = s.op("MultiHeadAttention", s.linear("x"), stacked, domain="com.microsoft", num_heads=HEADS)
    return Written(y, packed, packed)


LENGTHS = {"lengths": (TensorProto.INT32, ("batch",))}

RECIPES = {
    "projections apart": Recipe(apart),
    "no bias": Recipe(without_bias),
    "keys that are scaled": Recipe(scaled_keys),
    "a linear layer of two axes": Recipe(by_gemm, ("nk", "")),
    "packed behind Split": Recipe(split),
    "packed behind Slice": Recipe(sliced),
    "packed behind Gather": Recipe(gathered, ("n", "", "k", "")),
    "a cache": Recipe(cached, heads=KV_HEADS, cache=True),
    "repeated heads": Recipe(grouped, heads=KV_HEADS),
    "tokens first": Recipe(tokens_first, ("k", "n", "")),
    "a convolution of one position": Recipe(by_convolution, ("n", "", "k")),
    "a rotary embedding written out": Recipe(rotary_written_out, heads=KV_HEADS, inputs=POSITIONS),
    "a rotary embedding as an op": Recipe(rotary_as_an_op, heads=KV_HEADS, inputs=POSITIONS),
    "a key norm": Recipe(key_norm),
    "a key norm before a rotary embedding": Recipe(key_norm_and_rotary, inputs=POSITIONS),
    "a layer norm of keys": Recipe(layer_norm_of_keys),
    "keys that meet positions as well": Recipe(disentangled),
    "op Attention, 4-D": Recipe(op_attention, heads=KV_HEADS, opset=23),
    "op Attention, 3-D": Recipe(op_attention_packed, heads=KV_HEADS, opset=23),
    "op Attention with a past": Recipe(op_attention_with_past, heads=KV_HEADS, opset=23, cache=True),
    "GroupQueryAttention": Recipe(grouped_query, heads=KV_HEADS, inputs=LENGTHS),
    "GroupQueryAttention, packed": Recipe(grouped_query_packed, heads=KV_HEADS, whole=False, inputs=LENGTHS),
    "GroupQueryAttention, rotary": Recipe(grouped_query_rotary, heads=KV_HEADS, whole=False, inputs=LENGTHS),
    "MultiHeadAttention": Recipe(multi_head),
    "MultiHeadAttention with bias": Recipe(multi_head_with_bias),
    "MultiHeadAttention, packed": Recipe(multi_head_packed, whole=False, runs=False),
    "MultiHeadAttention, keys and values packed": Recipe(multi_head_packed_keys, whole=False, runs=False),
}
"""Keys stand as far back as they are per token."""

NEARER = {
    "a projection that others read": Recipe(read_by_others, ("n", "k", "", "")),
    "queries that are the keys": Recipe(queries_are_keys, ("n", "k", "", "")),
    "tokens on a grid": Recipe(on_a_grid, ("n", "", "", "k")),
    "a norm over tokens": Recipe(norm_over_tokens, ("n", "", "k", "")),
    "values that are moved before their keys": Recipe(values_first, ("n", "", "k", "")),
    "a gate of the input": Recipe(gated_keys, ("n", "", "k", "")),
    "a cache behind new tokens": Recipe(cache_behind, ("n", "", "k", ""), heads=KV_HEADS, cache=True),
    "heads copied by Tile": Recipe(tiled_heads, ("n", "", "k", "")),
}
"""Each resembles one of the recipes, but for something that stops the way back: keys stand nearer to the attention."""
