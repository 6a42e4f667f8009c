"""Small nets that write the same self-attention in another form each: folded heads, windows, Einsum, sinks, ...

A net is two layers `[batch, 16, 12]` -> the same, with residual sums, built node by node with onnx.helper. Tokens are a
grid of 4 x 4 where there are windows, of 2 x 2 tokens each.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

TOKENS, HEADS, KV_HEADS, DEPTH = 16, 4, 2, 3
WIDTH = HEADS * DEPTH
WINDOWS, WINDOW = 4, 4
"""Windows of a sample, and tokens of a window."""

Batch = int | str


class Sketch:
    """Writes nodes and weights; every method answers the name of what it wrote."""

    def __init__(self, *, half: bool = False, seed: int = 0) -> None:
        self.kind = np.dtype(np.float16 if half else np.float32)
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._rng = np.random.default_rng(seed)

    def op(self, op_type: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        name = f"{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], name=f"node/{name}", domain=domain, **attributes))
        return name

    def weight(self, array: Any) -> str:
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def number(self, *values: float) -> str:
        return self.weight(np.array(values, self.kind))

    def sizes(self, *values: int) -> str:
        return self.weight(np.array(values, np.int64))

    def normal(self, *shape: int) -> str:
        scale = 0.5 if self.kind == np.float32 else 0.25  # float16 has no weights below 2**-25
        return self.weight((self._rng.normal(size=shape) * scale).astype(self.kind))

    def reshape(self, x: str, *sizes: int) -> str:
        return self.op("Reshape", x, self.sizes(*sizes))

    def transpose(self, x: str, *perm: int) -> str:
        return self.op("Transpose", x, perm=perm)

    def linear(self, x: str, width: int = WIDTH) -> str:
        """A projection with bias of the last axis, which is `WIDTH` wide."""
        return self.op("Add", self.op("MatMul", x, self.normal(WIDTH, width)), self.normal(width))

    def qkv(self, x: str) -> tuple[str, str, str]:
        return self.linear(x), self.linear(x), self.linear(x)

    def scores(self, q: str, kt: str) -> str:
        return self.op("Mul", self.op("MatMul", q, kt), self.number(DEPTH**-0.5))

    def attend(self, q: str, kt: str, v: str) -> str:
        return self.op("MatMul", self.op("Softmax", self.scores(q, kt), axis=-1), v)


Layer = Callable[[Sketch, str], str]
"""Writes one layer: `[batch, tokens, width]` -> the same."""


@dataclass(frozen=True)
class Form:
    """A net, and what its two sites are."""

    layer: Layer
    map: str = "nhqk"
    """Its layout."""

    parts: int = 1
    heads: int = HEADS
    kv_heads: int = HEADS
    keys: int | None = TOKENS
    """None: not a fixed number."""

    projection: str = "Add"
    """The operator whose result holds keys and values token by token."""

    masked: bool = False
    sums_to_one: bool = True
    self_attention: bool | None = True
    """None: it is not known whether queries and keys are of the same tokens."""

    half: bool = False
    opsets: dict[str, int] = field(default_factory=lambda: {"": 18}, hash=False)

    def proto(self, batch: Batch = "batch") -> onnx.ModelProto:
        sketch = Sketch(half=self.half)
        kind = TensorProto.FLOAT16 if self.half else TensorProto.FLOAT
        x = "x"
        for _ in range(2):
            x = sketch.op("Add", x, self.layer(sketch, x))
        sketch.nodes.append(helper.make_node("Identity", [x], ["out"], name="node/out"))
        shape = [batch, TOKENS, WIDTH]
        made = helper.make_graph(
            sketch.nodes,
            "form",
            [helper.make_tensor_value_info("x", kind, shape)],
            [helper.make_tensor_value_info("out", kind, shape)],
            sketch.weights,
        )
        opsets = [helper.make_opsetid(domain, version) for domain, version in self.opsets.items()]
        model = helper.make_model(made, opset_imports=opsets, producer_name="tests")
        model.ir_version = 8
        onnx.checker.check_model(model, full_check=True)
        return model

    def model(self, batch: Batch = "batch") -> ir.Model:
        return ir.from_proto(self.proto(batch))

    def feed(self, samples: int = 3, seed: int = 1) -> dict[str, np.ndarray]:
        x = np.random.default_rng(seed).normal(size=(samples, TOKENS, WIDTH))
        return {"x": x.astype(np.float16 if self.half else np.float32)}


# Heads


def heads_apart(s: Sketch, x: str, tokens: int = TOKENS, heads: int = HEADS) -> str:
    """`[..., width]` to `[maps, heads, tokens, depth]`."""
    return s.transpose(s.reshape(x, -1, tokens, heads, DEPTH), 0, 2, 1, 3)


def heads_together(s: Sketch, y: str, tokens: int = TOKENS) -> str:
    return s.reshape(s.transpose(y, 0, 2, 1, 3), -1, tokens, WIDTH)


def plain(s: Sketch, x: str) -> str:
    q, k, v = (heads_apart(s, y) for y in s.qkv(x))
    return heads_together(s, s.attend(q, s.transpose(k, 0, 1, 3, 2), v))


def scores_written_into(s: Sketch, x: str) -> str:
    """As MViT's `scores[...] += bias` in TorchScript."""
    q, k, v = (heads_apart(s, y) for y in s.qkv(x))
    scores = s.scores(q, s.transpose(k, 0, 1, 3, 2))
    count = s.op("Squeeze", s.op("Shape", scores, start=0, end=1))
    samples = s.op("Range", s.weight(np.int64(0)), count, s.weight(np.int64(1)))
    where = s.op("Unsqueeze", samples, s.sizes(1))
    written = s.op("ScatterND", scores, where, s.op("Add", scores, s.normal(HEADS, TOKENS, TOKENS)))
    return heads_together(s, s.op("MatMul", s.op("Softmax", written, axis=-1), v))


