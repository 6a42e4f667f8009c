"""Every attention of fresh exports is found, and what its names refer to behaves like attention when it runs."""

import onnx_ir as ir
import pytest
import torch
from exports import MODELS, WAYS, export, export_module, numpy_inputs
from nudge import assert_places
from torch import nn

from atpatch_onnx import graph
from atpatch_onnx.matching import explain, find_sites
from atpatch_onnx.matching.hidden import find_hidden_layers

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


@exports
def test_every_attention_of_an_export_is_a_site(name: str, way: str) -> None:
    matches = explain(export(name, way))
    assert [miss.reason for miss in matches.near_misses] == []
    assert len(matches.sites) == MODELS[name].attentions
    assert [site.index for site in matches.sites] == list(range(len(matches.sites)))
    assert len({site.name for site in matches.sites}) == len(matches.sites)
    assert all(site.heads == 4 and site.dtype == "FLOAT" and site.nodes for site in matches.sites)
    heads = 2 if name == "llama" else 4
    assert {(p.heads, p.depth) for site in matches.sites for p in (site.key, site.value)} == {(heads, 8)}


@exports
def test_keys_and_values_are_where_a_site_says(name: str, way: str) -> None:
    inputs = {key: value for key, value in numpy_inputs(name).items() if key in graph_inputs(export(name, way))}
    assert_places(export(name, way), inputs)


@exports
def test_keys_stand_behind_their_projection_whatever_the_way_of_export(name: str, way: str) -> None:
    """In front of rotary embedding, repetition of heads, Transpose and scale."""
    model = export(name, way)
    producers = {value.name: node.op_type for node in model.graph for value in node.outputs}
    for site in find_sites(model):
        for place in (site.key, site.value):
            assert producers[place.value] in ("Add", "MatMul", "Gemm", "Split", "Slice"), place
            assert (place.start, place.reader, place.bias) == (place.start if not place.whole else 0, None, None)


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
    assert {(site.queries, site.keys, site.heads, site.key.heads) for site in sites} == {
        ("input_ids_tokens", "input_ids_tokens", 4, 2)
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
    assert all("its scores come from a linear layer" in miss.reason for miss in matches.near_misses)
