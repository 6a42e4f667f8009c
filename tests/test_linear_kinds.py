"""Linear layers of every kind keep positions: sites behind them share a token axis; what is not known is said."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from form_nets import HEADS, MICROSOFT, TOKENS, WIDTH, Form, Sketch, heads_apart, heads_together
from onnx import TensorProto, helper

from atpatch_onnx.matching import explain
from atpatch_onnx.matching.shapes import told
from atpatch_onnx.measuring.rehearse import rehearse

Linear = Callable[[Sketch, str], str]
"""Writes a linear layer of `WIDTH` features."""


def in_4_bits(s: Sketch, x: str) -> str:
    packed = s.weight(np.random.default_rng(len(s.nodes)).integers(0, 256, (WIDTH, 1, 8), np.uint8))
    scales = s.weight(np.full(WIDTH, 0.05, np.float32))
    return s.op(
        "MatMulNBits", x, packed, scales, domain="com.microsoft", K=WIDTH, N=WIDTH, bits=4, block_size=16
    )  # fmt: skip


def in_4_bit_floats(s: Sketch, x: str) -> str:
    packed = s.weight(np.random.default_rng(len(s.nodes)).integers(0, 256, WIDTH * WIDTH // 2, np.uint8))
    scales = s.weight(np.full(9, 0.3, np.float32))
    return s.op(
        "MatMulBnb4", x, packed, scales, domain="com.microsoft", K=WIDTH, N=WIDTH, quant_type=1, block_size=16
    )  # fmt: skip


def whole_numbers(s: Sketch) -> str:
    return s.weight(np.random.default_rng(len(s.nodes)).integers(0, 256, (WIDTH, WIDTH), np.uint8))


def of_whole_numbers(s: Sketch, x: str) -> str:
    """As dynamic quantization and onnxruntime's optimizer write it."""
    numbers, scale, zero = (f"{x}_{len(s.nodes)}_{part}" for part in ("numbers", "scale", "zero"))
    s.nodes.append(helper.make_node("DynamicQuantizeLinear", [x], [numbers, scale, zero]))
    weights = (s.weight(np.array(0.01, np.float32)), s.weight(np.array(128, np.uint8)))
    table = whole_numbers(s)
    return s.op(
        "MatMulIntegerToFloat", numbers, table, scale, weights[0], zero, weights[1], domain="com.microsoft"
    )  # fmt: skip


def dynamically_quantized(s: Sketch, x: str) -> str:
    scale, zero = s.weight(np.array(0.01, np.float32)), s.weight(np.array(128, np.uint8))
    return s.op("DynamicQuantizeMatMul", x, whole_numbers(s), scale, zero, domain="com.microsoft")


def between_conversions(s: Sketch, x: str) -> str:
    """QLinearMatMul between QuantizeLinear and DequantizeLinear."""
    scale, zero = s.weight(np.array(0.05, np.float32)), s.weight(np.array(128, np.uint8))
    numbers = s.op("QuantizeLinear", x, scale, zero)
    y = s.op("QLinearMatMul", numbers, scale, zero, whole_numbers(s), scale, zero, scale, zero)
    return s.op("DequantizeLinear", y, scale, zero)


def gemm(s: Sketch, x: str) -> str:
    y = s.op("Gemm", s.reshape(x, -1, WIDTH), s.normal(WIDTH, WIDTH), s.normal(WIDTH), transB=1)
    return s.reshape(y, -1, TOKENS, WIDTH)


def gemm_with_activation(s: Sketch, x: str) -> str:
    weights = (s.normal(WIDTH, WIDTH), s.normal(WIDTH))
    y = s.op(
        "FusedGemm", s.reshape(x, -1, WIDTH), *weights, domain="com.microsoft", activation="LeakyRelu",
        activation_alpha=0.9,
    )  # fmt: skip
    return s.reshape(y, -1, TOKENS, WIDTH)


def fused_product(s: Sketch, x: str) -> str:
    return s.op("FusedMatMul", x, s.normal(WIDTH, WIDTH), domain="com.microsoft", transB=1, alpha=0.5)


def convolution(s: Sketch, x: str) -> str:
    return s.transpose(s.op("Conv", s.transpose(x, 0, 2, 1), s.normal(WIDTH, WIDTH, 1)), 0, 2, 1)


def einsum(s: Sketch, x: str) -> str:
    return s.op("Einsum", x, s.normal(WIDTH, WIDTH), equation="btc,cd->btd")


KINDS = (
    in_4_bits,
    in_4_bit_floats,
    of_whole_numbers,
    dynamically_quantized,
    between_conversions,
    gemm,
    gemm_with_activation,
    fused_product,
    convolution,
    einsum,
)


