"""Beside other tools: what they leave of a base is matched, and what they leave of a patched graph does the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import FORMS, Net, draw_patch, fire_on_some, run
from onnxruntime.quantization import quantize_dynamic

from atpatch_onnx import graph
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.quantize import quantizer_settings
from atpatch_onnx.errors import BakeError
from atpatch_onnx.graph.names import SITE_KEY
from atpatch_onnx.matching import explain
from atpatch_onnx.measuring import rehearse
from samples import after_tools

ROOT = Path(__file__).parent.parent

NETS = {"decomposed": Net(batch=2, tokens=6), "Attention": Net(batch=2, tokens=6, opset=23, form="attention")}


tools_warn = pytest.mark.filterwarnings("ignore")
"""Warnings of the tools, which are not ours."""


@pytest.fixture(scope="module", params=NETS)
def case(request: pytest.FixtureRequest) -> Any:
    return after_tools.Case.of(request.param, NETS[request.param].model())


@tools_warn
@pytest.mark.parametrize("tool", after_tools.TOOLS)
def test_a_tool_before_or_after_the_patch_changes_nothing_of_it(case: Any, tool: str) -> None:
    findings = list(after_tools.examine(case, tool, after_tools.TOOLS[tool]))
    assert [finding.form for finding in findings] == list(rehearse.FORMS.values())
    for finding in findings:
        assert finding.sound, finding
        assert finding.after == finding.before == 2
        assert finding.either_order == finding.inputs
        assert 0 < finding.quiet < finding.inputs, "the patch fires on some inputs"
        assert finding.bits == finding.quiet
        assert finding.difference < 1e-5


def test_the_drawn_patch_changes_what_it_flags(case: Any) -> None:
    base = after_tools.run(case.model, case.inputs)
    flagged = [bool(result["atpatch/flagged"].any()) for result in case.patched]
    changed = [not np.array_equal(one["logits"], two["logits"]) for one, two in zip(base, case.patched, strict=True)]
    assert changed == flagged


# Quantizers


def int8(model: ir.Model, tmp_path: Path, **options: Any) -> onnx.ModelProto:
    """The model after quantize_dynamic, which may look everywhere and quantize products of activations, too."""
    everything = {"EnableSubgraph": True, "MatMulConstBOnly": False, "DefaultTensorType": onnx.TensorProto.FLOAT}
    proto = onnx.load_from_string(graph.to_bytes(model))
    quantize_dynamic(proto, tmp_path / "int8.onnx", extra_options=everything, **options)
    return onnx.load(tmp_path / "int8.onnx")


def patched_net(form: str, **options: Any) -> tuple[ir.Model, dict[str, np.ndarray]]:
    net = Net(opset=23, form=form)
    model, feed = net.model(), net.feed(np.random.default_rng(1))
    return bake(model, fire_on_some(model, draw_patch(model), feed), **options), feed


def nodes(model: onnx.GraphProto) -> list[onnx.NodeProto]:
    inner = [attribute.g for node in model.node for attribute in node.attribute if attribute.HasField("g")]
    return [*model.node, *(node for graph_ in inner for node in nodes(graph_))]


def our_products(model: onnx.ModelProto) -> list[str]:
    return [
        node.op_type
        for node in nodes(model.graph)
        if node.op_type.startswith("MatMul") and node.name.startswith("atpatch/")
    ]


@tools_warn
@pytest.mark.parametrize("conditional", FORMS)
def test_a_quantizer_that_is_told_leaves_the_patch_in_float32(conditional: bool, tmp_path: Path) -> None:
    patched, feed = patched_net("attention", conditional=conditional)
    told = int8(patched, tmp_path, **quantizer_settings(patched))
    untold = int8(patched, tmp_path, op_types_to_quantize=["MatMul"])
    assert set(our_products(told)) == {"MatMul"}
    assert "MatMulInteger" in our_products(untold), "the settings make the difference"
    assert "MatMulInteger" in [node.op_type for node in told.graph.node], "the base is quantized all the same"
    assert np.array_equal(run(told, feed)["atpatch/flagged"], run(patched, feed)["atpatch/flagged"])


@pytest.mark.parametrize("conditional", FORMS)
def test_the_settings_name_every_node_of_ours_and_no_other(conditional: bool) -> None:
    patched, _ = patched_net("softmax", conditional=conditional)
    settings = quantizer_settings(patched)
    ours = {node.name for node in patched.graph.all_nodes() if SITE_KEY in node.metadata_props}
    assert set(settings["nodes_to_exclude"]) == ours
    assert len(settings["nodes_to_exclude"]) == len(ours)
    assert settings["op_types_to_quantize"] == ["MatMul"]
    assert json.loads(json.dumps(settings)) == settings


@pytest.mark.parametrize("conditional", FORMS)
def test_the_settings_know_our_products_in_what_onnxruntime_optimized(conditional: bool) -> None:
    patched, _ = patched_net("softmax", conditional=conditional)
    optimized = after_tools.TOOLS["onnxruntime, basic"](patched)
    products = {node.name for node in optimized.graph.all_nodes() if node.op_type == "MatMul"}
    base = {node.name for node in Net(opset=23).model().graph if node.op_type == "MatMul"}
    assert len(products - base) == 2, "one for each site"
    assert products - base <= set(quantizer_settings(optimized)["nodes_to_exclude"])
    assert not base & set(quantizer_settings(optimized)["nodes_to_exclude"])


def test_a_base_has_no_settings() -> None:
    with pytest.raises(BakeError, match="Bake a patch first"):
        quantizer_settings(Net().model())


@tools_warn
def test_maps_that_meet_their_values_as_int8_are_near_misses(tmp_path: Path) -> None:
    quantized = ir.from_proto(int8(Net().model(), tmp_path, op_types_to_quantize=["MatMul"]))
    matches = explain(quantized)
    assert not matches.sites
    assert [miss.attention for miss in matches.near_misses] == [True, True]
    assert all("MatMulConstBOnly" in miss.reason for miss in matches.near_misses)


# The sample and its document


@tools_warn
@pytest.mark.nightly
def test_the_sample_finds_vit_and_bert_as_they_were(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "tools.md"
    document.write_text(f"before\n{after_tools.BEGIN}\nold\n{after_tools.END}\nafter\n")
    assert after_tools.main(["--fast", "--out", str(document)]) == 0, capsys.readouterr().out
    text = document.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert lines_of_tools(text) == list(after_tools.TOOLS)


def test_the_document_has_a_line_for_every_tool() -> None:
    assert lines_of_tools((ROOT / "docs" / "evidence" / "tools.md").read_text()) == list(after_tools.TOOLS)


def lines_of_tools(document: str) -> list[str]:
    table = document[document.index(after_tools.BEGIN) : document.index(after_tools.END)]
    first = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if line.startswith("| ")]
    assert first[0] == "tool"
    return first[1:]
