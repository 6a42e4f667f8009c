"""Rehearsals: sound nets pass, and whatever is wrong with a net, its patch or the arithmetic is named."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import Net
from onnx import TensorProto, helper, numpy_helper

import atpatch_onnx as atp
from atpatch_onnx.baking import weave
from atpatch_onnx.baking.emission import Emission
from atpatch_onnx.measuring import rehearse as rehearsal
from atpatch_onnx.measuring.inspect import SiteValues
from atpatch_onnx.measuring.rehearse import rehearse
from atpatch_onnx.measuring.rehearse_base import run_base
from atpatch_onnx.measuring.rehearse_mixing import mixing_outputs
from atpatch_onnx.running.drawing import PAST, WAVE, draw_inputs
from samples import coverage

ROOT = Path(__file__).parent.parent

NETS = {
    "softmax": Net(),
    "guarded": Net(form="guarded", opset=17),
    "biased": Net(bias=True),
    "fixed": Net(batch=3, tokens=6),
    "one-sample": Net(batch=1),
    "attention": Net(form="attention", opset=23),
    "packed-grouped": Net(form="packed", opset=23, heads=4, kv_heads=2),
    "causal": Net(form="attention", opset=23, causal=True, layers=1),
    "cached": Net(form="attention", opset=23, past=3),
    "half": Net(half=True),
}


def failed(result: rehearsal.Rehearsal) -> set[str]:
    """What the failed checks are about."""
    return {check.name.split(",")[0] for check in result.failures}


@pytest.mark.parametrize("name", NETS)
def test_a_sound_net_passes(name):
    net = NETS[name]
    result = rehearse(net.model())
    assert result.passed, result.failures
    assert (result.runs, result.reason, result.found) == (True, "", net.layers)
    assert (result.nonfinite, result.mixing) == ((), ())
    emissions = ["branchless"] if net.half else ["conditional", "branchless"]
    settings = [(emission, optimized) for emission in emissions for optimized in (False, True)]
    assert [(of.emission, of.optimized) for of in result.sites[:: net.layers]] == settings
    for of_site in result.sites:
        assert 0 < of_site.flagged < of_site.columns
        assert of_site.untouched is (True if of_site.site == result.sites[0].site else None)
    if net.batch != 1:
        spared = [check for check in result.checks if check.name.startswith("samples without a flag")]
        assert all(int(check.detail.split()[0]) > 0 for check in spared)


def test_what_is_asked_for_is_tried():
    steps = []
    result = rehearse(
        Net().model(),
        optimize=(True,),
        emissions=(Emission.BRANCHLESS,),
        progress=lambda stage, done, total: steps.append((done, total)),
    )
    assert {(of.emission, of.optimized) for of in result.sites} == {("branchless", True)}
    assert steps == [(done, 5) for done in range(1, 6)]


def test_it_is_the_same_every_time_and_for_a_path(tmp_path):
    model = Net().model()
    atp.save(model, tmp_path / "model.onnx")
    assert rehearse(model) == rehearse(tmp_path / "model.onnx") != rehearse(model, seed=1)


def test_the_result_is_plain_json():
    result = rehearse(Net(layers=1).model())
    stored = json.loads(json.dumps(result.to_json()))
    assert stored["passed"] is True
    assert stored["inputs"] == {"x": [2, 16, 8]}
    assert stored["checks"] == [asdict(check) for check in result.checks]
    assert stored["sites"] == [asdict(of_site) for of_site in result.sites]


def test_given_inputs_are_used():
    net = Net()
    result = rehearse(net.model(), net.feed(np.random.default_rng(0), batch=5, tokens=7))
    assert result.passed
    assert result.inputs == {"x": (5, 7, 8)}
    assert result.sites[0].columns == 5 * 7


def test_random_operators_draw_the_same_everywhere():
    model = Net().model()
    noise = ir.Node("", "RandomNormalLike", [model.graph.inputs[0]], name="noise")
    noisy = ir.Node("", "Add", [model.graph.inputs[0], noise.outputs[0]], name="noisy")
    model.graph.inputs[0].replace_all_uses_with(noisy.outputs[0])
    noise.replace_input_with(0, model.graph.inputs[0])
    noisy.replace_input_with(0, model.graph.inputs[0])
    model.graph.insert_before(model.graph[0], [noise, noisy])
    result = rehearse(model)
    assert result.passed, result.failures


# What is wrong is named


def test_a_base_that_onnxruntime_does_not_load():
    model = Net().model()
    model.graph.opset_imports["nobody"] = 1
    model.graph.append(ir.Node("nobody", "Unknown", [model.graph.outputs[0]], name="unknown"))
    result = rehearse(model)
    assert (result.runs, result.passed, result.found, result.checks) == (False, False, 2, ())
    assert "no optimization" in result.reason
    assert "default optimization" in result.reason
    assert "Unknown" in result.reason


def test_inputs_that_the_base_refuses():
    result = rehearse(Net().model(), {"x": np.zeros((2, 5, 9), np.float32)})
    assert not result.runs
    assert "float32[2, 5, 9]" in result.reason


def test_a_model_without_attention_neither_passes_nor_fails():
    model = Net(layers=0).model()
    result = rehearse(model)
    assert (result.runs, result.found, result.passed, result.failures) == (True, 0, False, ())


def test_an_opset_that_is_too_old_is_a_failure():
    model = Net(opset=15).model()
    model.graph.opset_imports[""] = 14
    result = rehearse(model)
    assert failed(result) == {"a patch"}
    assert "opset 14" in result.failures[0].detail


def test_outputs_that_are_not_finite_are_named():
    proto = Net().proto()
    proto.graph.node.append(helper.make_node("Log", ["hidden"], ["log"], name="log"))
    proto.graph.output.append(helper.make_tensor_value_info("log", TensorProto.FLOAT, ("batch", "tokens", 8)))
    result = rehearse(ir.from_proto(proto))
    assert result.nonfinite == ("log",)
    assert result.passed


def compared(net: Net) -> ir.Model:
    """As CLIP does it: `similar` `[batch, batch]` compares every sample with every other, `hidden` does not."""
    proto = net.proto()
    proto.graph.node.append(helper.make_node("Transpose", ["pooled"], ["columns"], name="columns"))
    proto.graph.node.append(helper.make_node("MatMul", ["pooled", "columns"], ["similar"], name="similar"))
    proto.graph.output.append(helper.make_tensor_value_info("similar", TensorProto.FLOAT, (net.batch, net.batch)))
    return ir.from_proto(proto)


def test_outputs_that_mix_samples_are_named_and_left_out():
    result = rehearse(compared(Net()))
    assert result.passed, result.failures
    assert result.mixing == ("similar",)
    assert result.to_json()["mixing"] == ["similar"]
    spared = [check.detail for check in result.checks if check.name.startswith("samples without a flag")]
    assert spared == ["1 of 2 without a flag; similar left out, which mix samples"] * 4


def test_without_the_exception_they_fail(monkeypatch):
    monkeypatch.setattr(rehearsal, "mixing_outputs", lambda *_: ())
    result = rehearse(compared(Net()))
    assert failed(result) == {"samples without a flag"}
    assert all(check.detail.endswith("changed in similar") for check in result.failures)


def test_the_other_outputs_are_still_checked(monkeypatch):
    disturb(monkeypatch)
    result = rehearse(compared(Net()))
    spared = [check for check in result.failures if check.name.startswith("samples without a flag")]
    assert len(spared) == 4
    assert all("changed in logits, hidden; similar left out" in check.detail for check in spared)


@pytest.mark.parametrize("flagged", [[False, False], [True, True]])
def test_with_all_or_no_samples_flagged_nothing_is_said_to_mix(flagged):
    model = compared(Net())
    runs = run_base(model, None, np.random.default_rng(0), 2, (True,), 1)
    assert mixing_outputs(model, runs, np.array(flagged), 1) == ()
    assert mixing_outputs(model, runs, np.array([True, False]), 1) == ("similar",)


def disturb(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every site's output is off by a little."""
    repair = weave.repair_output

    def disturbed(at, site, handles, repair_, emission):
        repair(at, site, handles, repair_, emission)
        result = next(value for node in at.graph for value in node.outputs if value.name == site.output)
        tiny = at.constant("tiny", np.full(1, 1e-6, np.float32))
        users = list(result.uses())
        moved = at.op("Add", result, tiny, name="disturbed")
        for node, index in users:
            node.replace_input_with(index, moved)

    monkeypatch.setattr(weave, "repair_output", disturbed)


