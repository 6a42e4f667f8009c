"""Every attention of fresh exports is found, and what its names refer to behaves like attention when it runs."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from exports import MODELS, WAYS, export, export_module, numpy_inputs
from torch import nn

from atpatch_onnx import graph
from atpatch_onnx.matching import explain, find_sites
from atpatch_onnx.matching.hidden import find_hidden_layers
from atpatch_onnx.matching.layout import canonical
from atpatch_onnx.matching.sites import AttentionSite, Dim, Form

EXPORTS = [
    *(("vit", way) for way in WAYS),
    ("bert", "dynamo 18 sdpa"),
    ("bert", "torchscript eager"),
    ("gpt2", "dynamo 18 eager"),
    ("gpt2", "torchscript sdpa"),
    ("llama", "dynamo 23 sdpa"),
    ("llama", "torchscript eager"),
    ("llama", "transformers dynamic"),
    ("t5", "dynamo 18 eager"),
    ("t5", "torchscript eager"),
    ("t5", "transformers"),
]
exports = pytest.mark.parametrize(("name", "way"), EXPORTS, ids=["-".join(pair).replace(" ", "_") for pair in EXPORTS])


def in_canonical_axes(array: np.ndarray, layout: str, site: AttentionSite, heads: Dim) -> np.ndarray:
    sizes = {"h": heads, "w": site.parts}
    return canonical(array, layout, {letter: size for letter, size in sizes.items() if isinstance(size, int)})


def shared_heads_repeated(V: np.ndarray, site: AttentionSite) -> np.ndarray:
    """Each head of the values once for every head of the map that shares it."""
    return np.repeat(V, int(str(site.heads)) // V.shape[1], axis=1)


def observe(
    model: ir.Model, inputs: dict[str, np.ndarray]
) -> list[tuple[AttentionSite, np.ndarray, np.ndarray, np.ndarray]]:
    """Run the model and give each site with the map, values and output that it refers to, in canonical axes."""
    sites = find_sites(model)
    probed = graph.copy(model)
    values = {value.name: value for node in probed.graph for value in node.outputs}
    values |= {value.name: value for value in probed.graph.inputs} | dict(probed.graph.initializers)
    wanted = []
    for site in sites:
        if site.form is Form.ATTENTION:  # the op hands out its map as a fourth output
            node = values[site.output].producer()
            node.resize_outputs(4)
            node.outputs[1].name = node.outputs[2].name = ""
            node.outputs[3].name = f"map of {site.name}"
            node.attributes["qk_matmul_output_mode"] = ir.AttrInt64("qk_matmul_output_mode", 3)
            values[node.outputs[3].name] = node.outputs[3]
        wanted.append((site.map or f"map of {site.name}", site.value, site.output))
    for name in dict.fromkeys(name for names in wanted for name in names):
        if not values[name].is_graph_output():
            probed.graph.outputs.append(values[name])
    session = onnxruntime.InferenceSession(graph.to_bytes(probed), providers=["CPUExecutionProvider"])
    outputs = [value.name for value in probed.graph.outputs]
    found = dict(zip(outputs, session.run(outputs, inputs), strict=True))
    return [
        (
            site,
            in_canonical_axes(found[p], site.map_layout, site, site.heads),
            shared_heads_repeated(in_canonical_axes(found[v], site.value_layout, site, site.kv_heads), site),
            in_canonical_axes(found[y], site.output_layout, site, site.heads),
        )
        for site, (p, v, y) in zip(sites, wanted, strict=True)
    ]


def assert_behaves(model: ir.Model, inputs: dict[str, np.ndarray]) -> None:
    for site, P, V, Y in observe(model, inputs):
        assert P.ndim == 4, site.name
        assert P.shape[1] == site.heads
        assert P.shape[-1] == V.shape[-2]
        for said, is_now in ((site.queries, P.shape[2]), (site.keys, P.shape[3]), (site.depth, V.shape[3])):
            assert said == is_now or isinstance(said, str)
        assert (P >= 0).all()
        np.testing.assert_allclose(P.sum(-1), 1, atol=1e-5, err_msg=site.name)  # float32 sums of at most 64 weights
        np.testing.assert_allclose(P @ V, Y, atol=1e-5, err_msg=site.name)  # the same product, summed in another order


@exports
def test_every_attention_of_an_export_is_a_site(name: str, way: str) -> None:
    matches = explain(export(name, way))
    assert [miss.reason for miss in matches.near_misses] == []
    assert len(matches.sites) == MODELS[name].attentions
    assert [site.index for site in matches.sites] == list(range(len(matches.sites)))
    assert len({site.name for site in matches.sites}) == len(matches.sites)
    assert all(site.heads == 4 and site.depth == 8 and site.dtype == "FLOAT" and site.nodes for site in matches.sites)


@exports
def test_map_times_values_is_the_output(name: str, way: str) -> None:
    inputs = {key: value for key, value in numpy_inputs(name).items() if key in graph_inputs(export(name, way))}
    assert_behaves(export(name, way), inputs)


def graph_inputs(model: ir.Model) -> list[str]:
    return [str(value.name) for value in model.graph.inputs]


@exports
def test_matching_leaves_the_model_alone(name: str, way: str) -> None:
    proto = ir.to_proto(export(name, way))
    for node in proto.graph.node:
        for attribute in node.attribute:  # the tensors in Constants have no names where TorchScript was traced
            attribute.t.ClearField("name")
    model = ir.from_proto(proto)
    before = graph.fingerprint(model)
    explain(model)
    find_hidden_layers(model)
    assert graph.fingerprint(model) == before


@pytest.mark.parametrize("way", WAYS)
def test_a_site_has_one_name_whatever_the_way_of_export(way: str) -> None:
    assert [site.name for site in find_sites(export("vit", way))] == [
        "vit.layers.0.attention",
        "vit.layers.1.attention",
    ]


@pytest.mark.parametrize("way", ["dynamo 18 eager", "torchscript eager", "transformers"])
def test_encoder_and_decoder_of_equal_length_are_two_token_axes(way: str) -> None:
    sites = find_sites(export("t5", way))
    axis = {site.name: site.token_axis for site in sites}
    encoder, decoder, cross = ([s for s in sites if part in s.name] for part in ("encoder", "SelfAttention", "EncDec"))
    encoder = [site for site in encoder if site.name.startswith("encoder")]
    decoder = [site for site in decoder if site.name.startswith("decoder")]
    assert (len(encoder), len(decoder), len(cross)) == (2, 2, 2), axis
    assert len({site.token_axis for site in (*encoder, *cross)}) == 1, axis
    assert len({site.token_axis for site in decoder}) == 1, axis
    assert encoder[0].token_axis != decoder[0].token_axis
    assert all(site.self_attention for site in (*encoder, *decoder))
    assert not any(site.self_attention for site in cross)


@pytest.mark.parametrize(
    ("name", "way", "masked"),
    [
        ("vit", "dynamo 18 eager", False),
        ("vit", "dynamo 18 sdpa", False),
        ("vit", "torchscript eager", False),
        ("bert", "dynamo 18 sdpa", True),
        ("gpt2", "dynamo 18 eager", True),
        ("llama", "dynamo 23 sdpa", True),
    ],
)
def test_masked_says_whether_weights_can_be_zero(name: str, way: str, masked: bool) -> None:
    assert {site.masked for site in find_sites(export(name, way))} == {masked}


def test_a_dynamic_export_keeps_its_symbols() -> None:
    sites = find_sites(export("llama", "torchscript eager"))
    assert {(site.queries, site.keys, site.heads, site.kv_heads) for site in sites} == {
        ("input_ids_tokens", "input_ids_tokens", 4, 4)
    }


class Classifier(nn.Module):
    """Softmaxes that are no attention: a router over experts, a pooling over tokens, class probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.pool, self.head = nn.Linear(8, 4), nn.Linear(8, 1), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        routed = x * self.gate(x).softmax(-1).amax(-1, keepdim=True)
        pooled = (self.pool(routed).transpose(1, 2).softmax(-1) @ routed).squeeze(1)
        return self.head(pooled).softmax(-1)


@pytest.mark.parametrize("way", ["dynamo 18 eager", "torchscript eager"])
def test_other_softmaxes_are_refused_as_no_attention(way: str) -> None:
    model = export_module(Classifier().eval(), {"x": torch.randn(2, 5, 8)}, WAYS[way][1])
    matches = explain(model)
    assert matches.sites == ()
    assert [miss.attention for miss in matches.near_misses] == [False] * 3
    router, pooling, classes = (miss.reason for miss in matches.near_misses)
    assert "does not meet a value matrix" in router
    assert "linear layer" in pooling
    assert "is an output of the model" in classes
