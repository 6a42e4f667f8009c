"""The hidden units of MLP blocks are found in every form that exporters write them, and nothing else is."""

import re
import tarfile
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto
from test_matching_forms import text_model

from atpatch_onnx.matching.hidden import HiddenLayer, find_hidden_layers

CORPUS = Path(__file__).parents[2] / "shared" / "graphs" / "graphs.tar.xz"

WEIGHTS = {
    "up": (4, 6),
    "gate": (4, 6),
    "up_t": (6, 4),
    "both": (4, 12),
    "bias": (6,),
    "down": (6, 4),
    "down_t": (4, 6),
    "bias_4": (4,),
    "square": (4, 4),
    "s": (),
    "flat_4": (2,),
    "flat_6": (2,),
    "back_4": (3,),
    "back_6": (3,),
    "cut": (1,),
    "end": (1,),
}
"""Shapes of the weights that the texts below may name: blocks of 6 units on 4 channels; `s` is any scalar."""

INTEGERS = {"flat_4", "flat_6", "back_4", "back_6", "cut", "end"}

KINDS = {"float": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}


def net(body: str, *, residual: str = "out = Add (x, y)", kind: str = "float") -> ir.Model:
    """A block that makes `y` of `x`, and the sum around it; its weights are in a file that is not there."""
    of_x = f"{kind}[batch,tokens,4]"
    text = f"{body} {residual}"
    proto = ir.to_proto(text_model(text, f"{of_x} x, {of_x} other, {of_x} mask", f"{of_x} out", opset=20))
    for name, shape in WEIGHTS.items():
        if re.search(rf"\b{name}\b", text):
            element = TensorProto.INT64 if name in INTEGERS else KINDS[kind]
            tensor = TensorProto(name=name, dims=shape, data_type=element, data_location=TensorProto.EXTERNAL)
            tensor.external_data.add(key="location", value="missing.data")
            proto.graph.initializer.append(tensor)
    return ir.from_proto(proto)


def only(model: ir.Model) -> HiddenLayer:
    (layer,) = find_hidden_layers(model)
    return layer


# What is found

UP = "a = MatMul (x, up) b = Add (a, bias) "
DOWN = " y0 = MatMul (h, down) y = Add (y0, bias_4)"
RELU = UP + "h = Relu (b)" + DOWN
NORMED_RELU = RELU.replace("(x", "(n")
ERF = "c = Div (b, s) d = Erf (c) e = Add (d, s) f = Mul (b, e) h = Mul (f, s)"
TANH = "p = Pow (b, s) c = Mul (p, s) d = Add (b, c) e = Mul (d, s) t = Tanh (e) f = Add (t, s) h = Mul (b, f)"
GEMM = (
    "x2 = Reshape (x, flat_4) a = Gemm <transB = 1> (x2, up_t, bias) b = Reshape (a, back_6) c = Relu (b) "
    "h = Reshape (c, flat_6) y0 = Gemm <transB = 1> (h, down_t, bias_4) y = Reshape (y0, back_4)"
)
GATED = "a = MatMul (x, up) b = MatMul (x, gate) c = Sigmoid (b) d = Mul (b, c) h = Mul (d, a) y = MatMul (h, down)"
SPLIT = "a = MatMul (x, both) b, c = Split <axis = -1, num_outputs = 2> (a) d = Gelu (b) h = Mul (d, c)" + DOWN
SLICED = "a = MatMul (x, both) b = Slice (a, cut, end) c = Slice (a, end, cut) d = Relu (b) h = Mul (d, c)" + DOWN
FUSED = "a = MatMul (x, up) h = com.microsoft.BiasGelu (a, bias)" + DOWN
TRANSPOSED = "w = Transpose (up_t) v = Identity (w) a = MatMul (x, v) h = Relu (a) y = MatMul (h, down)"
CAST = "w = Cast <to = 1> (up) a = MatMul (x, w) b = Clip (a, s, s) c = Relu (b) h = Dropout (c)" + DOWN
NORMALISED = "a = MatMul (x, up) b = BatchNormalization (a, bias, bias, bias, bias) h = HardSwish (b)" + DOWN