def heads_in_the_batch(s: Sketch, x: str) -> str:
    q, k, v = (s.reshape(heads_apart(s, y), -1, TOKENS, DEPTH) for y in s.qkv(x))
    y = s.attend(q, s.transpose(k, 0, 2, 1), v)
    return heads_together(s, s.reshape(y, -1, HEADS, TOKENS, DEPTH))


def sequence_first(s: Sketch, x: str) -> str:
    """As torch.nn.MultiheadAttention: `[tokens, batch, width]`, heads folded into the batch."""
    x = s.transpose(x, 1, 0, 2)
    q, k, v = (s.transpose(s.reshape(y, TOKENS, -1, DEPTH), 1, 0, 2) for y in s.qkv(x))
    y = s.attend(q, s.transpose(k, 0, 2, 1), v)
    y = s.reshape(s.transpose(y, 1, 0, 2), TOKENS, -1, WIDTH)
    return s.transpose(y, 1, 0, 2)


def heads_before_the_batch(s: Sketch, x: str) -> str:
    q, k, v = (s.transpose(s.reshape(y, -1, TOKENS, HEADS, DEPTH), 2, 0, 1, 3) for y in s.qkv(x))
    y = s.attend(q, s.transpose(k, 0, 1, 3, 2), v)
    return s.reshape(s.transpose(y, 1, 2, 0, 3), -1, TOKENS, WIDTH)


def heads_outside_the_batch(s: Sketch, x: str) -> str:
    """Folded into one axis, the heads outside: what splitting and concatenating along the batch gives."""
    q, k, v = (
        s.reshape(s.transpose(s.reshape(y, -1, TOKENS, HEADS, DEPTH), 2, 0, 1, 3), -1, TOKENS, DEPTH) for y in s.qkv(x)
    )
    y = s.reshape(s.attend(q, s.transpose(k, 0, 2, 1), v), HEADS, -1, TOKENS, DEPTH)
    return s.reshape(s.transpose(y, 1, 2, 0, 3), -1, TOKENS, WIDTH)


