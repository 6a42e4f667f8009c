"""Verification: passes what was baked, and names everything that was changed since."""

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from models import VARIANTS, Net, draw_patch, fire_on_some
from planted import Planted, fitted

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.emission import Emission
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.errors import DebugSetError, ModelFileError, UnbakeError, VerificationError
from atpatch_onnx.measuring.verify import Verification, verify
from atpatch_onnx.patches.patch import Joint, Patch

PAIRS = 24

CASES = {
    "one-site": Planted(),
    "carry": Planted(drawn=(0,), harmful=(1, 2)),
    "packed-masked": Planted(form="packed", masked=True, tokens=12),
    "fused-masked-free": Planted(form="attention", masked=True, free=True, tokens=12),
    "attribute": Planted(kind="attribute", harm=1.0),
}


@pytest.mark.parametrize(
    ("name", "emission", "inline"),
    [(name, *variant) for name in CASES for variant in (VARIANTS if name == "one-site" else VARIANTS[::3])],
)
def test_a_baked_patch_passes_every_check(name, emission, inline):
    planted = CASES[name]
    model, debug = planted.model(), planted.debug(PAIRS, seed=5)
    patched = bake(model, fitted(planted), emission=emission, inline=inline)
    result = verify(model, patched, debug, batch_size=10)
    assert result.passed, result.failures
    assert result.failures == ()
    result.raise_if_failed()
    levels = ("no optimization", "default optimization")
    sides = [f"{side} inputs, {level}" for level in levels for side in ("clean", "counterfactual")]
    names = [check.name for check in result.checks]
    assert names[:5] == ["invariants", "base", "unbake", "outputs", "weights"]
    assert {f"unflagged {side}" for side in sides} | {f"monitoring, {side}" for side in sides} < set(names)
    redistributing = [site.site for site in fitted(planted).sites if site.redistribution]
    for site in redistributing:
        assert {f"site {site}, counterfactual inputs, {level}" for level in levels} < set(names)


def test_without_a_debug_set_the_structure_is_checked():
    model = Planted().model()
    result = verify(model, bake(model, fitted(Planted())))
    assert result.passed
    assert [check.name for check in result.checks] == ["invariants", "base", "unbake", "outputs", "weights"]


def test_it_reads_both_models_from_their_paths(tmp_path):
    model = Planted().model()
    graphs.save(model, tmp_path / "base.onnx")
    graphs.save(bake(model, fitted(Planted())), tmp_path / "patched.onnx")
    assert verify(tmp_path / "base.onnx", str(tmp_path / "patched.onnx"), Planted().debug(PAIRS)).passed


@pytest.mark.parametrize("batch", [1, 4])
def test_models_of_a_fixed_batch(batch):
    planted = Planted(batch=batch)
    model = planted.model()
    patch = replace(fitted(Planted()), base=graphs.fingerprint(model))
    result = verify(model, bake(model, patch), planted.debug(10))
    assert result.passed, result.failures


def test_outputs_without_a_sample_axis():
    planted = Planted(scalar_output=True)
    model = planted.model()
    patch = replace(fitted(Planted()), base=graphs.fingerprint(model))
    result = verify(model, bake(model, patch), planted.debug(PAIRS), batch_size=10)
    assert result.passed, result.failures


def with_odd_outputs(model: ir.Model) -> ir.Model:
    """Outputs besides: the logits as a sequence, and the predicted class as a text, which numpy holds by reference."""
    [logits] = model.graph.outputs
    sequence = ir.Node("", "SequenceConstruct", [logits], name="sequence")
    best = ir.Node("", "ArgMax", [logits], [ir.AttrInt64("axis", 1), ir.AttrInt64("keepdims", 0)], name="best")
    texts = ir.Node("", "Cast", [best.outputs[0]], [ir.AttrInt64("to", ir.DataType.STRING)], name="texts")
    model.graph.extend([sequence, best, texts])
    types = (ir.SequenceType(ir.TensorType(ir.DataType.FLOAT)), ir.TensorType(ir.DataType.STRING))
    for node, type_ in zip((sequence, texts), types, strict=True):
        node.outputs[0].name, node.outputs[0].type = f"{node.name}/value", type_
        model.graph.outputs.append(node.outputs[0])
    texts.outputs[0].shape = ir.Shape([logits.shape[0]])
    return model