def net(linear: Linear) -> Form:
    """Self-attention with a norm in front and a projection behind, all linear layers of one kind."""

    def layer(s: Sketch, x: str) -> str:
        normed = s.op("LayerNormalization", x, s.normal(WIDTH), s.normal(WIDTH), axis=-1)
        q, k, v = (heads_apart(s, s.op("Add", linear(s, normed), s.normal(WIDTH))) for _ in range(3))
        y = heads_together(s, s.attend(q, s.transpose(k, 0, 1, 3, 2), v))
        return linear(s, y)

    return Form(layer, opsets=MICROSOFT)


kinds = pytest.mark.parametrize("linear", KINDS, ids=lambda linear: linear.__name__)


@kinds
def test_sites_behind_it_share_a_token_axis(linear: Linear) -> None:
    matches = explain(net(linear).model())
    assert [miss.reason for miss in matches.near_misses] == []
    assert [(site.heads, site.queries, site.keys) for site in matches.sites] == [(HEADS, TOKENS, TOKENS)] * 2
    assert [site.self_attention for site in matches.sites] == [True, True]
    assert len({site.token_axis for site in matches.sites}) == 1


@kinds
def test_a_patch_behind_it_is_exact(linear: Linear) -> None:
    form = net(linear)
    result = rehearse(form.model(), form.feed(), threads=1, conditional=[False])
    assert result.passed, result.failures


# Channels first


def channels_first(s: Sketch, x: str, *, split: bool) -> str:
    """As YOLO's C2PSA: 1x1 convolutions, heads on the channels, the map on the right."""
    side = 4
    image = s.reshape(s.transpose(x, 0, 2, 1), 0, WIDTH, side, side)
    qkv = s.reshape(s.op("Conv", image, s.normal(3 * WIDTH, WIDTH, 1, 1)), 0, HEADS, 9, side * side)
    names = [f"{qkv}_{part}" for part in "qkv"]
    if split:
        s.nodes.append(helper.make_node("Split", [qkv, s.sizes(3, 3, 3)], names, axis=2))
    else:
        names = [s.op("Slice", qkv, s.sizes(3 * at), s.sizes(3 * at + 3), s.sizes(2)) for at in range(3)]
    q, k, v = names
    p = s.op("Softmax", s.scores(s.transpose(q, 0, 1, 3, 2), k), axis=-1)
    y = s.reshape(s.op("MatMul", v, s.transpose(p, 0, 1, 3, 2)), 0, WIDTH, side, side)
    return s.transpose(s.reshape(s.op("Conv", y, s.normal(WIDTH, WIDTH, 1, 1)), 0, WIDTH, side * side), 0, 2, 1)


@pytest.mark.parametrize("split", [True, False])
def test_heads_on_channels_are_self_attention_on_one_axis(split: bool) -> None:
    matches = explain(Form(lambda s, x: channels_first(s, x, split=split)).model())
    assert [site.self_attention for site in matches.sites] == [True, True]
    assert len({site.token_axis for site in matches.sites}) == 1


# What is not known


def behind_an_unknown_operator(s: Sketch, x: str) -> str:
    """Each projection by an operator that nobody here knows, which keeps the shape."""
    q, k, v = (heads_apart(s, s.linear(s.op("Mystery", x, domain="com.microsoft"))) for _ in range(3))
    return heads_together(s, s.attend(q, s.transpose(k, 0, 1, 3, 2), v))


def test_what_is_not_known_is_not_called_cross_attention() -> None:
    s = Sketch()
    y = behind_an_unknown_operator(s, "x")
    matches = explain(_model(s, y))
    (site,) = matches.sites
    assert site.self_attention is None
    assert "is not known" in matches.carry_note(site)


def test_weights_that_are_inputs_too_are_weights() -> None:
    """As in files of IR version 3, where every initializer is an input."""
    proto = Form(lambda s, x: channels_first(s, x, split=True)).proto()
    for tensor in proto.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    matches = explain(ir.from_proto(proto))
    assert [site.self_attention for site in matches.sites] == [True, True]
    assert len({site.token_axis for site in matches.sites}) == 1


# What makes tokens


def encoded(s: Sketch, text: str) -> str:
    """Categories as numbers, as scikit-learn's converters write it."""
    s.nodes.append(
        helper.make_node(
            "LabelEncoder",
            [text],
            ["encoded"],
            domain="ai.onnx.ml",
            keys_strings=["a", "b"],
            values_int64s=[0, 1],
            default_int64=2,
        )
    )
    return "encoded"


def tokenized(s: Sketch, text: str) -> str:
    ids = s.op("BertTokenizer", text, domain="ai.onnx.contrib")
    return s.op("Unsqueeze", ids, s.sizes(0))


def tokenized_in_a_batch(s: Sketch, text: str) -> str:
    return s.op("GPT2Tokenizer", text, domain="ai.onnx.contrib")


