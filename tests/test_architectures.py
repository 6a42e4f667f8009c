"""Tiny models of many architectures, exported afresh: a new transformers release shows here what it breaks."""

import os

import pytest
from architectures import ARCHITECTURES, SOMETIMES, count_attentions, export_architecture
from exports import export

from atpatch_onnx import rehearse
from atpatch_onnx.matching import explain, find_sites

pytestmark = pytest.mark.nightly

ALL = "ATPATCH_ALL_ARCHITECTURES" in os.environ
"""Set the variable to try every row of the table."""

TRIED = [name for name in ARCHITECTURES if ALL or name not in SOMETIMES]
WITH_SITES = [name for name in TRIED if ARCHITECTURES[name].sites]


def test_enough_architectures_are_tried() -> None:
    assert len(ARCHITECTURES) >= 40
    assert len(WITH_SITES) >= 28


@pytest.mark.parametrize("name", TRIED)
def test_every_attention_of_the_architecture_is_a_site(name: str) -> None:
    architecture = ARCHITECTURES[name]
    assert count_attentions(architecture.build(), architecture.inputs) == architecture.attentions, "in torch"
    matches = explain(export_architecture(name))
    refused = [miss.reason for miss in matches.near_misses if miss.attention]
    others = [miss.reason for miss in matches.near_misses if not (miss.attention or "without a map" in miss.reason)]
    assert len(matches.sites) == architecture.sites, (others, refused)
    assert len(refused) == architecture.refused, refused
    assert all("its keys do not stand token by token" in reason for reason in refused)
    assert len(others) == architecture.softmaxes, others
    assert all(None not in (site.parts, site.heads, site.queries, site.keys) for site in matches.sites)


@pytest.mark.parametrize("name", WITH_SITES)
def test_a_patch_of_the_architecture_is_exact(name: str) -> None:
    inputs = {key: tensor.numpy() for key, tensor in ARCHITECTURES[name].inputs.items()}
    model = export_architecture(name)
    taken = {str(value.name): inputs[str(value.name)] for value in model.graph.inputs}
    rehearsal = rehearse(model, taken, optimize=(True,), threads=1)
    assert rehearsal.runs, rehearsal.reason
    assert rehearsal.failures == ()


@pytest.mark.parametrize(
    ("model", "module"),
    [("bert", "encoder.layer.{}.attention.self"), ("gpt2", "transformer.h.{}.attn"), ("llama", "layers.{}.self_attn")],
)
@pytest.mark.parametrize(
    "way", ["dynamo 18 sdpa", "dynamo 23 sdpa", "torchscript eager", "transformers", "transformers dynamic"]
)
def test_sites_have_the_names_of_their_modules_in_every_way_of_export(model: str, module: str, way: str) -> None:
    names = [module.format(layer) for layer in range(2)]
    assert [site.name for site in find_sites(export(model, way))] == names
