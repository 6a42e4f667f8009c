"""What stops the walk from a softmax is said, and no attention is called none for it."""

from collections.abc import Callable

import onnx_ir as ir
import pytest
from form_nets import DEPTH, HEADS, MICROSOFT, TOKENS, WIDTH, Form, Layer, Sketch, heads_apart, heads_together
from onnx import TensorProto, helper

from atpatch_onnx.matching import explain
from atpatch_onnx.matching.sites import Matches


def found(layer: Layer) -> Matches:
    return explain(Form(layer).model())


def scores_and_values(s: Sketch, x: str) -> tuple[str, str]:
    q, k, v = (heads_apart(s, y) for y in s.qkv(x))
    return s.scores(q, s.transpose(k, 0, 1, 3, 2)), v


def map_and_values(s: Sketch, x: str) -> tuple[str, str]:
    scores, v = scores_and_values(s, x)
    return s.op("Softmax", scores, axis=-1), v


# Heads that are mixed


def by_a_product(s: Sketch, x: str) -> str:
    """As CaiT's linear layer does: heads last, a square of weights, heads back."""
    mixed = s.op("Add", s.op("MatMul", s.transpose(x, 0, 2, 3, 1), s.normal(HEADS, HEADS)), s.normal(HEADS))
    return s.transpose(mixed, 0, 3, 1, 2)


def by_a_convolution(s: Sketch, x: str) -> str:
    return s.op("Conv", x, s.normal(HEADS, HEADS, 1, 1))


def by_an_einsum(s: Sketch, x: str) -> str:
    """As DeepViT's, with a norm behind."""
    mixed = s.op("Einsum", x, s.normal(HEADS, HEADS), equation="bhij,hg->bgij")
    normed = s.op("LayerNormalization", s.transpose(mixed, 0, 2, 3, 1), s.normal(HEADS), s.normal(HEADS), axis=-1)
    return s.transpose(normed, 0, 3, 1, 2)


MIXES = (by_a_product, by_a_convolution, by_an_einsum)


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: mix.__name__)
@pytest.mark.parametrize("before", [False, True], ids=["behind", "before and behind"])
def test_heads_that_are_mixed_behind_the_softmax_are_attention(mix: Callable[[Sketch, str], str], before: bool) -> None:
    def layer(s: Sketch, x: str) -> str:
        scores, v = scores_and_values(s, x)
        p = s.op("Softmax", mix(s, scores) if before else scores, axis=-1)
        return heads_together(s, s.op("MatMul", mix(s, p), v))

    matches = found(layer)
    assert matches.sites == ()
    assert [miss.attention for miss in matches.near_misses] == [True, True]
    reasons = [miss.reason for miss in matches.near_misses]
    assert all(reason.startswith("attention") and "not attention" not in reason for reason in reasons), reasons
    assert all("mixed" in reason or "Conv" in reason or "stands between" in reason for reason in reasons), reasons


@pytest.mark.parametrize("mix", [by_a_product, by_an_einsum], ids=lambda mix: mix.__name__)
def test_heads_that_are_mixed_in_front_of_the_softmax_alone_are_attention(mix: Callable[[Sketch, str], str]) -> None:
    def layer(s: Sketch, x: str) -> str:
        scores, v = scores_and_values(s, x)
        return heads_together(s, s.op("MatMul", s.op("Softmax", mix(s, scores), axis=-1), v))

    assert [(miss.attention, "not attention" in miss.reason) for miss in found(layer).near_misses] == [
        (True, False)
    ] * 2


# What is not followed


@pytest.mark.parametrize(
    ("op_type", "attributes"), [("Sigmoid", {}), ("Abs", {}), ("LpNormalization", {"axis": -1, "p": 1})]
)
def test_an_operator_between_map_and_values_is_named(op_type: str, attributes: dict[str, int]) -> None:
    def layer(s: Sketch, x: str) -> str:
        p, v = map_and_values(s, x)
        return heads_together(s, s.op("MatMul", s.op(op_type, p, **attributes), v))

    misses = found(layer).near_misses
    assert [miss.attention for miss in misses] == [True, True]
    assert all(f"{op_type} stands between the softmax and the values" in miss.reason for miss in misses)