@pytest.mark.parametrize(
    ("body", "activation"),
    [
        pytest.param(RELU, "Relu", id="relu"),
        pytest.param(UP + "h = Gelu (b)" + DOWN, "Gelu", id="gelu"),
        pytest.param(UP + ERF + DOWN, "Erf", id="gelu of erf"),
        pytest.param(UP + TANH + DOWN, "Tanh", id="gelu of tanh"),
        pytest.param(UP + "c = Mul (b, s) d = Sigmoid (c) h = Mul (b, d)" + DOWN, "Sigmoid", id="quick gelu"),
        pytest.param(UP + "c = Relu (b) h = Mul (c, c)" + DOWN, "Relu", id="squared relu"),
        pytest.param(UP + "c = Greater (b, s) d = Elu (b) h = Where (c, b, d)" + DOWN, "Elu", id="where"),
        pytest.param(FUSED, "BiasGelu", id="onnxruntime"),
        pytest.param(GEMM, "Relu", id="gemm"),
        pytest.param(GATED, "Sigmoid", id="gated"),
        pytest.param(SPLIT, "Gelu", id="gated by a split"),
        pytest.param(SLICED, "Relu", id="gated by slices"),
        pytest.param(TRANSPOSED, "Relu", id="transposed weight"),
        pytest.param(CAST, "Relu", id="converted weight"),
        pytest.param(NORMALISED, "HardSwish", id="batch norm"),
    ],
)
def test_a_block_is_found_in_every_form(body: str, activation: str) -> None:
    layer = only(net(body))
    assert (layer.value, layer.units, layer.activation, layer.dtype) == ("h", 6, activation, "FLOAT")
    assert (layer.name, layer.index) == ("hidden_0", 0)


@pytest.mark.parametrize(
    ("body", "residual"),
    [
        pytest.param(RELU, "z = Add (x, y) out = LayerNormalization (z, bias_4)", id="norm behind"),
        pytest.param("n = LayerNormalization (x, bias_4) " + NORMED_RELU, "out = Add (y, x)", id="norm before"),
        pytest.param(RELU, "m = Mul (y, bias_4) out = Add (m, x)", id="layer scale"),
        pytest.param(RELU, "z = Add (other, y) out = Add (z, x)", id="beside attention"),
        pytest.param(RELU, "n = LayerNormalization (y, bias_4) out = Add (x, n)", id="norm between"),
        pytest.param(
            "n, n1, n2, r = com.microsoft.SkipLayerNormalization (x, other, bias_4) "
            + UP.replace("(x", "(n")
            + "h = Relu (b)"
            + DOWN,
            "out = com.microsoft.SkipLayerNormalization (y, r, bias_4)",
            id="onnxruntime",
        ),
    ],
)
def test_the_sum_around_a_block_is_found_in_every_form(body: str, residual: str) -> None:
    assert only(net(body, residual=residual)).value == "h"


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_the_element_type_is_that_of_the_graph(kind: str) -> None:
    assert only(net(RELU, kind=kind)).dtype == kind.upper()


def test_the_nodes_lead_from_the_first_product_to_the_second() -> None:
    model = net("shared = Identity (bias) a = MatMul (x, up) b = Add (a, shared) h = Relu (b)" + DOWN)
    assert only(model).nodes == ("a", "b", "h", "y0")


def test_units_that_an_adapter_reads_too_are_one_layer() -> None:
    adapter = " low = MatMul (h, down) y = Add (y0, low)"
    assert only(net(UP + "h = Relu (b) y0 = MatMul (h, down)" + adapter)).nodes[-1] == "y0"


