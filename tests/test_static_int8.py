"""Bases that were quantized statically, before the patch: matched as the float model is, patched, every bit kept."""

import functools
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from form_nets import DEPTH, FORMS, HEADS, TOKENS, WIDTH, Form, Sketch, heads_apart, heads_together
from hypothesis import given, settings
from hypothesis import strategies as st
from models import draw_patch, fire_on_some, run
from onnx import TensorProto, helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.probe import key_output, mass_output, probe, value_output
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.graph.values import find_value
from atpatch_onnx.matching import explain
from atpatch_onnx.matching.plain import in_plain_operators
from atpatch_onnx.matching.sites import Quantization
from atpatch_onnx.measuring.rehearse import rehearse
from atpatch_onnx.measuring.verify import verify

pytestmark = pytest.mark.filterwarnings("ignore")
"""Warnings of the quantizer, which are not ours."""

OPERATORS, PAIRS = QuantFormat.QOperator, QuantFormat.QDQ
LINEAR: dict[str, Any] = {"op_types_to_quantize": ["MatMul", "Gemm"], "extra_options": {"MatMulConstBOnly": True}}
WAYS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "linear layers only": LINEAR,
    "products only": {"op_types_to_quantize": ["MatMul"]},
    "signed, by channel": {
        "activation_type": QuantType.QInt8,
        "weight_type": QuantType.QInt8,
        "per_channel": True,
        "extra_options": {"ActivationSymmetric": True},
    },
    "16 bits": {"activation_type": QuantType.QUInt16},
    "operators": {"quant_format": OPERATORS},
    "operators, linear layers only": {"quant_format": OPERATORS, **LINEAR},
}
"""Options of onnxruntime's `quantize_static`, by name."""

NETS = ("plain", "heads in the batch, sequence first", "one head", "windows in the batch")


class Reader(CalibrationDataReader):
    """Three batches to calibrate on."""

    def __init__(self, form: Form) -> None:
        self.feeds = iter([form.feed(seed=seed) for seed in range(3)])

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.feeds, None)


@functools.cache
def quantized(net: str, way: str) -> onnx.ModelProto:
    with TemporaryDirectory() as folder:
        before, after = (Path(folder) / name for name in ("float.onnx", "int8.onnx"))
        onnx.save(ALL[net].proto(), before)
        quantize_static(before, after, Reader(ALL[net]), **{"quant_format": PAIRS, **WAYS[way]})
        return onnx.load(after)


def packed(s: Sketch, x: str, cut: str) -> str:
    """Queries, keys and values of one projection without a bias, as a Slice, a Split or a Gather takes them apart."""
    qkv = s.op("MatMul", x, s.normal(WIDTH, 3 * WIDTH))
    if cut == "Gather":
        apart = s.transpose(s.reshape(qkv, -1, TOKENS, 3, HEADS, DEPTH), 2, 0, 3, 1, 4)
        q, k, v = (s.op("Gather", apart, s.weight(np.array(at, np.int64)), axis=0) for at in range(3))
    elif cut == "Slice":
        ends = [s.sizes(WIDTH * at) for at in range(4)]
        q, k, v = (heads_apart(s, s.op("Slice", qkv, *ends[at : at + 2], s.sizes(2))) for at in range(3))
    else:
        names = [f"{qkv}_{name}" for name in "qkv"]
        s.nodes.append(helper.make_node("Split", [qkv, s.sizes(WIDTH, WIDTH, WIDTH)], names, axis=2))
        q, k, v = (heads_apart(s, name) for name in names)
    return heads_together(s, s.attend(q, s.transpose(k, 0, 1, 3, 2), v))


PACKED = {
    f"packed, {cut}": Form(lambda s, x, cut=cut: packed(s, x, cut))  # type: ignore[misc]
    for cut in ("Slice", "Split", "Gather")
}
ALL = {**FORMS, **PACKED}


def model(net: str, way: str) -> ir.Model:
    return ir.from_proto(quantized(net, way))


nets = pytest.mark.parametrize("net", NETS)
ways = pytest.mark.parametrize("way", WAYS)


@nets
@ways
def test_its_sites_are_those_of_the_float_model(net: str, way: str) -> None:
    expected, found = explain(FORMS[net].model()), explain(model(net, way))
    assert [miss.reason for miss in found.near_misses] == []
    for one, other in zip(found.sites, expected.sites, strict=True):
        assert (one.map_layout, one.parts, one.heads) == (other.map_layout, other.parts, other.heads)
        assert (one.queries, one.keys, one.self_attention) == (other.queries, other.keys, True)
        assert one.token_axis == other.token_axis
        assert (one.key.heads, one.key.depth) == (other.key.heads, other.key.depth)


