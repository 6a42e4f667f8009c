"""Rehearsals: sound nets pass, and whatever is wrong with a net, its patch or the arithmetic is named."""

import json
from dataclasses import asdict

import numpy as np
import onnx_ir as ir
import pytest
from form_nets import FORMS
from models import Net
from onnx import TensorProto, helper
from planted import Planted
from test_verify import with_odd_outputs

import atpatch_onnx as atp
from atpatch_onnx.baking import write
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.matching import find_sites
from atpatch_onnx.measuring import rehearse as rehearsal
from atpatch_onnx.measuring.drawn import draw_patch
from atpatch_onnx.measuring.rehearse import rehearse
from atpatch_onnx.measuring.rehearse_aiming import aimed, threshold_of
from atpatch_onnx.measuring.rehearse_base import mixing_outputs, run_base
from atpatch_onnx.running.sessions import Session

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
    settings = [(form, optimized) for form in ("with If", "without If") for optimized in (False, True)]
    assert [(of.form, of.optimized) for of in result.sites[:: net.layers]] == settings
    for of_site in result.sites:
        assert 0 < of_site.flagged < of_site.tokens
        assert of_site.exact
    if net.batch != 1:
        spared = [check for check in result.checks if check.name.startswith("samples without a flag")]
        assert all(int(check.detail.split()[0]) > 0 for check in spared)


@pytest.mark.parametrize("kind", ["linear", "hidden"])
@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_attention_passes(name, kind):
    result = rehearse(FORMS[name].model(), kind=kind)
    assert result.passed, result.failures
    assert result.found == 2


@pytest.mark.parametrize("seed", [0, 1, 18])
def test_what_fires_at_one_site_does_not_silence_the_next(seed):
    """Windows carry no flags, so each site needs tokens of its own; the first one's neutral tokens move the second's
    keys, and with them the scores: of seed 18 so far that none is above a threshold chosen for the base's own.
    """
    model = FORMS["windows in the batch"].model()
    sites = find_sites(model)
    assert len({site.token_axis for site in sites}) == 2
    result = rehearse(model, seed=seed, conditional=(False,), optimize=(False,))
    assert result.passed, result.failures


def test_samples_said_to_be_flagged_are_those_that_are():
    model = FORMS["windows in the batch"].model()
    rng = np.random.default_rng(3)
    sites = find_sites(model)
    runs = run_base(model, None, rng, 5, (False,), 1)
    patch, flagged = aimed(model, sites, draw_patch(model, sites, rng), runs, 1)
    found = atp.bake(model, patch)
    assert np.array_equal(Session(found, optimize=False).run(runs.inputs)["atpatch/flagged"][:, 0], flagged)
    assert 0 < flagged.sum() < len(flagged)


def test_what_is_asked_for_is_tried():
    steps = []
    result = rehearse(
        Net().model(),
        optimize=(True,),
        conditional=(False,),
        progress=lambda stage, done, total: steps.append((done, total)),
    )
    assert {(of.form, of.optimized) for of in result.sites} == {("without If", True)}
    assert steps == [(done, 5) for done in range(1, 6)]


def test_it_is_the_same_every_time_and_for_a_path(tmp_path, monkeypatch):
    model = Net().model()
    atp.save(model, tmp_path / "model.onnx")
    drawn = []

    def noted(*arguments):
        patch, flagged = aimed(*arguments)
        drawn.append(patch.id)
        return patch, flagged

    monkeypatch.setattr(rehearsal, "aimed", noted)
    assert rehearse(model) == rehearse(tmp_path / "model.onnx")
    rehearse(model, seed=1)
    assert drawn[0] == drawn[1] != drawn[2]


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
    assert result.sites[0].tokens == 5 * 7


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


def test_a_model_into_which_nothing_can_be_baked():
    model = Net().model()
    model.graph[0].name = "atpatch/mine"
    result = rehearse(model)
    assert failed(result) == {"a patch"}
    assert "no names under 'atpatch/'; found 'atpatch/mine'" in result.failures[0].detail


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
    """What stands in for keys and values is off by a little."""
    own = write.replace_tokens

    def disturbed(at, replacement, decision):
        result = own(at, replacement, decision)
        readers = [(node, index) for node, index in result.uses() if "atpatch.site" not in node.metadata_props]
        tiny = at.constant("tiny", np.full(1, 1e-6, np.float32))
        moved = at.op("Add", result, tiny, name=f"{replacement.name}/disturbed")
        for node, index in readers:
            node.replace_input_with(index, moved)
        return result

    monkeypatch.setattr(write, "replace_tokens", disturbed)
    monkeypatch.setattr("atpatch_onnx.baking.bake.require_invariants", lambda model: None)  # which would see it


