"""What stops the walk from a softmax is said, and no attention is called none for it."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from form_nets import MICROSOFT, TOKENS, WIDTH, Form, Layer, Sketch, heads_apart, heads_together
from onnx import TensorProto, helper

from atpatch_onnx.matching import explain
from atpatch_onnx.matching.sites import Matches
from atpatch_onnx.measuring.rehearse import rehearse


def found(layer: Layer) -> Matches:
    return explain(Form(layer).model())


def scores_and_values(s: Sketch, x: str) -> tuple[str, str]:
    q, k, v = (heads_apart(s, y) for y in s.qkv(x))
    return s.scores(q, s.transpose(k, 0, 1, 3, 2)), v


def map_and_values(s: Sketch, x: str) -> tuple[str, str]:
    scores, v = scores_and_values(s, x)
    return s.op("Softmax", scores, axis=-1), v


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


def of_two_axes(s: Sketch, x: str, width: int) -> str:
    """One head, and one sample, `[tokens, width]`."""
    q, k, v = (s.op("MatMul", x, s.normal(width, width)) for _ in range(3))
    return s.op("MatMul", s.op("Softmax", s.op("MatMul", q, s.transpose(k, 1, 0)), axis=-1), v)


@pytest.mark.parametrize("shape", [["seq", 5], [9, 16], [1, "seq", 5], [1, 9, 16]])
def test_a_map_of_the_only_sample_is_patched(shape: list[int | str]) -> None:
    s = Sketch()
    x = "x" if len(shape) == 2 else s.op("Squeeze", "x", s.sizes(0))
    model = _model(s, of_two_axes(s, x, int(shape[-1])), shape)
    matches = explain(model)
    assert matches.near_misses == ()
    (site,) = matches.sites
    assert (site.map_layout, site.parts, site.heads) == ("qk", 1, 1)
    result = rehearse(model)
    assert result.passed, result.failures


def test_a_map_without_an_axis_of_samples_is_attention() -> None:
    """The first sample's alone, of several."""
    s = Sketch()
    first = s.op("Gather", "x", s.weight(np.int64(0)), axis=0)
    (miss,) = explain(_model(s, of_two_axes(s, first, WIDTH), ["batch", TOKENS, WIDTH])).near_misses
    assert miss.attention
    assert "no axis of samples" in miss.reason


@pytest.mark.parametrize("nonlinear", ["Tanh", "Relu"])
@pytest.mark.parametrize("biased", [False, True])
def test_additive_attention_is_attention(nonlinear: str, biased: bool) -> None:
    """As Bahdanau's: weights times a sum of each query and each key."""

    def layer(s: Sketch, x: str) -> str:
        q, k, v = s.qkv(x)
        both = s.op("Add", s.op("Unsqueeze", q, s.sizes(2)), s.op("Unsqueeze", k, s.sizes(1)))
        both = s.op("Add", both, s.normal(WIDTH)) if biased else both
        scores = s.op("MatMul", s.op(nonlinear, both), s.normal(WIDTH, 1))
        return s.op("MatMul", s.op("Softmax", s.op("Squeeze", scores, s.sizes(3)), axis=-1), v)

    misses = found(layer).near_misses
    assert [miss.attention for miss in misses] == [True, True]
    assert all("additive attention" in miss.reason for miss in misses)


@pytest.mark.parametrize("how", ["distances", "products"])
def test_scores_of_each_pair_are_attention(how: str) -> None:
    """As distances of queries and keys, or a product that is written out."""

    def layer(s: Sketch, x: str) -> str:
        q, k, v = s.qkv(x)
        pair = s.op("Unsqueeze", q, s.sizes(2)), s.op("Unsqueeze", k, s.sizes(1))
        if how == "distances":
            apart = s.op("Sub", *pair)
            each = s.op("Neg", s.op("Mul", apart, apart))
        else:
            each = s.op("Mul", *pair)
        scores = s.op("ReduceSum", each, s.sizes(-1), keepdims=0)
        return s.op("MatMul", s.op("Softmax", scores, axis=-1), v)

    misses = found(layer).near_misses
    assert [miss.attention for miss in misses] == [True, True]
    assert all("each pair of entries" in miss.reason for miss in misses)


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