@nets
@ways
def test_a_patch_of_it_is_exact(net: str, way: str) -> None:
    result = rehearse(model(net, way), FORMS[net].feed(), threads=1)
    assert result.passed, result.failures


@pytest.mark.parametrize("net", PACKED)
@pytest.mark.parametrize("way", ["defaults", "linear layers only", "operators, linear layers only"])
def test_a_patch_of_a_packed_projection_is_exact(net: str, way: str) -> None:
    base = model(net, way)
    assert len(explain(base).sites) == 2
    result = rehearse(base, PACKED[net].feed(), threads=1)
    assert result.passed, result.failures


@pytest.mark.parametrize("way", ["defaults", "operators"])
@pytest.mark.parametrize("conditional", [True, False])
def test_it_is_verified(way: str, conditional: bool) -> None:
    base, feed = model("plain", way), FORMS["plain"].feed(samples=6)
    patched = bake(base, fire_on_some(base, draw_patch(base), feed), conditional=conditional)
    pairs = DebugSet.from_pairs(feed, FORMS["plain"].feed(samples=6, seed=7))
    verify(base, patched, pairs, batch_size=4).raise_if_failed()


@pytest.mark.parametrize("way", ["defaults", "operators"])
def test_what_a_fit_collects_are_the_floats_that_numbers_stand_for(way: str) -> None:
    base, feed = model("plain", way), FORMS["plain"].feed()
    sites = explain(base).sites
    outputs = run(probe(base, sites, masses=True), feed)
    floats = run(probe(FORMS["plain"].model(), sites_of_float := explain(FORMS["plain"].model()).sites), feed)
    for site, other in zip(sites, sites_of_float, strict=True):
        assert site.shows_map is (way == "defaults"), "QLinearMatMul keeps it to itself"
        for output in (key_output, value_output):
            found, expected = outputs[output(site)], floats[output(other)]
            assert found.dtype == np.float32
            assert found.shape == expected.shape
            assert np.abs(found - expected).max() < 0.1 * np.abs(expected).max(), "8 bits, over two layers"
        mass = mass_output(site)
        assert (mass is not None) is site.shows_map
        if mass is not None:
            assert np.allclose(outputs[mass].sum(axis=1), 1, atol=0.05), "shares of 8 bits"


@ways
def test_nothing_is_put_into_the_midst_of_what_runs_on_whole_numbers(way: str) -> None:
    base = model("plain", way)
    for site in explain(base).sites:
        for place in (site.key, site.value):
            value = find_value(base.graph, place.value)
            producer = value.producer()
            assert producer is not None
            if place.quantization is None:
                assert producer.op_type == "Add"
                assert not any(user.op_type == "QuantizeLinear" for user in value.consumers())
            else:
                assert producer.op_type in ("QuantizeLinear", "QLinearAdd", "QLinearMatMul", "Transpose", "Reshape")


def test_an_operator_of_whole_numbers_is_read_as_one_of_floats_between_conversions() -> None:
    base = model("plain", "operators")
    plain = in_plain_operators(base)
    assert not any(node.op_type.startswith("QLinear") for node in plain.model.graph)
    assert {"MatMul", "Softmax", "Add"} <= {node.op_type for node in plain.model.graph}
    named = {value.name for node in base.graph for value in node.outputs}
    assert set(plain.stands_for.values()) <= named
    assert not named & set(plain.stands_for)
    assert {value.name for node in plain.model.graph for value in node.outputs} == named | set(plain.stands_for)
    assert any(node.op_type.startswith("QLinear") for node in base.graph), "the model is left as it is"


def test_a_model_without_such_operators_is_not_copied() -> None:
    base = FORMS["plain"].model()
    assert in_plain_operators(base).model is base


def test_numbers_of_several_scales_are_not_replaced() -> None:
    """One scale for each feature, which no `quantize_static` gives activations."""
    s = Sketch()
    q, k, v = (s.transpose(s.reshape(s.linear("x"), -1, 16, 4, 3), 0, 2, 1, 3) for _ in range(3))
    scales, zeros = s.weight(np.full(3, 0.1, np.float32)), s.weight(np.zeros(3, np.int8))
    k = s.op("DequantizeLinear", s.op("QuantizeLinear", k, scales, zeros, axis=3), scales, zeros, axis=3)
    y = s.op("Identity", s.attend(q, s.transpose(k, 0, 1, 3, 2), v))
    out = helper.make_tensor_value_info(y, TensorProto.FLOAT, ["batch", 4, 16, 3])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 16, 12])
    made = helper.make_graph(s.nodes, "scales", [x], [out], s.weights)
    base = ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)]))
    (site,) = explain(base).sites
    assert site.key.quantization is None, "it is patched in front of them"
    assert find_value(base.graph, site.key.value).producer().op_type == "Add"