def test_an_emission_that_disturbs_the_output(monkeypatch):
    disturb(monkeypatch)
    assert {"nothing fires", "samples without a flag"} <= failed(rehearse(Net().model()))


def test_flags_that_reach_the_other_samples(monkeypatch):
    own = weave.per_map

    def for_all(at, site, handles, of_samples, name):
        flags = own(at, site, handles, of_samples, name)
        number = at.op("Cast", flags, name="number", attributes=[ir.AttrInt64("to", ir.DataType.INT32)])
        largest = at.op("ReduceMax", number, at.constant("samples", np.zeros(1, np.int64)), name="largest")
        zeros = at.op("Sub", number, number, name="zeros")
        return at.op("Greater", at.op("Add", zeros, largest, name="spread"), zeros, name="for_all")

    monkeypatch.setattr(weave, "per_map", for_all)
    assert failed(rehearse(Net().model())) == {"reference", "samples without a flag"}


def test_a_site_that_does_not_compute_the_reference(monkeypatch):
    monkeypatch.setattr(SiteValues, "reference", lambda values: values.Y)
    result = rehearse(Net().model())
    assert failed(result) == {"reference"}
    assert all(of_site.difference > of_site.allowed > of_site.product for of_site in result.sites)


def test_a_layout_that_is_not_that_of_the_values(monkeypatch):
    """The patched graph and the reference agree on it: only the base's own output tells."""
    find = rehearsal.find_sites

    def mistaken(model):
        return tuple(replace(site, value_layout="nk(dh)") for site in find(model))

    monkeypatch.setattr(rehearsal, "find_sites", mistaken)
    monkeypatch.setattr(sys.modules["atpatch_onnx.baking.bake"], "find_sites", mistaken)
    result = rehearse(NETS["packed-grouped"].model())
    assert failed(result) == {"reference"}
    assert all(of_site.product > of_site.allowed > of_site.difference for of_site in result.sites)