@pytest.mark.parametrize("joint", [False, True], ids=["alone", "joint"])
@pytest.mark.parametrize("batch", ["batch", 4], ids=["free", "fixed"])
def test_outputs_that_are_sequences_or_texts(batch, joint):
    planted = Planted(batch=batch)
    model = with_odd_outputs(planted.model())
    patch = replace(fitted(Planted()), base=graphs.fingerprint(model))
    if joint:
        patch = replace(patch, joint=Joint(np.ones(1, np.float32), patch.sites[0].detector.threshold))
    debug, patched = planted.debug(PAIRS), bake(model, patch)
    result = verify(model, patched, debug, batch_size=10)
    assert result.passed, result.failures
    for name in ("sequence", "texts"):
        changed = graphs.copy(patched)
        node = next(node for node in changed.graph if node.name == name)
        negated = ir.Node("", "Neg", [node.inputs[0]], name="negated")
        changed.graph.insert_before(node, negated)
        node.replace_input_with(0, negated.outputs[0])
        names = failed(verify(model, changed, debug, batch_size=10))
        assert {f"unflagged clean inputs, {level} optimization" for level in ("no", "default")} <= names, name


def test_half_precision_has_its_own_tolerance():
    net = Net(half=True, opset=18, tokens=6, batch=4)
    model = net.model()
    feed = net.feed(np.random.default_rng(0))
    patch = fire_on_some(model, draw_patch(model, 1), feed)
    debug = DebugSet.from_pairs(feed, {"x": feed["x"] + np.float16(0.5)})
    result = verify(model, bake(model, patch), debug)
    assert result.passed, result.failures
    assert any("site" in check.name for check in result.checks)


def test_a_patch_without_monitors_has_nothing_to_lie():
    model = Planted().model()
    result = verify(model, bake(model, fitted(Planted()), monitor=False), Planted().debug(PAIRS))
    assert result.passed, result.failures


# What was changed since


def weight(model: ir.Model, name: str) -> ir.Value:
    return model.graph.initializers[f"atpatch/layer1.attention/{name}"]


def set_weight(model: ir.Model, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    value = weight(model, name)
    old = value.const_value.numpy()
    value.const_value = ir.tensor(change(old.copy()).astype(old.dtype), name=value.name)


def change_base_weight(model: ir.Model) -> None:
    value = model.graph.initializers["readout"]
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.5), name="readout")


def change_metadata_base(model: ir.Model) -> None:
    model.metadata_props["atpatch.base"] = "sha256:0"


def bypass_correction(model: ir.Model) -> None:
    """The model reads the site's own output again; the correction is still computed, for nobody."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    own, corrected = values["atpatch/layer1.attention/base"], values["layer1.attention/Y"]
    for node, index in list(corrected.uses()):
        node.replace_input_with(index, own)


def hollow_correction(model: ir.Model) -> None:
    """The correction is ours by name and passes the site's own output on."""
    node = next(node for node in model.graph if node.outputs[0].name == "layer1.attention/Y")
    values = {value.name: value for n in model.graph for value in n.outputs}
    own = values["atpatch/layer1.attention/base"]
    added = ir.Node("", "Identity", [own], name=node.name, metadata_props=dict(node.metadata_props))
    added.outputs[0].type, added.outputs[0].shape = own.type, own.shape
    model.graph.insert_before(node, added)
    old = node.outputs[0]
    ir.convenience.replace_all_uses_with(old, added.outputs[0], replace_graph_outputs=True)
    old.name = "unused"
    model.graph.remove(node, safe=True)
    added.outputs[0].name = "layer1.attention/Y"


def lie_about_flags(model: ir.Model) -> None:
    """`atpatch/flagged` says no, whatever is flagged."""
    output = next(output for output in model.graph.outputs if output.name == "atpatch/flagged")
    node = output.producer()
    never = ir.Node("", "And", [node.inputs[0], negated(model, node)], name="atpatch/monitor/never")
    never.metadata_props.update(node.metadata_props)
    model.graph.insert_before(node, never)
    node.replace_input_with(0, never.outputs[0])
    never.outputs[0].name = "atpatch/monitor/never"


def negated(model: ir.Model, node: ir.Node) -> ir.Value:
    no = ir.Node("", "Not", [node.inputs[0]], name="atpatch/monitor/not")
    no.metadata_props.update(node.metadata_props)
    no.outputs[0].name = "atpatch/monitor/not"
    model.graph.insert_before(node, no)
    return no.outputs[0]