@pytest.mark.parametrize("op_type", ["Relu", "Sigmoid"])
def test_an_operator_between_scores_and_softmax_is_named(op_type: str) -> None:
    def layer(s: Sketch, x: str) -> str:
        scores, v = scores_and_values(s, x)
        return heads_together(s, s.op("MatMul", s.op("Softmax", s.op(op_type, scores), axis=-1), v))

    misses = found(layer).near_misses
    assert [miss.attention for miss in misses] == [True, True]
    assert all(f"{op_type} stands between the softmax and the product" in miss.reason for miss in misses)


@pytest.mark.parametrize("operator", ["MatMulIntegerToFloat", "MatMulInteger", "DynamicQuantizeMatMul"])
def test_a_map_that_meets_its_values_as_whole_numbers_is_attention(operator: str) -> None:
    """As dynamic quantization of every product writes it, before and after onnxruntime's optimizer."""

    def numbers(s: Sketch, x: str) -> list[str]:
        names = [f"{x}_{part}" for part in ("numbers", "scale", "zero")]
        s.nodes.append(helper.make_node("DynamicQuantizeLinear", [x], names))
        return names

    def layer(s: Sketch, x: str) -> str:
        p, v = map_and_values(s, x)
        value, scale, zero = numbers(s, v)
        if operator == "DynamicQuantizeMatMul":
            return heads_together(s, s.op(operator, p, value, scale, zero, domain="com.microsoft"))
        maps, own, offset = numbers(s, p)
        if operator == "MatMulIntegerToFloat":
            y = s.op(operator, maps, value, own, scale, offset, zero, domain="com.microsoft")
        else:
            whole = s.op("Cast", s.op(operator, maps, value, offset, zero), to=TensorProto.FLOAT)
            y = s.op("Mul", whole, s.op("Mul", own, scale))
        return heads_together(s, y)

    misses = explain(Form(layer, opsets=MICROSOFT).model()).near_misses
    assert [miss.attention for miss in misses] == [True, True]
    assert all("quantize only products with weights (MatMulConstBOnly)" in miss.reason for miss in misses)


@pytest.mark.parametrize(("tokens", "width"), [("seq", 5), (9, 16)])
def test_a_map_without_an_axis_of_samples_is_attention(tokens: int | str, width: int) -> None:
    s = Sketch()
    q, k, v = (s.op("MatMul", "x", s.normal(width, width)) for _ in range(3))
    y = s.op("MatMul", s.op("Softmax", s.op("MatMul", q, s.transpose(k, 1, 0)), axis=-1), v)
    (miss,) = explain(_model(s, y, [tokens, width])).near_misses
    assert miss.attention
    assert "no axis of samples" in miss.reason


# What is no attention, for a reason


def routed(s: Sketch) -> str:
    chosen = "chosen"
    s.nodes.append(helper.make_node("TopK", [s.linear("x", 8), s.sizes(2)], [chosen, "where"], name="top"))
    return s.op("Softmax", chosen, axis=-1)


def pooled(s: Sketch) -> str:
    weights = s.op("Softmax", s.transpose(s.linear("x", 1), 0, 2, 1), axis=-1)
    return s.op("MatMul", weights, "x")


def the_same_for_all(s: Sketch) -> str:
    return s.op("MatMul", s.op("Softmax", s.normal(TOKENS, TOKENS), axis=-1), "x")


