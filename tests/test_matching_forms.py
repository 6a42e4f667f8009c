"""Small graphs of one form each: accepted variants of the op Attention, and attention refused with a reason."""

import itertools
import time

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from nudge import assert_places
from onnx import TensorProto, helper, parser

from atpatch_onnx.graph.parts import LIFT_ADVICE
from atpatch_onnx.matching import explain, find_sites
from atpatch_onnx.matching.sites import Form

B, H, KV, Q, K, D = 2, 4, 2, 5, 7, 3


def text_model(body: str, inputs: str, outputs: str, opset: int = 18, extra: str = "") -> ir.Model:
    """A model from onnx's text form."""
    header = f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>'
    return ir.from_proto(parser.parse_model(f"{header} agraph ({inputs}) => ({outputs}) {{ {body} }} {extra}"))


def attention_model(
    *, packed: bool, kv_heads: int, mask: int | None, opset: int = 23, keys: int = K, **attributes: object
) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """One op Attention with inputs to run it."""
    rng = np.random.default_rng(0)
    shapes = {"q": (B, H, Q, D), "k": (B, kv_heads, keys, D), "v": (B, kv_heads, keys, D)}
    if packed:
        shapes = {name: (b, n, h * d) for name, (b, h, n, d) in shapes.items()}
        attributes |= {"q_num_heads": H, "kv_num_heads": kv_heads}
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    types = dict.fromkeys(shapes, TensorProto.FLOAT)
    if mask is not None:
        feeds["mask"] = np.tril(np.ones((Q, keys), bool))
        if mask == TensorProto.FLOAT:
            feeds["mask"] = np.where(feeds["mask"], 0, -np.inf).astype(np.float32)
        types["mask"] = mask
    node = helper.make_node("Attention", list(feeds), ["y"], name="attend", **attributes)
    proto = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(name, types[name], feeds[name].shape) for name in feeds],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    opsets = [helper.make_opsetid("", opset)]
    return ir.from_proto(helper.make_model(proto, opset_imports=opsets, ir_version=11)), feeds


@pytest.mark.parametrize(
    ("packed", "kv_heads", "mask", "causal"),
    [
        case
        for case in itertools.product((False, True), (H, KV), (None, TensorProto.BOOL, TensorProto.FLOAT), (0, 1))
        if not (case[2] and case[3])
    ],
)
def test_the_op_attention(packed: bool, kv_heads: int, mask: int | None, causal: int) -> None:
    # causal with as many queries as keys: runtimes disagree about the alignment of the diagonal otherwise
    model, feeds = attention_model(
        packed=packed, kv_heads=kv_heads, mask=mask, is_causal=causal, keys=Q if causal else K
    )
    matches = explain(model)
    assert matches.near_misses == ()
    (site,) = matches.sites
    assert (site.form, site.map_layout, site.parts) == (Form.ATTENTION, "nhqk", 1)
    assert (site.map, site.output, site.nodes) == (None, "y", ("attend",))
    axes = ("n", "k", "") if packed else ("n", "", "k", "")
    for place, name in ((site.key, "k"), (site.value, "v")):
        assert (place.value, place.axes, place.heads, place.depth) == (name, axes, kv_heads, D)
    assert (site.heads, site.queries, site.keys) == (H, Q, Q if causal else K)
    assert site.masked == bool(causal or mask)
    assert_places(model, feeds)


def test_the_op_attention_with_a_cache_counts_new_keys_only() -> None:
    model = text_model(
        "y, present_k, present_v = Attention (q, k, v, , past_k, past_v)",
        "float[2,4,1,8] q, float[2,4,1,8] k, float[2,4,1,8] v, float[2,4,9,8] past_k, float[2,4,9,8] past_v",
        "float[2,4,1,8] y, float[2,4,10,8] present_k, float[2,4,10,8] present_v",
        opset=23,
    )
    (site,) = find_sites(model)
    assert (site.queries, site.keys, site.masked, site.key.value, site.value.value) == (1, 1, True, "k", "v")


def test_a_window_attribute_is_refused() -> None:
    model, _ = attention_model(packed=False, kv_heads=H, mask=None, opset=25, left_window_size=2)
    (miss,) = explain(model).near_misses
    assert miss.attention
    assert "window" in miss.reason


QKV = "float[2,4,5,8] q, float[2,4,7,8] k, float[2,4,7,8] v"
SCORES = "kt = Transpose <perm = [0, 1, 3, 2]> (k) s = MatMul (q, kt)"


