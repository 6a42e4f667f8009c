"""Attention without a map is reported by the name of its module, and nothing else is."""

import onnx_ir as ir
import pytest
from test_matching_forms import text_model

from atpatch_onnx.matching import explain

LINEAR = "kt = Transpose <perm = [0, 1, 3, 2]> (k) state = MatMul (kt, v) mixed = MatMul (q, state) y = Relu (mixed)"
INPUTS = "float[2,4,5,8] q, float[2,4,5,8] k, float[2,4,5,8] v"


def written(body: str) -> ir.Model:
    model = text_model(body, INPUTS, "float[2,4,5,8] y")
    model.graph.opset_imports.update(vendor=1, trt=1)
    return model


def named(module: str, body: str = LINEAR) -> ir.Model:
    """A model whose nodes come from this module, as the TorchScript exporter names them."""
    model = written(body)
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


@pytest.mark.parametrize("operator", ["vendor.FlashAttention", "trt.fmha_v2", "com.microsoft.QOrderedAttention"])
def test_an_operator_that_is_attention_by_its_name_is_named(operator: str) -> None:
    matches = explain(written(f"y = {operator} (q, k, v)"))
    assert matches.sites == ()
    (miss,) = matches.near_misses
    assert miss.attention
    assert f"the operator {'::'.join(operator.rsplit('.', 1))}, which is not known" in miss.reason


@pytest.mark.parametrize("operator", ["vendor.AttentionMask", "vendor.Rotary"])
def test_what_serves_an_attention_is_not(operator: str) -> None:
    assert explain(written(f"y = {operator} (q)")).near_misses == ()


def test_what_was_not_looked_into_is_said_of_a_module() -> None:
    model = named("encoder/layer.0/attention", f"{LINEAR.rpartition(' y = ')[0]} y = vendor.Mystery (mixed)")
    (miss,) = explain(model).near_misses
    assert "what is in vendor::Mystery was not looked into" in miss.reason