def one_head(s: Sketch, x: str) -> str:
    q, k, v = s.qkv(x)
    return s.attend(q, s.transpose(k, 0, 2, 1), v)


def one_head_on_an_axis(s: Sketch, x: str) -> str:
    axis = s.sizes(1)
    q, k, v = (s.op("Unsqueeze", y, axis) for y in s.qkv(x))
    return s.op("Squeeze", s.attend(q, s.transpose(k, 0, 1, 3, 2), v), axis)


def grouped(s: Sketch, x: str) -> str:
    """Heads that share keys and values on a separate axis, `[batch, kv heads, group, tokens, depth]`."""

    def apart(y: str, group: int) -> str:
        return s.transpose(s.reshape(y, -1, TOKENS, KV_HEADS, group, DEPTH), 0, 2, 3, 1, 4)

    q = apart(s.linear(x), HEADS // KV_HEADS)
    k, v = (apart(s.linear(x, KV_HEADS * DEPTH), 1) for _ in range(2))
    y = s.attend(q, s.transpose(k, 0, 1, 2, 4, 3), v)
    return s.reshape(s.transpose(y, 0, 3, 1, 2, 4), -1, TOKENS, WIDTH)


def grouped_by_expand(s: Sketch, x: str) -> str:
    """Keys and values repeated for the heads that share them."""
    group = HEADS // KV_HEADS

    def repeated(y: str) -> str:
        y = s.op("Unsqueeze", heads_apart(s, y, heads=KV_HEADS), s.sizes(2))
        return s.reshape(s.op("Expand", y, s.sizes(1, 1, group, 1, 1)), -1, HEADS, TOKENS, DEPTH)

    q = heads_apart(s, s.linear(x))
    k, v = (repeated(s.linear(x, KV_HEADS * DEPTH)) for _ in range(2))
    return heads_together(s, s.attend(q, s.transpose(k, 0, 1, 3, 2), v))


def one_head_of_values(s: Sketch, x: str) -> str:
    """Multi-query: all heads share the one head of keys and values by broadcasting."""
    q = heads_apart(s, s.linear(x))
    k, v = (heads_apart(s, s.linear(x, DEPTH), heads=1) for _ in range(2))
    return heads_together(s, s.attend(q, s.transpose(k, 0, 1, 3, 2), v))


# Parts of a sample


def windows_apart(s: Sketch, x: str) -> str:
    """The grid of tokens cut into windows, folded into the batch, as Swin does."""
    x = s.reshape(x, -1, 2, 2, 2, 2, WIDTH)
    return s.reshape(s.transpose(x, 0, 1, 3, 2, 4, 5), -1, WINDOW, WIDTH)


def windows_together(s: Sketch, y: str) -> str:
    y = s.reshape(y, -1, 2, 2, 2, 2, WIDTH)
    return s.reshape(s.transpose(y, 0, 1, 3, 2, 4, 5), -1, TOKENS, WIDTH)


def windows_in_the_batch(s: Sketch, x: str) -> str:
    q, k, v = (heads_apart(s, y, WINDOW) for y in s.qkv(windows_apart(s, x)))
    y = s.attend(q, s.transpose(k, 0, 1, 3, 2), v)
    return windows_together(s, heads_together(s, y, WINDOW))


def windows_by_counted_indices(s: Sketch, x: str) -> str:
    """The same windows, gathered along each side of the grid by indices that are counted, as torch's unfold does."""
    grid = s.reshape(x, -1, 4, 4, WIDTH)
    side = s.op("Squeeze", s.op("Shape", grid, start=1, end=2))
    first = s.op("Range", s.weight(np.int64(0)), side, s.weight(np.int64(2)))
    indices = s.op("Add", s.op("Unsqueeze", first, s.sizes(0)), s.weight(np.array([[0], [1]])))
    found = s.op("Gather", s.op("Gather", grid, indices, axis=1), indices, axis=3)
    apart = s.reshape(s.transpose(found, 0, 2, 4, 1, 3, 5), -1, WINDOW, WIDTH)
    q, k, v = (heads_apart(s, y, WINDOW) for y in s.qkv(apart))
    y = s.attend(q, s.transpose(k, 0, 1, 3, 2), v)
    return windows_together(s, heads_together(s, y, WINDOW))


def windows_with_queries_of_the_sample(s: Sketch, x: str, *, folded: bool = False) -> str:
    """As GCViT: all windows of a sample are asked the same queries, copied for each."""
    apart = windows_apart(s, x)
    k, v = (heads_apart(s, s.linear(apart), WINDOW) for _ in range(2))
    pooled = s.op("ReduceMax", s.reshape(apart, -1, WINDOWS, WINDOW, WIDTH), s.sizes(1), keepdims=1)
    q = heads_apart(s, s.op("Expand", pooled, s.sizes(1, WINDOWS, 1, 1)), WINDOW)
    if folded:
        q, k, v = (s.reshape(y, -1, WINDOW, DEPTH) for y in (q, k, v))
        y = s.reshape(s.attend(q, s.transpose(k, 0, 2, 1), v), -1, HEADS, WINDOW, DEPTH)
    else:
        y = s.attend(q, s.transpose(k, 0, 1, 3, 2), v)
    return windows_together(s, heads_together(s, y, WINDOW))


def windows_and_heads_in_the_batch(s: Sketch, x: str) -> str:
    q, k, v = (s.reshape(heads_apart(s, y, WINDOW), -1, WINDOW, DEPTH) for y in s.qkv(windows_apart(s, x)))
    y = s.reshape(s.attend(q, s.transpose(k, 0, 2, 1), v), -1, HEADS, WINDOW, DEPTH)
    return windows_together(s, heads_together(s, y, WINDOW))


def windows_on_an_axis(s: Sketch, x: str) -> str:
    q, k, v = (s.transpose(s.reshape(y, -1, WINDOWS, WINDOW, HEADS, DEPTH), 0, 1, 3, 2, 4) for y in s.qkv(x))
    y = s.attend(q, s.transpose(k, 0, 1, 2, 4, 3), v)
    return s.reshape(s.transpose(y, 0, 1, 3, 2, 4), -1, TOKENS, WIDTH)


def windows_behind_heads(s: Sketch, x: str) -> str:
    q, k, v = (s.transpose(s.reshape(y, -1, WINDOWS, WINDOW, HEADS, DEPTH), 0, 3, 1, 2, 4) for y in s.qkv(x))
    y = s.attend(q, s.transpose(k, 0, 1, 2, 4, 3), v)
    return s.reshape(s.transpose(y, 0, 2, 3, 1, 4), -1, TOKENS, WIDTH)


def windows_outside_the_batch(s: Sketch, x: str) -> str:
    """Folded into one axis, the windows outside."""
    x = s.reshape(s.transpose(s.reshape(x, -1, WINDOWS, WINDOW, WIDTH), 1, 0, 2, 3), -1, WINDOW, WIDTH)
    q, k, v = (heads_apart(s, y, WINDOW) for y in s.qkv(x))
    y = heads_together(s, s.attend(q, s.transpose(k, 0, 1, 3, 2), v), WINDOW)
    y = s.transpose(s.reshape(y, WINDOWS, -1, WINDOW, WIDTH), 1, 0, 2, 3)
    return s.reshape(y, -1, TOKENS, WIDTH)


def as_image(s: Sketch, x: str) -> str:
    """The grid of tokens with its channels first, `[batch, width, 4, 4]`."""
    return s.reshape(s.transpose(x, 0, 2, 1), -1, WIDTH, 4, 4)


def of_image(s: Sketch, y: str) -> str:
    """`[batch * heads, tokens, depth]` as `[batch, tokens, width]`."""
    return s.transpose(s.reshape(s.transpose(y, 0, 2, 1), -1, WIDTH, TOKENS), 0, 2, 1)


def convolved(s: Sketch, x: str, count: int = 1) -> str:
    return s.op("Conv", x, s.normal(count * WIDTH, WIDTH, 1, 1), s.normal(count * WIDTH))


def tokens_on_two_axes(s: Sketch, x: str) -> str:
    """As BoTNet: one convolution for all three, heads folded into the batch behind it."""
    parts = [f"part_{len(s.nodes)}_{number}" for number in range(3)]
    qkv = convolved(s, as_image(s, x), 3)
    s.nodes.append(helper.make_node("Split", [qkv, s.sizes(*[WIDTH] * 3)], parts, name=f"node/{parts[0]}", axis=1))
    q, k, v = (s.reshape(part, -1, DEPTH, TOKENS) for part in parts)
    return of_image(s, s.attend(s.transpose(q, 0, 2, 1), k, s.transpose(v, 0, 2, 1)))


def tokens_on_two_axes_packed(s: Sketch, x: str) -> str:
    """As CvT: keys and values of one convolution, cut from it where heads stand on an axis."""
    q = s.transpose(s.reshape(convolved(s, as_image(s, x)), -1, DEPTH, TOKENS), 0, 2, 1)
    both = s.reshape(convolved(s, as_image(s, x), 2), -1, 2, HEADS, DEPTH, 4, 4)
    k, v = (s.reshape(s.op("Gather", both, s.weight(np.int64(n)), axis=1), -1, DEPTH, TOKENS) for n in range(2))
    return of_image(s, s.attend(q, k, s.transpose(v, 0, 2, 1)))


def windows_on_two_axes(s: Sketch, x: str) -> str:
    """As HaloNet: windows of the image, each with rows and columns of its own."""

    def apart(y: str) -> str:
        """`[batch * heads, windows, tokens, depth]`."""
        y = s.transpose(s.reshape(y, -1, WIDTH, 2, 2, 2, 2), 0, 1, 2, 4, 3, 5)
        return s.transpose(s.reshape(y, -1, DEPTH, WINDOWS, WINDOW), 0, 2, 3, 1)

    q, k, v = (apart(convolved(s, as_image(s, x))) for _ in range(3))
    y = s.transpose(s.attend(q, s.transpose(k, 0, 1, 3, 2), v), 0, 3, 1, 2)
    y = s.transpose(s.reshape(y, -1, WIDTH, 2, 2, 2, 2), 0, 2, 4, 3, 5, 1)
    return s.reshape(y, -1, TOKENS, WIDTH)


def all_samples_in_one_sequence(s: Sketch, x: str) -> str:
    """As Pixtral: the batch is one long sequence, and a mask keeps the samples apart."""
    x = s.reshape(x, 1, -1, WIDTH)
    q, k, v = (s.transpose(s.reshape(y, 1, -1, HEADS, DEPTH), 0, 2, 1, 3) for y in s.qkv(x))
    scores = s.scores(q, s.transpose(k, 0, 1, 3, 2))
    count = s.op("Squeeze", s.op("Shape", x, start=1, end=2))
    place = s.op("Range", s.weight(np.int64(0)), count, s.weight(np.int64(1)))
    sample = s.op("Div", place, s.weight(np.int64(TOKENS)))
    same = s.op("Equal", s.op("Unsqueeze", sample, s.sizes(1)), s.op("Unsqueeze", sample, s.sizes(0)))
    masked = s.op("Where", same, scores, s.number(-3e4))
    y = s.op("MatMul", s.op("Softmax", masked, axis=-1), v)
    return s.reshape(s.transpose(y, 0, 2, 1, 3), -1, TOKENS, WIDTH)


# Products


def transposed(s: Sketch, x: str) -> str:
    """Values times map: `V^T P^T`."""
    q, k, v = (heads_apart(s, y) for y in s.qkv(x))
    P = s.op("Softmax", s.scores(q, s.transpose(k, 0, 1, 3, 2)), axis=-1)
    y = s.op("MatMul", s.transpose(v, 0, 1, 3, 2), s.transpose(P, 0, 1, 3, 2))
    return s.reshape(s.transpose(y, 0, 3, 1, 2), -1, TOKENS, WIDTH)


def fused_transposed(s: Sketch, x: str) -> str:
    """The same by a FusedMatMul that transposes both."""
    q, k, v = (heads_apart(s, y) for y in s.qkv(x))
    P = s.op("Softmax", s.scores(q, s.transpose(k, 0, 1, 3, 2)), axis=-1)
    y = s.op("FusedMatMul", v, P, domain="com.microsoft", transA=1, transB=1)
    return s.reshape(s.transpose(y, 0, 3, 1, 2), -1, TOKENS, WIDTH)


def einsum(s: Sketch, x: str) -> str:
    q, k, v = (s.reshape(y, -1, TOKENS, HEADS, DEPTH) for y in s.qkv(x))
    scores = s.op("Mul", s.op("Einsum", q, k, equation="bqhd,bkhd->bhqk"), s.number(DEPTH**-0.5))
    y = s.op("Einsum", s.op("Softmax", scores, axis=-1), v, equation="bhqk,bkhd->bqhd")
    return s.reshape(y, -1, TOKENS, WIDTH)


def einsum_of_values_and_map(s: Sketch, x: str) -> str:
    q, k, v = (heads_apart(s, y) for y in s.qkv(x))
    P = s.op("Softmax", s.scores(q, s.transpose(k, 0, 1, 3, 2)), axis=-1)
    y = s.op("Einsum", v, P, equation="bhjd, bhij -> hbid")
    return s.reshape(s.transpose(y, 1, 2, 0, 3), -1, TOKENS, WIDTH)


# What stands around the softmax


def sink(s: Sketch, x: str) -> str:
    """A learned score takes part in the softmax, and its column is sliced off."""
    q, k, v = (heads_apart(s, y) for y in s.qkv(x))
    scores = s.scores(q, s.transpose(k, 0, 1, 3, 2))
    shape = s.op("Concat", s.op("Shape", scores, start=0, end=1), s.sizes(HEADS, TOKENS, 1), axis=0)
    column = s.op("Expand", s.normal(1, HEADS, 1, 1), shape)
    P = s.op("Softmax", s.op("Concat", scores, column, axis=-1), axis=-1)
    P = s.op("Slice", P, s.sizes(0), s.sizes(-1), s.sizes(-1))
    return heads_together(s, s.op("MatMul", P, v))


def gated(s: Sketch, x: str) -> str:
    """A gate of each query and head scales its row."""
    q, k, v = (heads_apart(s, y) for y in s.qkv(x))
    gate = s.transpose(s.op("Sigmoid", s.linear(x, HEADS)), 0, 2, 1)
    P = s.op("Softmax", s.scores(q, s.transpose(k, 0, 1, 3, 2)), axis=-1)
    P = s.op("Mul", P, s.op("Unsqueeze", gate, s.sizes(3)))
    return heads_together(s, s.op("MatMul", P, v))


def head_mask(s: Sketch, x: str) -> str:
    """One head is switched off: its map is zero throughout."""
    q, k, v = (heads_apart(s, y) for y in s.qkv(x))
    P = s.op("Softmax", s.scores(q, s.transpose(k, 0, 1, 3, 2)), axis=-1)
    mask = s.weight(np.array([1, 1, 0, 1], s.kind).reshape(1, HEADS, 1, 1))
    return heads_together(s, s.op("MatMul", s.op("Mul", P, mask), v))


def softmax_of_folded_heads(s: Sketch, x: str) -> str:
    """The softmax sees four axes, the product three."""
    q, k, v = (heads_apart(s, y) for y in s.qkv(x))
    P = s.op("Softmax", s.scores(q, s.transpose(k, 0, 1, 3, 2)), axis=-1)
    y = s.op("MatMul", s.reshape(P, -1, TOKENS, TOKENS), s.reshape(v, -1, TOKENS, DEPTH))
    return heads_together(s, s.reshape(y, -1, HEADS, TOKENS, DEPTH))


def softmax_in_float32(s: Sketch, x: str) -> str:
    q, k, v = (heads_apart(s, y) for y in s.qkv(x))
    scores = s.op("Cast", s.scores(q, s.transpose(k, 0, 1, 3, 2)), to=TensorProto.FLOAT)
    P = s.op("Cast", s.op("Softmax", scores, axis=-1), to=TensorProto.FLOAT16)
    return heads_together(s, s.op("MatMul", P, v))


FOLDED = {"map": "(nh)qk"}
MICROSOFT = {"": 18, "com.microsoft": 1}

FORMS = {
    "plain": Form(plain),
    "scores written into": Form(scores_written_into, masked=True),
    "heads in the batch": Form(heads_in_the_batch, **FOLDED),
    "heads in the batch, sequence first": Form(sequence_first, **FOLDED),
    "heads before the batch": Form(heads_before_the_batch, "hnqk"),
    "heads outside the batch": Form(heads_outside_the_batch, "(hn)qk"),
    "one head": Form(one_head, "nqk", heads=1, kv_heads=1),
    "one head on an axis": Form(one_head_on_an_axis, "n1qk", heads=1, kv_heads=1),
    "grouped": Form(grouped, "nhgqk", kv_heads=KV_HEADS),
    "grouped by Expand": Form(grouped_by_expand, kv_heads=KV_HEADS),
    "one head of values": Form(one_head_of_values, kv_heads=1),
    "windows in the batch": Form(windows_in_the_batch, parts=WINDOWS, keys=WINDOW),
    "windows and heads in the batch": Form(windows_and_heads_in_the_batch, **FOLDED, parts=WINDOWS, keys=WINDOW),
    "windows by counted indices": Form(windows_by_counted_indices, parts=WINDOWS, keys=WINDOW),
    "windows, queries of the sample": Form(
        windows_with_queries_of_the_sample, parts=WINDOWS, keys=WINDOW, self_attention=None
    ),
    "windows and heads in the batch, queries of the sample": Form(
        partial(windows_with_queries_of_the_sample, folded=True),
        **FOLDED,
        parts=WINDOWS,
        keys=WINDOW,
        self_attention=None,
    ),
    "windows on an axis": Form(windows_on_an_axis, "bwhqk", parts=WINDOWS, keys=WINDOW),
    "windows behind heads": Form(windows_behind_heads, "bhwqk", parts=WINDOWS, keys=WINDOW),
    "tokens on two axes": Form(tokens_on_two_axes, **FOLDED, projection="Split"),
    "tokens on two axes, packed": Form(tokens_on_two_axes_packed, **FOLDED, projection="Gather"),
    "windows and tokens on two axes": Form(
        windows_on_two_axes, "(bh)wqk", parts=WINDOWS, keys=WINDOW, projection="Transpose"
    ),
    "all samples in one sequence": Form(all_samples_in_one_sequence, parts=0, keys=None, masked=True),
    "transposed": Form(transposed, "nhkq"),
    "FusedMatMul": Form(fused_transposed, opsets=MICROSOFT),
    "Einsum": Form(einsum),
    "Einsum of values and map": Form(einsum_of_values_and_map),
    "sink": Form(sink, sums_to_one=False),
    "gate": Form(gated, sums_to_one=False),
    "head mask": Form(head_mask, sums_to_one=False),
    "softmax before the heads are folded": Form(softmax_of_folded_heads, **FOLDED),
    "half precision": Form(plain, half=True),
    "half precision, heads in the batch": Form(heads_in_the_batch, **FOLDED, half=True),
    "half precision, windows": Form(windows_in_the_batch, parts=WINDOWS, keys=WINDOW, half=True),
}

REFUSED = {
    "windows outside the batch": (Form(windows_outside_the_batch), "its parts, such as windows, come before"),
}
"""Where maps are not in the order of samples; and the reason."""