def of_a_convolution(s: Sketch) -> str:
    return s.op("Softmax", s.op("Conv", s.transpose("x", 0, 2, 1), s.normal(4, WIDTH, 3)), axis=1)


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (routed, "linear layer"),
        (pooled, "linear layer"),
        (the_same_for_all, "the same for every input"),
        (of_a_convolution, "convolution"),
    ],
)
def test_what_is_no_attention_has_a_reason(net: Callable[[Sketch], str], reason: str) -> None:
    s = Sketch()
    (miss,) = explain(_model(s, net(s), ["batch", TOKENS, WIDTH])).near_misses
    assert not miss.attention
    assert miss.reason.startswith("not attention: its scores")
    assert reason in miss.reason


def _model(s: Sketch, y: str, shape: list[int | str]) -> ir.Model:
    made = helper.make_graph(
        s.nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(y, TensorProto.FLOAT, None)],
        s.weights,
    )
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)])
    proto.ir_version = 8
    return ir.from_proto(proto)


# A map that several products read


def with_relative_values(s: Sketch, p: str, v: str) -> str:
    """As in VITS: the map, shifted such that its columns are distances, times a table."""
    padded = s.op("Pad", p, s.sizes(0, 0, 0, 0, 0, 0, 0, TOKENS))
    flat, width = s.reshape(padded, -1, HEADS, 2 * TOKENS * TOKENS), 2 * TOKENS - 1
    cut = s.op("Slice", flat, s.sizes(0), s.sizes(TOKENS * width), s.sizes(2))
    shifted = s.reshape(cut, -1, HEADS, TOKENS, width)
    return s.op("Add", s.op("MatMul", p, v), s.op("MatMul", shifted, s.normal(2 * TOKENS - 1, DEPTH)))


def with_a_table(s: Sketch, p: str, v: str) -> str:
    return s.op("Add", s.op("MatMul", p, v), s.op("MatMul", p, s.normal(TOKENS, DEPTH)))


def with_a_convolution(s: Sketch, p: str, v: str) -> str:
    gate = s.op("Sigmoid", s.op("ReduceMean", s.op("Conv", p, s.normal(HEADS, HEADS, 1, 1)), s.sizes(-1), keepdims=1))
    return s.op("Mul", s.op("MatMul", p, v), gate)


@pytest.mark.parametrize("values", [with_relative_values, with_a_table, with_a_convolution], ids=lambda v: v.__name__)
def test_what_else_a_map_goes_into_is_said(values: Callable[[Sketch, str, str], str]) -> None:
    def layer(s: Sketch, x: str) -> str:
        p, v = map_and_values(s, x)
        return heads_together(s, values(s, p, v))

    matches = found(layer)
    assert len(matches.sites) == 2
    assert len(matches.near_misses) == 2
    assert all(miss.attention and "is left as it is" in miss.reason for miss in matches.near_misses)


def test_a_map_that_is_handed_out_or_counted_is_nothing_to_say() -> None:
    def layer(s: Sketch, x: str) -> str:
        p, v = map_and_values(s, x)
        s.op("ReduceMean", p, s.sizes(1), keepdims=0)
        return heads_together(s, s.op("MatMul", p, v))

    assert found(layer).near_misses == ()


@pytest.mark.parametrize("cut", ["Slice", "Gather", "Split"])
def test_a_head_that_serves_another_product_is_not_called_block_sparse(cut: str) -> None:
    """As in Zipformer: the first head of the map meets values of its own."""

    def layer(s: Sketch, x: str) -> str:
        p, v = map_and_values(s, x)
        if cut == "Slice":
            first = s.op("Slice", p, s.sizes(0), s.sizes(1), s.sizes(1))
        elif cut == "Gather":
            first = s.op("Gather", p, s.sizes(0), axis=1)
        else:
            s.nodes.append(helper.make_node("Split", [p, s.sizes(1, HEADS - 1)], [f"{p}_one", f"{p}_rest"], axis=1))
            first = f"{p}_one"
        other = s.op("MatMul", first, v)
        return heads_together(s, s.op("Add", s.op("MatMul", p, v), other))

    misses = found(layer).near_misses
    assert misses
    assert all(miss.attention for miss in misses)
    assert not any("block-sparse" in miss.reason for miss in misses), misses