def test_plain_decomposed_attention() -> None:
    model = text_model(f"{SCORES} p = Softmax <axis = -1> (s) y = MatMul (p, v)", QKV, "float[2,4,5,8] y")
    (site,) = find_sites(model)
    assert (site.name, site.map, site.key.value, site.value.value, site.output) == ("site_0", "p", "k", "v", "y")
    assert (site.heads, site.queries, site.keys, site.masked) == (4, 5, 7, False)
    assert (site.key.heads, site.key.depth, site.key.axes) == (4, 8, ("n", "", "k", ""))
    assert site.nodes == ("s", "p", "y")
    rng = np.random.default_rng(0)
    shapes = {"q": (2, 4, 5, 8), "k": (2, 4, 7, 8), "v": (2, 4, 7, 8)}
    assert_places(model, {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()})


def test_one_softmax_with_two_value_products_is_two_sites() -> None:
    body = f"{SCORES} p = Softmax <axis = -1> (s) y = MatMul (p, v) z = MatMul (p, k)"
    sites = find_sites(text_model(body, QKV, "float[2,4,5,8] y, float[2,4,5,8] z"))
    assert [(site.map, site.value.value, site.output) for site in sites] == [("p", "v", "y"), ("p", "k", "z")]


@pytest.mark.parametrize(
    ("bias", "masked"),
    [("0.5", False), ("-0.5", False), ("-10000.0", True), ("-3.4e38", True)],
)
def test_only_a_bias_that_hides_keys_is_a_mask(bias: str, masked: bool) -> None:
    constant = f"b = Constant <value = float {{{bias}}}> ()"
    body = f"{constant} {SCORES} t = Add (s, b) p = Softmax <axis = -1> (t) y = MatMul (p, v)"
    (site,) = find_sites(text_model(body, QKV, "float[2,4,5,8] y"))
    assert site.masked is masked


@pytest.mark.parametrize(("allowed", "masked"), [("1, 1, 1, 1, 1, 1, 1", False), ("1, 1, 1, 1, 1, 1, 0", True)])
def test_an_expanded_constant_that_hides_nothing_is_no_mask(allowed: str, masked: bool) -> None:
    mask = (
        f"i = Constant <value = int64[7] {{{allowed}}}> () c = Cast <to = 9> (i) full = Shape (s) "
        "e = Expand (c, full) zero = Constant <value = float {0.0}> () low = Constant <value = float {-3.4e38}> () "
        "m = Where (e, zero, low)"
    )
    body = f"{SCORES} {mask} t = Add (s, m) p = Softmax <axis = -1> (t) y = MatMul (p, v)"
    (site,) = find_sites(text_model(body, QKV, "float[2,4,5,8] y"))
    assert site.masked is masked


SINK = (
    "c = Concat <axis = -1> (s, sink) p = Softmax <axis = -1> (c) a = Constant <value_ints = [0]> () "
    "e = Constant <value_ints = [7]> () l = Constant <value_ints = [-1]> () m = Slice (p, a, e, l) y = MatMul (m, v)"
)
CACHE = (
    "k = Relu (new_k) v = Relu (new_v) f = Concat <axis = 2> (past_k, k) "
    "g = Concat <axis = 2> (past_v, v) kt = Transpose <perm = [0, 1, 3, 2]> (f) "
    "s = MatMul (q, kt) p = Softmax <axis = -1> (s) y = MatMul (p, g)"
)
ACCEPTED = {
    "rank 3": (
        "kt = Transpose <perm = [0, 2, 1]> (k) s = MatMul (q, kt) p = Softmax <axis = -1> (s) y = MatMul (p, v)",
        "float[8,5,8] q, float[8,7,8] k, float[8,7,8] v",
        "float[8,5,8] y",
        ("nqk", 1, "FLOAT"),
    ),
    "einsum": (
        f'{SCORES} p = Softmax <axis = -1> (s) y = Einsum <equation = "bhqk,bhkd->bqhd"> (p, v)',
        QKV,
        "float[2,5,4,8] y",
        None,
    ),
    "sink": (f"{SCORES} {SINK}", f"{QKV}, float[2,4,5,1] sink", "float[2,4,5,8] y", None),
    "an Einsum with an ellipsis": (
        f'{SCORES} p = Softmax <axis = -1> (s) y = Einsum <equation = "...qk,...kd->...qd"> (p, v)',
        QKV,
        "float[2,4,5,8] y",
        None,
    ),
    "a softmax written out": (
        f"{SCORES} e = Exp (s) last = Constant <value_ints = [-1]> () n = ReduceSum <keepdims = 1> (e, last) "
        "p = Div (e, n) y = MatMul (p, v)",
        QKV,
        "float[2,4,5,8] y",
        None,
    ),
    "head mask": (
        f"{SCORES} p = Softmax <axis = -1> (s) m = Mul (p, h) y = MatMul (m, v)",
        f"{QKV}, float[2,4,1,1] h",
        "float[2,4,5,8] y",
        None,
    ),
    "bfloat16": (
        f"{SCORES} p = Softmax <axis = -1> (s) y = MatMul (p, v)",
        QKV.replace("float", "bfloat16"),
        "bfloat16[2,4,5,8] y",
        ("nhqk", 4, "BFLOAT16"),
    ),
    "a cache of keys and values": (
        CACHE,
        "float[2,4,5,8] q, float[2,4,3,8] new_k, float[2,4,3,8] new_v, float[2,4,4,8] past_k, float[2,4,4,8] past_v",
        "float[2,4,5,8] y",
        None,
    ),
    "fused by onnxruntime": (
        "y = com.microsoft.MultiHeadAttention <num_heads = 4> (q, k, v)",
        "float[2,5,32] q, float[2,7,32] k, float[2,7,32] v",
        "float[2,5,32] y",
        None,
    ),
}
"""Form -> its nodes, inputs and output, and the site: the layout of its map, heads and type; None: as the plain one."""

