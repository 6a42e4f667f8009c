"""Attention without a map is reported by the name of its module, and nothing else is."""

import onnx_ir as ir
from test_matching_forms import text_model

from atpatch_onnx.matching import explain

LINEAR = "kt = Transpose <perm = [0, 1, 3, 2]> (k) state = MatMul (kt, v) mixed = MatMul (q, state) y = Relu (mixed)"
INPUTS = "float[2,4,5,8] q, float[2,4,5,8] k, float[2,4,5,8] v"


def named(module: str, body: str = LINEAR) -> ir.Model:
    """A model whose nodes come from this module, as the TorchScript exporter names them."""
    model = text_model(body, INPUTS, "float[2,4,5,8] y")
    for number, node in enumerate(model.graph):
        node.name = f"/{module}/{node.op_type}_{number}"
    return model


def test_a_module_called_attention_without_a_softmax_is_reported() -> None:
    matches = explain(named("encoder/layer.0/attention/self"))
    (miss,) = matches.near_misses
    assert matches.sites == ()
    assert "attention without a map: the module encoder.layer.0.attention has no softmax over keys" in miss.reason
    assert not miss.attention, "there is no map to patch"
    assert miss.nodes == ("/encoder/layer.0/attention/self/MatMul_1", "/encoder/layer.0/attention/self/MatMul_2")


def test_other_modules_are_not() -> None:
    assert explain(named("encoder/layer.0/mlp")).near_misses == ()
    assert explain(named("encoder/layer.0/attention_norm")).near_misses == ()


def test_a_module_with_a_site_is_not() -> None:
    body = "kt = Transpose <perm = [0, 1, 3, 2]> (k) s = MatMul (q, kt) p = Softmax <axis = -1> (s) y = MatMul (p, v)"
    matches = explain(named("encoder/layer.0/attention", body))
    assert [site.name for site in matches.sites] == ["encoder.layer.0.attention"]
    assert matches.near_misses == ()
