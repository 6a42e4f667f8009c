"""Real exports of 101 architectures: each attention is a site or a near miss, nothing else is a site."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import onnx
import onnx_ir as ir
import pytest

from atpatch_onnx.matching import explain
from atpatch_onnx.measuring.rehearse import rehearse

CORPUS = Path(__file__).parents[2] / "shared" / "graphs"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CORPUS.is_dir(), reason="the corpus of exported graphs does not lie beside the repository"),
]

SAMPLE_STEP = 12
"""Every twelfth of 462 graphs by name: each way of export and most families of architectures."""

TWO_PRODUCTS = {"diffllama.a.onnx": 2, "diffllama.d.onnx": 2}
"""Softmaxes that feed a second product with values; the survey counted softmaxes, each product is a site."""

ALWAYS = {"bert.a.onnx", "convbert.h.onnx", "diffllama.a.onnx", "gpt_oss.a.onnx", "swin.h.onnx", "gpt2.b.onnx"} | {
    "canine.h.onnx",
    "pixtral.h.onnx",
}


def loader() -> ModuleType:
    spec = importlib.util.spec_from_file_location("corpus_load", CORPUS / "load.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SPREAD = ("prophetnet.a.onnx", "prophetnet.h.onnx")
"""Each stream of predicted tokens attends on its own, and streams have a separate axis in map, keys and values."""


REASONS = {
    "ernie4_5.h.onnx": "at /m/model/layers.0/self_attn/Reshape sizes do not fit, [input_ids_0, input_ids_0, 512] and",
    "patchtst.i.onnx": "positional_encoder/Add sizes do not fit, [past_values_0, 4, 2, 32] and [4, 32]",
    "informer_dec.a.onnx": "in any tensor that is read for it alone: transpose is read for more",
}
"""Of the first refused attention: exports that no input runs, and keys that choose the queries."""


@pytest.fixture(scope="module")
def sample() -> dict[str, onnx.ModelProto]:
    names = sorted(json.loads((CORPUS / "expected.json").read_text())["graphs"])
    wanted = {*names[::SAMPLE_STEP], *ALWAYS, *SPREAD, *REASONS}
    return {name: proto for name, proto in loader().graphs() if name in wanted}


def test_every_attention_is_a_site_or_a_near_miss(sample: dict[str, onnx.ModelProto]) -> None:
    expected = json.loads((CORPUS / "expected.json").read_text())["graphs"]
    wrong = {}
    for name, proto in sample.items():
        matches = explain(ir.from_proto(proto))
        refused = [miss for miss in matches.near_misses if miss.attention]
        others = [miss for miss in matches.near_misses if not miss.attention]
        attentions = expected[name]["softmax_sites"] + expected[name]["fused_sites"] + TWO_PRODUCTS.get(name, 0)
        found = (len(matches.sites) + len(refused), len(others))
        if found != (attentions, expected[name]["softmax_not_attention"]):
            wrong[name] = (found, [miss.reason for miss in matches.near_misses])
    assert len(sample) > 40
    assert wrong == {}


@pytest.mark.parametrize("name", SPREAD)
def test_maps_on_two_axes_are_patched_exactly(sample: dict[str, onnx.ModelProto], name: str) -> None:
    model = ir.from_proto(sample[name])
    sites = explain(model).sites
    assert [site.parts for site in sites] == [1, 1, 1, 2, 1, 1, 2, 1]
    assert all(place.axes.count("n") == site.parts for site in sites for place in (site.key, site.value))
    result = rehearse(model)
    assert result.passed, result.failures
    assert result.runs


@pytest.mark.parametrize("name", REASONS)
def test_reasons_say_what_is_wrong(sample: dict[str, onnx.ModelProto], name: str) -> None:
    refused = [miss.reason for miss in explain(ir.from_proto(sample[name])).near_misses if miss.attention]
    assert len(refused) == 2
    assert REASONS[name] in refused[0]