def test_a_patch_that_disturbs_what_is_not_flagged(monkeypatch):
    disturb(monkeypatch)
    assert failed(rehearse(Net().model())) == {"nothing fires", "driven", "samples without a flag", "unbake"}


def test_flags_that_reach_the_other_samples(monkeypatch):
    own = write.in_order

    def for_all(at, site, found, name):
        margin = own(at, site, found, name)
        samples = [ir.AttrInt64s("axes", [0])]
        largest = at.op("ReduceMax", margin, name=f"{name}/of_all", attributes=samples)
        return at.op("Max", margin, largest, name=f"{name}/for_all")

    monkeypatch.setattr(write, "in_order", for_all)
    assert failed(rehearse(Net(opset=17).model())) == {"samples without a flag"}


def test_tokens_that_are_replaced_the_other_way_round(monkeypatch):
    own = Insertion.op

    def swapped(at, op_type, *inputs, **options):
        if op_type == "Where":
            inputs = (inputs[0], inputs[2], inputs[1])
        return own(at, op_type, *inputs, **options)

    monkeypatch.setattr(Insertion, "op", swapped)
    result = rehearse(Net().model(), conditional=(False,))
    assert failed(result) == {"nothing fires", "replaced", "samples without a flag"}
    assert not any(of_site.exact for of_site in result.sites)


def test_neutral_keys_that_nothing_reads(monkeypatch):
    def forgetful(model, patch, **options):
        patched = atp.bake(model, patch, **options)
        nodes = {node.name: node for node in patched.graph}
        nodes["node/layer0/k/split"].replace_input_with(0, nodes["node/layer0/k/sum"].outputs[0])
        return patched

    monkeypatch.setattr(rehearsal, "bake", forgetful)
    assert failed(rehearse(Net().model())) == {"driven", "unbake"}


def test_sites_at_which_nothing_fires(monkeypatch):
    monkeypatch.setattr(rehearsal, "aimed", lambda base, sites, patch, runs, threads: (patch, np.zeros(2, bool)))
    result = rehearse(Net().model())
    assert failed(result) == {"sites fire"}
    assert {check.detail for check in result.failures} == {"0 of 2 have flagged tokens"}


def test_a_patch_that_does_not_come_out(monkeypatch):
    def leaves_a_trace(model, patch, **options):
        patched = atp.bake(model, patch, **options)
        patched.graph.append(ir.Node("", "Identity", [patched.graph.inputs[0]], name="trace"))
        return patched

    monkeypatch.setattr(rehearsal, "bake", leaves_a_trace)
    assert failed(rehearse(Net().model())) == {"unbake"}


# It ends in a verdict, whatever it is given


def test_outputs_that_are_sequences_or_texts():
    model = with_odd_outputs(Planted().model())
    assert rehearse(model).passed


def test_texts_that_change_are_seen(monkeypatch):
    def negated(model, patch, **options):
        patched = atp.bake(model, patch, **options)
        node = next(node for node in patched.graph if node.name == "texts")
        other = ir.Node("", "Neg", [node.inputs[0]], name="negated")
        patched.graph.insert_before(node, other)
        node.replace_input_with(0, other.outputs[0])
        return patched

    monkeypatch.setattr(rehearsal, "bake", negated)
    result = rehearse(with_odd_outputs(Planted().model()))
    assert failed(result) == {"nothing fires", "driven", "samples without a flag", "unbake"}
    assert any(check.detail == "outputs that changed: texts/value" for check in result.failures)


@pytest.mark.parametrize("samples", [0, 1])
def test_batches_of_none_and_of_one(samples):
    result = rehearse(Net().model(), {"x": np.zeros((samples, 5, 8), np.float32)})
    assert result.runs
    assert failed(result) == (set() if samples else {"a patch"})
    assert samples or "at least one sample" in result.failures[0].detail


@pytest.mark.parametrize("where", [np.s_[0, 0], np.s_[:]], ids=["one token", "all"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_inputs_that_are_not_finite(value, where):
    x = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    x[where] = value
    result = rehearse(Net().model(), {"x": x})
    assert (result.runs, result.nonfinite) == (True, ("logits", "hidden"))


def test_inputs_that_are_no_arrays():
    result = rehearse(Net(layers=1).model(), {"x": [[[0.5] * 8] * 3] * 2})
    assert not result.runs
    assert "float64[2, 3, 8]" in result.reason


@pytest.mark.parametrize("highest", [0.0, 1.0, -2.0, 1e-30])
def test_tokens_fire_where_the_highest_scores_of_all_samples_are_alike(highest: float) -> None:
    """As where a ReLU in front of the keys leaves nothing of them."""
    scores = np.array([[highest, highest - 1, highest], [highest, highest, highest - 0.5]])
    assert (scores > threshold_of(scores)).any()