@pytest.mark.parametrize(
    ("read", "shape", "keys"),
    [
        (encoded, ["batch", "columns"], "columns"),
        (tokenized, [1], "tokens"),
        (tokenized_in_a_batch, ["batch"], "tokens"),
    ],
)
def test_sites_behind_what_reads_texts_share_a_token_axis(
    read: Callable[[Sketch, str], str], shape: list[int | str], keys: str
) -> None:
    s = Sketch()
    x = s.op("Gather", s.normal(30, WIDTH), read(s, "text"))
    for _ in range(2):
        q, k, v = (s.transpose(s.reshape(s.linear(x), 0, -1, HEADS, 3), 0, 2, 1, 3) for _ in range(3))
        y = s.attend(q, s.transpose(k, 0, 1, 3, 2), v)
        x = s.op("Add", x, s.linear(s.reshape(s.transpose(y, 0, 2, 1, 3), 0, -1, WIDTH)))
    made = helper.make_graph(
        s.nodes,
        "net",
        [helper.make_tensor_value_info("text", TensorProto.STRING, shape)],
        [helper.make_tensor_value_info(x, TensorProto.FLOAT, None)],
        s.weights,
    )
    opsets = [helper.make_opsetid(*one) for one in (("", 18), ("ai.onnx.ml", 3), ("ai.onnx.contrib", 1))]
    matches = explain(ir.from_proto(helper.make_model(made, opset_imports=opsets)))
    assert [(site.self_attention, site.parts) for site in matches.sites] == [(True, 1)] * 2
    assert all(str(site.keys).endswith(keys) for site in matches.sites), "a tokenizer's are named after its result"
    assert len({site.token_axis for site in matches.sites}) == 1


# Names of sizes


@pytest.mark.parametrize("positions", [4, 7, 12, 16, 20, 40])
@pytest.mark.parametrize("extra", [0, 1], ids=["tokens", "a class token beside them"])
def test_a_length_is_not_called_the_batch_for_few_learned_positions(positions: int, extra: int) -> None:
    s = Sketch()
    x = s.op("Gather", s.normal(30, WIDTH), "ids")
    length = s.op("Gather", s.op("Shape", "ids"), s.sizes(1), axis=0)
    if extra:
        one = s.op("Concat", s.op("Gather", s.op("Shape", "ids"), s.sizes(0), axis=0), s.sizes(1, WIDTH), axis=0)
        x = s.op("Concat", s.op("Expand", s.normal(1, 1, WIDTH), one), x, axis=1)
        length = s.op("Add", length, s.sizes(1))
    x = s.op("Add", x, s.op("Slice", s.normal(positions + extra, WIDTH), s.sizes(0), length, s.sizes(0)))
    sizes = s.op("Concat", s.sizes(0, 0, HEADS, WIDTH // HEADS), axis=0)
    q, k, v = (s.transpose(s.op("Reshape", s.linear(x), sizes), 0, 2, 1, 3) for _ in range(3))
    y = s.op("Identity", s.attend(q, s.transpose(k, 0, 1, 3, 2), v))
    (site,) = explain(_model(s, y, ids=True)).sites
    wanted = "tokens + 1" if extra else "tokens"
    assert (site.queries, site.keys, site.self_attention) == (wanted, wanted, True)


def test_sides_of_an_image_are_told_in_patches() -> None:
    s = Sketch()
    x = s.op("Conv", "image", s.normal(WIDTH, 3, 4, 4), strides=[4, 4])
    x = s.transpose(s.reshape(x, 0, WIDTH, -1), 0, 2, 1)
    q, k, v = (s.transpose(s.reshape(s.linear(x), 0, -1, HEADS, 3), 0, 2, 1, 3) for _ in range(3))
    y = s.op("Identity", s.attend(q, s.transpose(k, 0, 1, 3, 2), v))
    made = helper.make_graph(
        s.nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, "height", "width"])],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, None)],
        s.weights,
    )
    (site,) = explain(ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)]))).sites
    assert (site.queries, site.keys) == ("height/4 * width/4",) * 2


@pytest.mark.parametrize("size", ["size_149_349", "unk__621", "2*unk__3 + 1"])
def test_names_that_mean_nothing_are_not_told(size: str) -> None:
    assert told(size) is None


@pytest.mark.parametrize("size", ["seq", "2*seq + 1", 7, None, "resize_1_2"])
def test_other_sizes_are(size: str | int | None) -> None:
    assert told(size) == size


def _model(s: Sketch, y: str, *, ids: bool = False) -> ir.Model:
    given = helper.make_tensor_value_info(
        "ids" if ids else "x",
        TensorProto.INT64 if ids else TensorProto.FLOAT,
        ["batch", "tokens"] if ids else ["batch", TOKENS, WIDTH],
    )
    made = helper.make_graph(
        s.nodes, "net", [given], [helper.make_tensor_value_info(y, TensorProto.FLOAT, None)], s.weights
    )  # fmt: skip
    unknown = (node.output[0] for node in s.nodes if node.op_type == "Mystery")
    shape = ["batch", TOKENS, WIDTH]
    made.value_info.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in unknown)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(made, opset_imports=opsets))