def test_a_map_that_is_not_the_bases_own(monkeypatch):
    opened = weave.open_site

    def rounded(model, site):
        handles, at = opened(model, site)
        tiny = at.constant("tiny", np.full(1, 1 + 2**-20, np.float32))
        return replace(handles, P=at.op("Mul", handles.P, tiny, name="rounded")), at

    monkeypatch.setattr(weave, "open_site", rounded)
    result = rehearse(Net().model())
    assert failed(result) == {"reference"}
    assert "not the base's own" in result.failures[0].detail


def test_a_patch_that_does_not_come_out(monkeypatch):
    def leaves_a_trace(model, patch, **options):
        patched = atp.bake(model, patch, **options)
        patched.graph.append(ir.Node("", "Identity", [patched.graph.inputs[0]], name="trace"))
        return patched

    monkeypatch.setattr(rehearsal, "bake", leaves_a_trace)
    assert failed(rehearse(Net().model())) == {"unbake"}


# Drawn inputs


def reader(*inputs: onnx.ValueInfoProto, nodes: list[onnx.NodeProto] = [], **weights: np.ndarray) -> ir.Model:  # noqa: B006
    """A model that need not run."""
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "reader", inputs, [], initializers)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]))


def ints(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.INT64, shape)


def floats(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def test_tokens_are_within_the_smallest_table_and_end_with_what_the_graph_looks_for():
    nodes = [
        helper.make_node("Gather", ["large", "input_ids"], ["a"]),
        helper.make_node("Cast", ["input_ids"], ["cast"], to=TensorProto.INT32),
        helper.make_node("Gather", ["small", "cast"], ["b"]),
        helper.make_node("Equal", ["end", "input_ids"], ["c"]),
    ]
    tables = {"large": np.zeros((9, 2), np.float32), "small": np.zeros((5, 2), np.float32)}
    model = reader(ints("input_ids", "batch", "tokens"), nodes=nodes, end=np.array(3), **tables)
    ids = draw_inputs(model, np.random.default_rng(0), samples=4, length=50)["input_ids"]
    assert ids.shape == (4, 50)
    assert set(ids[:, :-1].ravel()) == {0, 1, 2, 4}
    assert set(ids[:, -1]) == {3}


def test_masks_have_some_padding_and_cover_the_cache():
    model = reader(
        ints("input_ids", "batch", 1),
        ints("attention_mask", "batch", "total"),
        ints("position_ids", "batch", 1),
        floats("past_key_values.0.key", "batch", 2, "past", 8),
        floats("attention_bias_mask", "batch", 1, "tokens", "tokens"),
    )
    drawn = draw_inputs(model, np.random.default_rng(0), samples=3)
    assert drawn["past_key_values.0.key"].shape == (3, 2, PAST, 8)
    assert drawn["attention_mask"].tolist() == [[1] * 6, [1] * 6, [1] * 5 + [0]]
    assert drawn["position_ids"].tolist() == [[PAST]] * 3
    assert not drawn["attention_bias_mask"].any()


def test_equal_symbols_are_equal_sizes_and_types_are_kept():
    model = reader(
        floats("images", "n", 3, "side", "side"),
        helper.make_tensor_value_info("half", TensorProto.FLOAT16, ("n", "side", 1)),
        floats("wave", "n", "points"),
        helper.make_tensor_value_info("use_cache", TensorProto.BOOL, (1,)),
        ints("length"),
    )
    drawn = draw_inputs(model, np.random.default_rng(0), length=12)
    assert {name: array.shape for name, array in drawn.items()} == {
        "images": (2, 3, 12, 12),
        "half": (2, 12, 1),
        "wave": (2, 12 * WAVE),
        "use_cache": (1,),
        "length": (),
    }
    assert [array.dtype for array in drawn.values()] == [np.float32, np.float16, np.float32, np.bool_, np.int64]


# Coverage of a corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Hand-made graphs under the names of a corpus: two ways, one gap, one that does not run, one without attention."""
    folder = tmp_path_factory.mktemp("corpus")
    nets = {"dense.a": Net(), "dense.b": NETS["attention"], "none.a": Net(layers=0)}
    for name, net in nets.items():
        onnx.save(net.proto(), folder / f"{name}.onnx")
    proto = Net(layers=1).proto()
    proto.opset_import.append(helper.make_opsetid("nobody", 1))
    proto.graph.node.append(helper.make_node("Unknown", ["hidden"], ["unknown"], domain="nobody", name="unknown"))
    onnx.save(proto, folder / "odd.b.onnx")
    counts = {"dense.a.onnx": (2, 0), "dense.b.onnx": (0, 2), "none.a.onnx": (0, 0), "odd.b.onnx": (3, 0)}
    graphs = {
        name: {"softmax_sites": softmax, "fused_sites": fused, "softmax_not_attention": 0}
        for name, (softmax, fused) in counts.items()
    }
    ways = {"a": "one way", "b": "another"}
    (folder / "expected.json").write_text(json.dumps({"graphs": graphs, "ways": ways}))
    return folder


def cover(corpus: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "samples.coverage", "--corpus", str(corpus)]
    command += ["--expected", str(corpus / "expected.json"), "--out", str(out), *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_coverage_of_a_corpus(corpus, tmp_path):
    kept = tmp_path / "kept.jsonl"
    done = cover(corpus, tmp_path / "coverage.md", "--json", str(kept))
    assert done.returncode == 1, done.stderr  # odd.b has one site, three are expected
    written = (tmp_path / "coverage.md").read_text()
    assert "| dense | 2 ok | 2 ok |" in written
    assert "| none | none |  |" in written
    assert "| odd |  | 1 of 3* export broken |" in written
    assert "`odd.b.onnx`: 1 sites, 3 expected; not explained" in written
    assert "Unknown" in written.split("## Graphs whose export itself is wrong")[1]
    assert "| `MatMul > Mul > Softmax > MatMul` |" in written or "> Softmax >" in written
    assert len(kept.read_text().splitlines()) == 4

    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[:3]))
    again = cover(corpus, tmp_path / "again.md", "--json", str(kept))
    assert again.returncode == 1
    assert sorted(json.loads(line)["name"] for line in kept.read_text().splitlines()) == sorted(
        json.loads(line)["name"] for line in lines
    )
    assert (tmp_path / "again.md").read_text() == written


@pytest.mark.slow
def test_a_graph_that_takes_too_long_does_not_end_the_run(corpus, tmp_path):
    done = cover(corpus, tmp_path / "coverage.md", "--fast", "--seconds", "0.01")
    assert done.returncode == 1
    written = (tmp_path / "coverage.md").read_text()
    assert "| dense | no result |" in written
    assert "`dense.a.onnx`: not done after 0.01 s" in written


def test_a_softmax_with_two_products_explains_itself():
    sites = ({"map": "P", "product": "one"}, {"map": "P", "product": "two"}, {"map": "Q", "product": "three"})
    graph = coverage.Graph("net.a.onnx", "", sites)
    counts = {"softmax_sites": 2, "fused_sites": 0, "softmax_not_attention": 0}
    expected = coverage.Expected({"net.a.onnx": counts}, {})
    reason = coverage.gap(graph, expected)
    assert "`one`, `two`" in reason
    assert "not explained" not in reason