def lie_about_score(model: ir.Model) -> None:
    output = next(output for output in model.graph.outputs if output.name == "atpatch/score")
    node = output.producer()
    node.replace_input_with(0, one(model, node))


def one(model: ir.Model, node: ir.Node) -> ir.Value:
    absolute = ir.Node("", "Abs", [node.inputs[0]], name="atpatch/monitor/abs")
    absolute.metadata_props.update(node.metadata_props)
    absolute.outputs[0].name = "atpatch/monitor/abs"
    model.graph.insert_before(node, absolute)
    return absolute.outputs[0]


def rename_output(model: ir.Model) -> None:
    model.graph.outputs[0].name = "scores"


def drop_output(model: ir.Model) -> None:
    model.graph.outputs.pop(0)


def busy_else_branch(model: ir.Model) -> None:
    """The unflagged path does something after all: the signature of a hidden conditional."""
    node = next(node for node in model.graph if node.op_type == "If")
    branch = node.attributes["else_branch"].as_graph()
    last = branch.outputs[0]
    added = ir.Node("", "Neg", [last], name="atpatch/layer1.attention/neg")
    added.metadata_props.update(node.metadata_props)
    added.outputs[0].name = "atpatch/layer1.attention/neg"
    branch.append(added)
    branch.outputs[0] = added.outputs[0]


def forget_the_sites(model: ir.Model) -> None:
    model.metadata_props["atpatch.sites"] = "[]"


def name_another_site(model: ir.Model) -> None:
    sites = json.loads(model.metadata_props["atpatch.sites"])
    sites[0]["flags"] = "nowhere"
    model.metadata_props["atpatch.sites"] = json.dumps(sites)


def name_another_output(model: ir.Model) -> None:
    """A value that is there, of another rank than what a site hands on."""
    sites = json.loads(model.metadata_props["atpatch.sites"])
    sites[0]["output"] = sites[0]["margin"]
    model.metadata_props["atpatch.sites"] = json.dumps(sites)


TAMPERINGS: dict[Callable[[ir.Model], None] | str, set[str]] = {
    "change_base_weight": {"unbake", "unflagged clean"},
    "change_metadata_base": {"base", "unbake"},
    "bypass_correction": {"invariants"},
    "hollow_correction": {"site layer1.attention, counterfactual"},
    "lie_about_flags": {"monitoring, counterfactual"},
    "lie_about_score": {"monitoring, clean"},
    "rename_output": {"unbake", "outputs", "unflagged clean"},
    "drop_output": {"unbake", "outputs", "unflagged clean"},
    "busy_else_branch": {"invariants", "unflagged clean"},
    "forget_the_sites": {"loads"},
    "name_another_site": {"loads"},
    "name_another_output": {"unbake", "site layer1.attention, counterfactual"},
}

WEIGHTS = {
    "a threshold edited": ("threshold", lambda a: a + 0.01),
    "a threshold that nothing exceeds": ("threshold", lambda a: a * 0 + np.inf),
    "beta above 1": ("beta", lambda a: a * 0 + 2),
    "beta below 0": ("beta", lambda a: a * 0 - 1),
    "beta is NaN": ("beta", lambda a: a * np.nan),
    "a neutral value of NaN": ("neutral", lambda a: a * np.nan),
    "a switch that is off": ("switch", lambda a: ~a),
    "a detector of NaN": ("weight_1", lambda a: a * np.nan),
}


def planted_and_patched() -> tuple[ir.Model, ir.Model]:
    model = Planted().model()
    return model, bake(model, fitted(Planted()), emission=Emission.CONDITIONAL)


def failed(result: Verification) -> set[str]:
    return {check.name for check in result.failures}


@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_every_change_is_named(tampering):
    model, patched = planted_and_patched()
    globals()[tampering](patched)
    result = verify(model, patched, Planted().debug(PAIRS))
    assert not result.passed
    names = failed(result)
    for wanted in TAMPERINGS[tampering]:
        assert any(name.startswith(wanted) for name in names), (wanted, names)
    with pytest.raises(VerificationError) as raised:
        result.raise_if_failed()
    assert all(check.name in raised.value.found and check.detail in raised.value.found for check in result.failures)
    assert f"all {len(result.checks)} checks to pass" in str(raised.value)