PLAIN = ("nhqk", 4, "FLOAT")


@pytest.mark.parametrize("case", ACCEPTED)
def test_attention_of_another_form_is_found(case: str) -> None:
    body, inputs, outputs, wanted = ACCEPTED[case]
    matches = explain(text_model(body, inputs, outputs))
    assert matches.near_misses == ()
    (site,) = matches.sites
    found = (site.map_layout, site.heads, site.dtype)
    assert found == (wanted or PLAIN)
    keys = 3 if case == "a cache of keys and values" else 7
    assert (site.queries, site.keys, site.key.depth, site.value.depth, site.parts) == (5, keys, 8, 8, 1)
    assert (site.key.value, site.value.value) == ("k", "v")


CUT = (
    "zero = Constant <value_ints = [0]> () three = Constant <value_ints = [3]> () end = Constant <value_ints = [7]> () "
)
CUT += "last = Constant <value_ints = [-1]> ()"
REFUSED = {
    "pieces of one map": (
        f"{SCORES} {CUT} p = Softmax <axis = -1> (s) a = Slice (p, zero, three, last) b = Slice (p, three, end, last) "
        "y = MatMul (a, v) z = MatMul (b, w)",
        "float[2,4,5,8] q, float[2,4,7,8] k, float[2,4,3,8] v, float[2,4,4,8] w",
        "float[2,4,5,8] y, float[2,4,5,8] z",
        "its map is cut into pieces with some of its keys each, which meet separate values",
    ),
    "a map that is padded into bands": (
        f"{SCORES} p = Softmax <axis = -1> (s) pads = Constant <value_ints = [0, 0, 0, 0, 0, 0, 0, 3]> () "
        "m = Pad (p, pads) y = MatMul (m, v)",
        "float[2,4,5,8] q, float[2,4,7,8] k, float[2,4,10,8] v",
        "float[2,4,5,8] y",
        "its map is padded and cut into overlapping windows",
    ),
    "float64": (
        f"{SCORES} p = Softmax <axis = -1> (s) y = MatMul (p, v)",
        QKV.replace("float", "double"),
        "double[2,4,5,8] y",
        "its element type is DOUBLE",
    ),
    "softmax over the queries": (
        f"{SCORES} p = Softmax <axis = 2> (s) y = MatMul (p, v)",
        QKV,
        "float[2,4,5,8] y",
        "its softmax does not run over the keys",
    ),
    "softmax over the queries of a map that is transposed": (
        f"{SCORES} p = Softmax <axis = -1> (s) t = Transpose <perm = [0, 1, 3, 2]> (p) y = MatMul (t, w)",
        f"{QKV}, float[2,4,5,8] w",
        "float[2,4,7,8] y",
        "its softmax does not run over the keys",
    ),
    "heads that share one map": (
        "kt = Transpose <perm = [0, 2, 1]> (k) s = MatMul (q, kt) p = Softmax <axis = -1> (s) y = MatMul (p, v)",
        "float[2,5,8] q, float[2,7,8] k, float[4,2,7,2] v",
        "float[4,2,5,2] y",
        "several heads share one map",
    ),
    "a map of size one for several samples": (
        f"{SCORES} p = Softmax <axis = -1> (s) y = MatMul (p, v)",
        "float[1,4,5,8] q, float[1,4,7,8] k, float[2,4,7,8] v",
        "float[2,4,5,8] y",
        "its map is shared by several samples or parts",
    ),
    "an Einsum of heads that share one map": (
        f'{SCORES} p = Softmax <axis = -1> (s) z = Squeeze (p, one) y = Einsum <equation = "nqk,nhkd->nhqd"> (z, v)',
        "float[2,1,5,8] q, float[2,1,7,8] k, float[2,4,7,2] v, int64[1] one",
        "float[2,4,5,2] y",
        "the map meets the values in the Einsum 'nqk,nhkd->nhqd'",
    ),
    "an Einsum with repeated letters": (
        f'{SCORES} p = Softmax <axis = -1> (s) y = Einsum <equation = "bhqq,bhqd->bhqd"> (p, v)',
        "float[2,4,5,8] q, float[2,4,5,8] k, float[2,4,5,8] v",
        "float[2,4,5,8] y",
        "the map meets the values in the Einsum 'bhqq,bhqd->bhqd'",
    ),
    "inside a branch": (
        f"y = If (c) <then_branch = t () => (float[2,4,5,8] a) {{ {SCORES} p = Softmax <axis = -1> (s) "
        "a = MatMul (p, v) }, else_branch = e () => (float[2,4,5,8] b) { b = Identity (q) }>",
        f"bool c, {QKV}",
        "float[2,4,5,8] y",
        "inside a branch or loop body",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_attention_of_another_form_is_refused_with_its_reason(case: str) -> None:
    body, inputs, outputs, reason = REFUSED[case]
    matches = explain(text_model(body, inputs, outputs))
    assert matches.sites == ()
    (miss,) = matches.near_misses
    assert reason in miss.reason
    assert miss.attention
    assert miss.nodes


def test_a_graph_without_keys_has_no_site() -> None:
    body = f"{SCORES} p = Softmax <axis = -1> (s) y = MatMul (p, v)"
    none = QKV.replace(",7,", ",0,")
    assert none != QKV
    matches = explain(text_model(body, none, "float[2,4,5,8] y"))
    assert matches.sites == ()
    assert [miss.attention for miss in matches.near_misses] == [True]


def test_an_old_opset_is_refused_with_what_to_do() -> None:
    body = f"{SCORES} p = Softmax <axis = -1> (s) y = MatMul (p, v)"
    (miss,) = explain(text_model(body, QKV, "float[2,4,5,8] y", opset=12)).near_misses
    assert miss.reason == f"attention, but the model has opset 12: {LIFT_ADVICE}"


def test_a_declared_shape_that_contradicts_a_weight_does_not_stop_matching() -> None:
    body = f"{SCORES} t = Mul (s, scale) p = Softmax <axis = -1> (t) y = MatMul (p, v)"
    proto = ir.to_proto(text_model(body, f"{QKV}, float[1] scale", "float[2,4,5,8] y"))
    del proto.graph.input[3]
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([0.5], np.float32), "scale"))
    proto.graph.value_info.append(helper.make_tensor_value_info("scale", TensorProto.FLOAT, ()))
    (site,) = find_sites(ir.from_proto(proto))
    assert site.map == "p"


def test_indices_that_come_from_what_they_index_are_not_walked_twice() -> None:
    """Sixty deep: each gather's data and indices come from the one before, and walks double where none remembers."""
    steps = "".join(
        f"i{n} = Cast <to = 7> (x{n}) l{n} = Gather <axis = 2> (i{n}, last) j{n} = Squeeze (l{n}, first) "
        f"x{n + 1} = Gather <axis = 1> (x{n}, j{n}) "
        for n in range(60)
    )
    body = (
        "last = Constant <value_int = 0> () first = Constant <value_ints = [0]> () x0 = Identity (x) "
        f"{steps} k = Transpose <perm = [0, 2, 1]> (x60) s = MatMul (x60, k) p = Softmax <axis = -1> (s) "
        "y = MatMul (p, x60)"
    )
    begun = time.process_time()
    assert len(explain(text_model(body, "float[1,7,8] x", "float[1,7,8] y")).sites) == 1
    assert time.process_time() - begun < 20