@pytest.mark.parametrize("kind", ["computed", "float16"])
def test_scales_that_no_number_comes_back_from_are_refused_with_the_reason(kind: str) -> None:
    """Everything runs on whole numbers, so there is no place in front of them."""
    s = Sketch(half=kind == "float16")
    dtype = TensorProto.FLOAT16 if kind == "float16" else TensorProto.FLOAT
    scale = s.number(0.1) if kind == "float16" else s.op("Abs", "scale")
    one = s.op("Squeeze", scale, s.sizes(0))
    fixed = s.op("Identity", one) if kind == "computed" else s.weight(np.array(0.1, np.float16))
    zero = s.weight(np.array(128, np.uint8))

    def projected(x: str) -> str:
        y = s.op("MatMul", s.op("DequantizeLinear", x, fixed, zero), s.normal(12, 12))
        y = s.op("DequantizeLinear", s.op("QuantizeLinear", y, fixed, zero), fixed, zero)
        return s.transpose(s.reshape(y, -1, 16, 4, 3), 0, 2, 1, 3)

    x = s.op("QuantizeLinear", "x", fixed, zero)
    q, k, v = (projected(x) for _ in range(3))
    y = s.op("Identity", s.attend(q, s.transpose(k, 0, 1, 3, 2), v))
    inputs = [helper.make_tensor_value_info("x", dtype, ["batch", 16, 12])]
    inputs += [helper.make_tensor_value_info("scale", dtype, [1])] if kind == "computed" else []
    made = helper.make_graph(
        s.nodes, "scales", inputs, [helper.make_tensor_value_info(y, dtype, ["batch", 4, 16, 3])], s.weights
    )
    matches = explain(ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", 19)])))
    assert matches.sites == ()
    (miss,) = matches.near_misses
    assert miss.attention
    assert "whole numbers with several scales, or one that is no weight of float32" in miss.reason


def test_attention_of_quantized_operators_in_a_branch_is_said() -> None:
    branch = model("plain", "operators").graph
    nodes, outputs = list(branch), list(branch.outputs)
    outer_input, weights = branch.inputs[0], list(branch.initializers.values())
    branch.remove(nodes)
    for held in (branch.outputs, branch.inputs, branch.initializers):
        held.clear()
    inner = ir.Graph([], outputs, nodes=nodes, name="branch")
    condition = ir.Value(name="c", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.BOOL))
    other = ir.Node("", "Identity", [outer_input])
    other.outputs[0].name = "other"
    branches = [ir.AttrGraph("then_branch", inner)]
    branches.append(ir.AttrGraph("else_branch", ir.Graph([], other.outputs, nodes=[other], name="else")))
    chosen = ir.Node("", "If", [condition], branches)
    chosen.outputs[0].name = "y"
    main = ir.Graph(
        [condition, outer_input],
        chosen.outputs,
        nodes=[chosen],
        initializers=weights,
        opset_imports=dict(branch.opset_imports),
    )
    matches = explain(ir.Model(main, ir_version=8))
    assert matches.sites == ()
    assert [(miss.attention, "inside a branch" in miss.reason) for miss in matches.near_misses] == [(True, True)] * 2


@settings(max_examples=40, deadline=None)
@given(
    scale=st.floats(2**-20, 2**10, width=32),
    kind=st.sampled_from([TensorProto.UINT8, TensorProto.INT8, TensorProto.UINT16, TensorProto.INT16]),
    share=st.floats(0, 1),
)
def test_every_number_comes_back_and_onnxruntime_agrees(scale: float, kind: int, share: float) -> None:
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    limits = np.iinfo(dtype)
    zero = int(limits.min + share * (int(limits.max) - int(limits.min)))
    own, numbers = Quantization(scale, zero), np.arange(limits.min, int(limits.max) + 1).astype(dtype)
    floats = own.dequantized(numbers)
    assert np.array_equal(own.quantized(floats, dtype), numbers)
    between = np.concatenate([floats, floats + np.float32(0.37) * np.float32(scale), [np.float32(3e38), -3e38]])
    expected = _by_onnxruntime(scale, zero, kind, between.astype(np.float32))
    assert np.array_equal(own.quantized(between.astype(np.float32), dtype), expected)


def _by_onnxruntime(scale: float, zero: int, kind: int, floats: np.ndarray) -> np.ndarray:
    weights = [
        helper.make_tensor("scale", TensorProto.FLOAT, [], [scale]),
        helper.make_tensor("zero", kind, [], [zero]),
    ]
    made = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"])],
        "q",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [len(floats)])],
        [helper.make_tensor_value_info("y", kind, [len(floats)])],
        weights,
    )
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": floats})[0])