@pytest.mark.parametrize("change", WEIGHTS)
def test_weights_of_the_patch_that_no_bake_writes(change):
    model, patched = planted_and_patched()
    set_weight(patched, *WEIGHTS[change])
    result = verify(model, patched)
    assert "weights" in failed(result)
    detail = next(check.detail for check in result.failures if check.name == "weights")
    assert f"layer1.attention/{WEIGHTS[change][0]}" in detail


def with_reach(patch: Patch, reach: float) -> Patch:
    sites = (
        site if site.detector is None else replace(site, detector=replace(site.detector, reach=reach))
        for site in patch.sites
    )
    return replace(patch, sites=tuple(sites))


@pytest.mark.parametrize(("emission", "inline"), VARIANTS)
def test_a_lower_threshold_for_flagged_inputs_passes_and_is_guarded(emission, inline):
    planted = CASES["one-site"]
    model, debug = planted.model(), planted.debug(PAIRS, seed=5)
    patched = bake(model, with_reach(fitted(planted), 1.5), emission=emission, inline=inline)
    result = verify(model, patched, debug, batch_size=10)
    assert result.passed, result.failures
    set_weight(patched, "reach", lambda array: array + 0.5)
    assert "weights" in failed(verify(model, patched, debug))


@pytest.mark.parametrize("name", ["threshold", "beta", "neutral"])
def test_a_weight_of_the_patch_that_is_gone(name):
    model, patched = planted_and_patched()
    value = weight(patched, name)
    other = ir.Value(name="moved", shape=value.shape, type=value.type, const_value=value.const_value)
    patched.graph.register_initializer(other)
    ir.convenience.replace_all_uses_with(value, other)
    patched.graph.initializers.pop(value.name)
    result = verify(model, patched, Planted().debug(PAIRS))
    assert {"weights", "unbake"} <= failed(result)


@pytest.mark.parametrize(("name", "change"), [("beta", lambda a: a * 0.5), ("neutral", lambda a: a + 1)])
def test_sound_but_other_weights_than_were_baked(name, change):
    """The numbers are held against what the file's own weights say; only their digest tells these apart."""
    model, patched = planted_and_patched()
    set_weight(patched, name, change)
    assert failed(verify(model, patched, Planted().debug(PAIRS))) == {"weights"}


def test_nan_is_a_difference_in_the_numbers_too():
    """A correction of NaN must not slip through a comparison that is neither larger nor smaller."""
    model, patched = planted_and_patched()
    set_weight(patched, "neutral", lambda a: a * np.nan)
    names = failed(verify(model, patched, Planted().debug(PAIRS)))
    assert {
        f"site layer1.attention, counterfactual inputs, {level} optimization" for level in ("no", "default")
    } <= names


def test_another_base():
    model, patched = planted_and_patched()
    other = Planted(seed=1).model()
    result = verify(other, patched, Planted().debug(PAIRS))
    assert {"base", "unbake"} <= failed(result)
    assert any(name.startswith("unflagged clean") for name in failed(result))
    assert "invariants" not in failed(result)
    assert graphs.fingerprint(other) in next(c.detail for c in result.checks if c.name == "base")
    assert verify(model, patched).passed


def test_a_model_that_is_not_patched():
    model = Planted().model()
    with pytest.raises(UnbakeError, match="expected a patched model"):
        verify(model, model)


def test_a_debug_set_for_another_model():
    model, patched = planted_and_patched()
    with pytest.raises(DebugSetError):
        verify(model, patched, Planted(tokens=9).debug(PAIRS))


def test_a_missing_file(tmp_path):
    with pytest.raises(ModelFileError):
        verify(tmp_path / "no.onnx", tmp_path / "neither.onnx")


def test_the_result_is_plain_json():
    result = verify(*planted_and_patched())
    shown = json.loads(json.dumps(result.to_json()))
    assert shown["passed"] is True
    assert shown["checks"][0] == {"name": "invariants", "passed": True, "detail": "every rule of a patched graph holds"}


def test_progress_is_told():
    stages = set()
    verify(*planted_and_patched(), Planted().debug(PAIRS), progress=lambda stage, done, total: stages.add(stage))
    assert stages == {
        f"verifying {side} inputs, {level} optimization"
        for side in ("clean", "counterfactual")
        for level in ("no", "default")
    }
