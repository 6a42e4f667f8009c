"""What shapes a patched file declares: onnxruntime fuses by them, and takes sizes of one name for equal."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import FORMS, draw_patch
from onnx import TensorProto, helper, numpy_helper, parser

from atpatch_onnx.baking.bake import bake
from atpatch_onnx.matching import find_sites
from atpatch_onnx.running.bits import same_bits
from atpatch_onnx.running.drawing import draw_inputs
from atpatch_onnx.running.sessions import Session


class Draft:
    """Channels first, `[batch, channels, 1, tokens]`: projections are Convs, as for NPUs, with residual sums around."""

    def __init__(self, activation: str, channels: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(0)
        self.channels, self.activation = channels, activation

    def op(self, op_type: str, *inputs: str, **attributes: object) -> str:
        out = f"{op_type}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [out], name=out, **attributes))
        return out

    def constant(self, array: np.ndarray) -> str:
        name = f"weight_{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def conv(self, x: str, into: int, of: int) -> str:
        weights = [(self.rng.normal(size=size) * 0.3).astype(np.float32) for size in ((into, of, 1, 1), (into,))]
        return self.op("Conv", x, *map(self.constant, weights))

    def layer(self, x: str) -> str:
        width, heads = self.channels, 2
        split, back = (self.constant(np.array(size)) for size in ([0, heads, width // heads, -1], [0, width, 1, -1]))
        q, k, v = (self.op("Reshape", self.conv(x, width, width), split) for _ in range(3))
        scores = self.op("MatMul", self.op("Transpose", q, perm=[0, 1, 3, 2]), k)
        P = self.op("Softmax", scores, axis=-1)
        y = self.op("MatMul", v, self.op("Transpose", P, perm=[0, 1, 3, 2]))
        x = self.op("Add", x, self.conv(self.op("Reshape", y, back), width, width))
        hidden = self.op(self.activation, self.conv(x, 2 * width, width))
        return self.op("Add", x, self.conv(hidden, width, 2 * width))


def channels_first(activation: str, channels: int, batch: int | str, tokens: int | str) -> ir.Model:
    draft = Draft(activation, channels)
    out = draft.op("ReduceMean", draft.layer(draft.layer("x")), draft.constant(np.array([2, 3])), keepdims=0)
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, channels, 1, tokens])]
    outputs = [helper.make_tensor_value_info(out, TensorProto.FLOAT, [batch, channels])]
    graph = helper.make_graph(draft.nodes, "npu", inputs, outputs, draft.weights)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


@pytest.mark.parametrize("activation", ["Relu", "Sigmoid", "HardSigmoid"])
@pytest.mark.parametrize("sizes", [(16, 2, 8), (16, "batch", "tokens"), (8, "batch", 8)])
def test_what_is_fused_behind_a_site_is_fused_all_the_same(activation, sizes):
    """A residual sum goes into the Conv that follows only where shapes are known: other bits, with nothing flagged."""
    model = channels_first(activation, *sizes)
    assert len(find_sites(model)) == 2
    feed = draw_inputs(model, np.random.default_rng(0), length=8)
    base = Session(model).run(feed)
    for conditional in FORMS:
        found = Session(bake(model, draw_patch(model), conditional=conditional)).run(feed)
        assert all(same_bits(array, found[name]) for name, array in base.items())


def test_no_size_is_named_that_only_a_guess_has():
    """The positions are eight at most: whatever stands for the tokens while shapes are guessed, they may be fewer."""
    text = """<ir_version: 10, opset_import: ["" : 18]>
    g (int64[batch, tokens] ids) => (float[batch, tokens, 4] y) <float[20, 4] table, float[8, 4] places> {
        size = Shape <start = 1, end = 2> (ids)
        none = Constant <value_ints = [0]> ()
        own = Slice (places, none, size, none)
        e = Gather (table, ids)
        x = Add (e, own)
        t = Transpose <perm = [0, 2, 1]> (x)
        s = MatMul (x, t)
        p = Softmax <axis = -1> (s)
        y = MatMul (p, x)
    }"""
    proto = parser.parse_model(text)
    rng = np.random.default_rng(0)
    del proto.graph.initializer[:]
    for name, rows in (("table", 20), ("places", 8)):
        proto.graph.initializer.append(numpy_helper.from_array(rng.normal(size=(rows, 4)).astype(np.float32), name))
    model = ir.from_proto(proto)
    patched = bake(model, draw_patch(model), conditional=False)
    for node in patched.graph:
        for value in node.outputs:
            named = [size.value for size in value.shape or () if not isinstance(size, int) and size.value]
            assert len(set(named)) == len(named), f"{value.name}: {value.shape}"
    feed = {"ids": rng.integers(0, 20, (3, 6))}
    assert same_bits(Session(model).run(feed)["y"], Session(patched).run(feed)["y"])