# What is refused


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(UP + "h = Mul (b, s)" + DOWN, id="no activation"),
        pytest.param(UP + "c = Relu (b) h = LayerNormalization (c, bias)" + DOWN, id="a norm between"),
        pytest.param(UP + "h = Softmax (b)" + DOWN, id="a softmax between"),
        pytest.param(
            "a = MatMul (x, square) t = Transpose <perm = [0, 2, 1]> (x) m = MatMul (a, t) w = Softmax (m) "
            "v = MatMul (w, a) g = Sigmoid (a) h = Mul (g, v) y = MatMul (h, square)",
            id="gated attention",
        ),
        pytest.param("g = Sigmoid (x) h = Mul (g, x) y = MatMul (h, square)", id="no first product"),
        pytest.param(UP + "c = Relu (b) h = Reshape (c, flat_4) y = MatMul (h, square)", id="other widths"),
        pytest.param("a = MatMul (x, both) c = Relu (a) h = Reshape (c, flat_6)" + DOWN, id="wider and not cut"),
        pytest.param("a = MatMul (x, other) h = Relu (a) y = MatMul (h, square)", id="no first weight"),
        pytest.param("a = MatMul (x, square) h = Relu (a) y = MatMul (h, other)", id="no second weight"),
        pytest.param("h = Relu (up_t) y = MatMul (h, down_t)", id="weights only"),
        pytest.param(UP + "h = elsewhere.Relu (b)" + DOWN, id="an unknown operator"),
        pytest.param("a = MatMul (x, square) b = Mul (a, mask) h = Relu (b) y = MatMul (h, square)", id="an input"),
        pytest.param(UP + "h = Relu (b) y = com.microsoft.FusedMatMul <transA = 1> (h, down)", id="h turned"),
    ],
)
def test_what_is_no_block_is_refused(body: str) -> None:
    assert find_hidden_layers(net(body)) == ()


@pytest.mark.parametrize(
    ("body", "residual"),
    [
        pytest.param("a = MatMul (x, square) h = Tanh (a) y = MatMul (h, square)", "out = Identity (y)", id="a pooler"),
        pytest.param(RELU, "out = Add (y, other)", id="a sum with something else"),
        pytest.param(RELU, "g = Sigmoid (y) out = Mul (x, g)", id="a gate"),
        pytest.param(RELU, "z = MatMul (y, square) out = Add (x, z)", id="three products"),
        pytest.param("n = MatMul (x, square) " + NORMED_RELU, "out = Add (x, y)", id="an earlier product"),
    ],
)
def test_what_is_not_added_to_what_it_was_made_of_is_refused(body: str, residual: str) -> None:
    assert find_hidden_layers(net(body, residual=residual)) == ()


def test_whole_numbers_are_refused() -> None:
    model = net(RELU)
    for value in (*model.graph.initializers.values(), *(output for node in model.graph for output in node.outputs)):
        value.dtype = ir.DataType.INT32
    assert find_hidden_layers(model) == ()


# Names


def named(*scopes: tuple[str, str]) -> list[str]:
    """Names of layers whose first product and activation come from these modules, as TorchScript writes them."""
    bodies, paths = [], {}
    for i, (linear, activation) in enumerate(scopes):
        x, y = ("x" if i == 0 else f"x{i}"), (f"x{i + 1}" if i + 1 < len(scopes) else "out")
        bodies.append(f"a{i} = MatMul ({x}, up) h{i} = Relu (a{i}) y{i} = MatMul (h{i}, down) {y} = Add ({x}, y{i})")
        paths |= {f"a{i}": linear, f"h{i}": activation}
    model = net(" ".join(bodies), residual="")
    for node in model.graph:
        node.name = f"/{paths[name]}/{node.op_type}" if paths.get(name := str(node.outputs[0].name)) else name
    return [layer.name for layer in find_hidden_layers(model)]


@pytest.mark.parametrize(
    ("linear", "activation", "name"),
    [
        ("vit/layers.3/mlp/fc1", "vit/layers.3/mlp/activation_fn", "vit.layers.3.mlp.hidden"),
        ("bert/encoder/layer.3/intermediate/dense", "", "bert.encoder.layer.3.intermediate.hidden"),
        ("layers.0/mlp", "layers.0/mlp/act", "layers.0.mlp.hidden"),
        ("layers.0/mlp", "layers.0/mlp", "layers.0.mlp.hidden"),
        ("layers.1/ffn/ffn.0", "layers.1/ffn/ffn.1", "layers.1.ffn.ffn.hidden"),
        ("layers.1/linear1", "layers.1", "layers.1.hidden"),
        ("layers.1/linear1", "layers.1/linear10", "layers.1.hidden"),
        ("fc1", "act", "hidden_0"),
        ("", "", "hidden_0"),
    ],
)
def test_a_layer_is_named_after_its_module(linear: str, activation: str, name: str) -> None:
    assert named((linear, activation)) == [name]


def test_names_are_unique() -> None:
    shared = ("mlp/fc1", "mlp/act")
    assert named(shared, ("", ""), shared, shared) == ["mlp.hidden", "hidden_1", "mlp.hidden_2", "mlp.hidden_3"]


def test_a_layer_is_plain_json() -> None:
    fields = only(net(RELU)).to_json()
    assert fields == {
        "name": "hidden_0",
        "index": 0,
        "value": "h",
        "units": 6,
        "activation": "Relu",
        "dtype": "FLOAT",
        "nodes": ("a", "b", "h", "y0"),
    }


def one_operand(model: ir.Model) -> None:
    for node in model.graph:
        if node.op_type == "MatMul":
            node.resize_inputs(1)


def transposed_by(*perm: int) -> Callable[[ir.Model], None]:
    def change(model: ir.Model) -> None:
        _behind(model, ir.Node("", "Transpose", [], [ir.AttrInt64s("perm", perm)]))

    return change


def cast_to_nothing(model: ir.Model) -> None:
    _behind(model, ir.Node("", "Cast", []))


def far_away(model: ir.Model) -> None:
    for _ in range(3000):
        _behind(model, ir.Node("", "Identity", []))


def _behind(model: ir.Model, node: ir.Node) -> None:
    """Put a node between the second product and its weight."""
    product = next(one for one in model.graph if one.outputs[0].name == "y0")
    node.resize_inputs(1)
    node.replace_input_with(0, product.inputs[1])
    model.graph.insert_before(model.graph[0], node)
    product.replace_input_with(1, node.outputs[0])


@pytest.mark.parametrize(
    ("change", "count"),
    [(one_operand, 0), (transposed_by(0, 7), 0), (transposed_by(0, 0), 0), (cast_to_nothing, 0), (far_away, 1)],
    ids=["one operand", "no such axis", "an axis twice", "a cast to nothing", "a weight far away"],
)
def test_malformed_graphs_are_answered(change: Callable[[ir.Model], None], count: int) -> None:
    model = net(RELU)
    change(model)
    assert len(find_hidden_layers(model)) == count


# Real exports

LAYERS = {
    **dict.fromkeys(["gpt_oss", "mamba", "pvt_v2_linear"], 0),  # stacked experts, no MLP, a convolution between
    **dict.fromkeys(["canine", "rt_detr", "siglip2_vision"], 3),
    **dict.fromkeys(["bart", "bart_gen", "blenderbot", "blenderbot-small", "fsmt", "prophetnet", "t5", "t5gemma"], 4),
    **dict.fromkeys(["convnext", "depth_anything", "dpt", "owlvit", "patchtsmixer_noattn", "pvt", "swin"], 4),
    **dict.fromkeys(["vit_mae", "vjepa2", "wav2vec2-bert", "whisper"], 4),
    "levit": 5,
    "clipseg": 6,
    "cvt": 6,
}
"""Blocks of the architectures of the corpus; of all others, two."""


@pytest.mark.slow
@pytest.mark.skipif(not CORPUS.is_file(), reason="the corpus of exported graphs does not lie beside the repository")
def test_every_block_of_real_exports_is_found_whatever_the_way_of_export() -> None:
    wrong = {}
    with tarfile.open(CORPUS) as archive:
        for member in archive:
            stream = archive.extractfile(member)
            assert stream is not None
            layers = find_hidden_layers(ir.from_proto(onnx.load_from_string(stream.read())))
            if len(layers) != LAYERS.get(member.name.split(".")[0], 2):
                wrong[member.name] = [layer.nodes for layer in layers]
    assert wrong == {}
