"""Verification: passes what was baked, and names everything that was changed since."""

import json
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from models import FORMS, Net, draw_patch, fire_on_some
from planted import Planted, fitted
from tampering import CARRY, TAMPERINGS, WEIGHTS, set_weight, sign, weight

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.quantize import quantize, rebind
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.errors import DebugSetError, ModelFileError, UnbakeError, VerificationError
from atpatch_onnx.measuring.verify import Verification, verify
from atpatch_onnx.patches.patch import Patch

PAIRS = 24

STRUCTURE = ["base", "unbake", "additions", "parameters"]
LEVELS = ("no optimization", "default optimization")
SIDES = [f"{side} inputs, {level}" for level in LEVELS for side in ("clean", "counterfactual")]

CASES = {
    "one-site": Planted(),
    "carry": CARRY,
    "packed-masked": Planted(form="packed", masked=True, tokens=12),
    "fused-masked-free": Planted(form="attention", masked=True, free=True, tokens=12),
    "attribute": Planted(kind="attribute", harm=1.0),
}


def patch_of(planted: Planted, fitted_on: Planted | None = None) -> tuple[ir.Model, Patch]:
    """A planted model, and what was fitted on it, or on another that computes the same."""
    model = planted.model()
    return model, replace(fitted(fitted_on or planted), base=graphs.fingerprint(model))


@pytest.mark.parametrize("conditional", FORMS)
@pytest.mark.parametrize("name", CASES)
def test_a_baked_patch_passes_every_check(name: str, conditional: bool) -> None:
    planted = CASES[name]
    model, patch = patch_of(planted)
    result = verify(model, bake(model, patch, conditional=conditional), planted.debug(PAIRS, seed=5), batch_size=10)
    assert result.passed, result.failures
    assert result.failures == ()
    result.raise_if_failed()
    within = SIDES[:2]  # what stands within is read without optimization
    wanted = [f"{what}{side}" for side in SIDES for what in ("unflagged ", "monitoring, ")]
    wanted += [f"carried, {side}" for side in within]
    wanted += [f"scores at {site.site}, {side}" for side in within for site in patch.sites if site.detector]
    wanted += [f"site {site.site}, {side}" for side in within for site in patch.sites if site.neutral]
    flagged = [side for side in within if "counterfactual" in side or planted.kind == "attribute"]
    wanted += [f"driven, {side}" for side in flagged]
    assert [check.name for check in result.checks][:4] == STRUCTURE
    assert {check.name for check in result.checks} == {*STRUCTURE, *wanted}
    assert len({*STRUCTURE, *wanted}) == len(result.checks)


@pytest.mark.parametrize("conditional", FORMS)
@pytest.mark.parametrize("kind", ["linear", "hidden"])
@pytest.mark.parametrize(
    "net",
    [
        Net(half=True),
        Net(form="packed", opset=23, heads=4, kv_heads=2),
        Net(form="attention", opset=23, past=3, layers=3),
        Net(batch=4, tokens=6, y_is_output=True),
    ],
    ids=["half", "packed-grouped", "cached", "fixed"],
)
def test_drawn_patches_pass(net: Net, kind: str, conditional: bool) -> None:
    """Every site detects and redistributes, and some tokens are flagged on both sides."""
    model, rng = net.model(), np.random.default_rng(0)
    clean, counterfactual = net.feed(rng, batch=9), net.feed(rng, batch=9)
    patch = fire_on_some(model, draw_patch(model, 1, kind=kind), clean, share=0.1)
    debug = DebugSet.from_pairs(clean, {**clean, "x": counterfactual["x"]})
    result = verify(model, bake(model, patch, conditional=conditional), debug, batch_size=4)
    assert result.passed, result.failures
    driven = {f"driven, {side} inputs, no optimization" for side in ("clean", "counterfactual")}
    assert {check.name for check in result.checks} & driven == (set() if net.half else driven)


@pytest.mark.parametrize("kind", ["linear", "hidden"])
@pytest.mark.parametrize("form", ["packed", "attention"])
def test_half_precision_in_one_operator_gives_no_alarm(form: str, kind: str) -> None:
    """As `bake` writes it by itself: without an If."""
    net = Net(half=True, form=form, opset=23)
    model, rng = net.model(), np.random.default_rng(0)
    clean, counterfactual = net.feed(rng, batch=9), net.feed(rng, batch=9)
    patch = fire_on_some(model, draw_patch(model, 1, kind=kind), clean, share=0.1)
    result = verify(model, bake(model, patch), DebugSet.from_pairs(clean, counterfactual), batch_size=4)
    assert result.passed, result.failures


def test_without_a_debug_set_the_structure_is_checked() -> None:
    model, patch = patch_of(Planted())
    result = verify(model, bake(model, patch))
    assert result.passed
    assert [check.name for check in result.checks] == STRUCTURE


def test_it_reads_both_models_from_their_paths(tmp_path) -> None:
    model, patch = patch_of(Planted())
    graphs.save(model, tmp_path / "base.onnx")
    graphs.save(bake(model, patch), tmp_path / "patched.onnx")
    assert verify(tmp_path / "base.onnx", str(tmp_path / "patched.onnx"), Planted().debug(PAIRS)).passed


@pytest.mark.parametrize("batch", [1, 4])
def test_models_of_a_fixed_batch(batch: int) -> None:
    """The last batch of 10 is filled up to 4, and only two of its samples count."""
    planted = Planted(batch=batch)
    model, patch = patch_of(planted, Planted())
    result = verify(model, bake(model, patch), planted.debug(10))
    assert result.passed, result.failures
    [seen] = [c.detail for c in result.checks if c.name == "unflagged clean inputs, no optimization"]
    assert seen == "10 of 10 bit-identical to the base"


def test_outputs_without_a_sample_axis() -> None:
    planted = Planted(scalar_output=True)
    model, patch = patch_of(planted, Planted())
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


@pytest.mark.parametrize("batch", ["batch", 4], ids=["free", "fixed"])
def test_outputs_that_are_sequences_or_texts(batch: int | str) -> None:
    planted = Planted(batch=batch)
    model = with_odd_outputs(planted.model())
    patch = replace(fitted(Planted()), base=graphs.fingerprint(model))
    debug, patched = planted.debug(PAIRS), bake(model, patch)
    result = verify(model, patched, debug, batch_size=10)
    assert result.passed, result.failures
    for name in ("sequence", "texts"):
        changed = graphs.copy(patched)
        node = next(node for node in changed.graph if node.name == name)
        negated = ir.Node("", "Neg", [node.inputs[0]], name="negated")
        changed.graph.insert_before(node, negated)
        node.replace_input_with(0, negated.outputs[0])
        wanted = {"unbake", "additions", "parameters", "unflagged clean", "driven, counterfactual"}
        assert failed(verify(model, changed, debug, batch_size=10)) == wanted, name


def quantized(precision: str) -> tuple[ir.Model, ir.Model, DebugSet]:
    """A quantized base, patched, and pairs of which every third counterfactual is clean: batches have both."""
    model, patch = patch_of(Planted())
    base = quantize(model, precision)
    debug = Planted().debug(PAIRS)
    calm = np.arange(PAIRS) % 3 == 0
    x = np.where(calm[:, None, None], debug.clean["x"], debug.counterfactual["x"])
    return base, bake(base, rebind(patch, model, base)), DebugSet.from_pairs(debug.clean, {"x": x}, debug.labels)


@pytest.mark.filterwarnings("ignore::UserWarning")  # the float16 tool tells of what it rounds to zero
@pytest.mark.parametrize("precision", ["int8", "fp16"])
def test_quantized_bases(precision: str) -> None:
    """Dynamic quantization takes its scale from the batch: a flagged sample moves the others, in the base as well."""
    base, patched, debug = quantized(precision)
    result = verify(base, patched, debug, batch_size=8)
    assert result.passed, result.failures
    details = {check.name: check.detail for check in result.checks}
    assert details["unflagged counterfactual inputs, no optimization"] == "8 of 8 bit-identical to the base"


def test_a_base_that_mixes_samples_excuses_no_other_difference() -> None:
    base, patched, debug = quantized("int8")
    node = next(node for node in patched.graph if node.outputs[0].name == "logits")
    doubled = ir.Node("", "Add", [node.inputs[0], node.inputs[0]], name="doubled")
    patched.graph.insert_before(node, doubled)
    node.replace_input_with(0, doubled.outputs[0])
    assert {"unflagged clean", "unflagged counterfactual"} <= failed(verify(base, patched, debug, batch_size=8))


@pytest.mark.parametrize("conditional", FORMS)
@pytest.mark.parametrize("half", [False, True])
def test_a_neutral_of_minus_zero(half: bool, conditional: bool) -> None:
    """onnxruntime's Where hands over 0 for it; in half precision, small negative means are rounded to it."""
    net = Net(half=half, tokens=6)
    model, feed = net.model(), net.feed(np.random.default_rng(0))
    patch = fire_on_some(model, draw_patch(model, 1), feed)
    tiny = np.float32(-1e-12) if half else np.float32(-0.0)
    neutrals = (replace(site.neutral, key=np.full_like(site.neutral.key, tiny)) for site in patch.sites if site.neutral)
    sites = tuple(replace(site, neutral=neutral) for site, neutral in zip(patch.sites, neutrals, strict=True))
    patched = bake(model, replace(patch, sites=sites), conditional=conditional)
    result = verify(model, patched, DebugSet.from_pairs(feed, {"x": feed["x"] + feed["x"].dtype.type(0.5)}))
    assert result.passed, result.failures


def test_a_patch_without_monitors_has_nothing_to_lie() -> None:
    model, patch = patch_of(Planted())
    result = verify(model, bake(model, patch, monitor=False), Planted().debug(PAIRS))
    assert result.passed, result.failures
    assert not any(check.name.startswith("monitoring") for check in result.checks)


# What was changed since


def failed(result: Verification) -> set[str]:
    """What failed, at whatever level of optimization."""
    names = (check.name.replace(" inputs", "") for check in result.failures)
    return {name.removesuffix(f", {level}") for name in names for level in LEVELS if name.endswith(level)} | {
        check.name for check in result.failures if check.name in STRUCTURE
    }


def planted_and_patched(planted: Planted = CARRY, *, conditional: bool = True) -> tuple[ir.Model, ir.Model]:
    model, patch = patch_of(planted)
    return model, bake(model, patch, conditional=conditional)


@pytest.mark.parametrize("name", TAMPERINGS)
def test_every_change_is_named(name: str) -> None:
    tampering = TAMPERINGS[name]
    model, patched = planted_and_patched(conditional=tampering.conditional)
    tampering.change(patched)
    result = verify(model, patched, CARRY.debug(PAIRS))
    assert failed(result) == tampering.fails
    with pytest.raises(VerificationError) as raised:
        result.raise_if_failed()
    assert all(check.name in raised.value.found and check.detail in raised.value.found for check in result.failures)
    assert f"all {len(result.checks)} checks to pass" in str(raised.value)


def test_every_check_is_failed_by_some_change() -> None:
    """Those of hidden layers are in test_edits.py."""
    result = verify(*planted_and_patched(), CARRY.debug(PAIRS))
    kinds = {check.name.split(" inputs")[0].split(", ")[0].split(" layer")[0] for check in result.checks}
    broken = {name.split(", ")[0].split(" layer")[0] for one in TAMPERINGS.values() for name in one.fails}
    assert kinds | {"loads"} == broken


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_of_the_patch_that_was_changed(name: str) -> None:
    """The digest tells them all; with one made anew, most are known, and all beside the patch."""
    change = WEIGHTS[name]
    model, patch = patch_of(Planted())
    patched = bake(model, patch)
    set_weight(patched, change.weight, change.change)
    assert failed(verify(model, patched)) & {"additions", "parameters"}
    sign(patched)
    result = verify(model, patched)
    assert bool(failed(result)) is bool(change.said)
    assert not change.said or change.said in result.failures[-1].detail
    assert "parameters" in failed(verify(model, patched, patch=patch))


@pytest.mark.parametrize("name", ["threshold", "level", "detector", "neutral_value"])
def test_a_weight_of_the_patch_that_is_gone(name: str) -> None:
    model, patched = planted_and_patched(Planted())
    value = weight(patched, name)
    other = ir.Value(name="moved", shape=value.shape, type=value.type, const_value=value.const_value)
    patched.graph.register_initializer(other)
    ir.convenience.replace_all_uses_with(value, other)
    patched.graph.initializers.pop(value.name)
    result = verify(model, patched, Planted().debug(PAIRS))
    assert {"additions", "parameters", "unbake"} <= failed(result)


def test_a_detector_of_nan_is_a_difference_in_the_numbers_too() -> None:
    """It must not slip through a comparison that is neither larger nor smaller."""
    model, patched = planted_and_patched(Planted())
    set_weight(patched, "detector", lambda array: array * np.nan)
    assert failed(verify(model, patched, Planted().debug(PAIRS))) >= {
        "scores at layer1.attention, clean",
        "scores at layer1.attention, counterfactual",
    }


def test_another_base() -> None:
    model, patched = planted_and_patched(Planted())
    other = Planted(seed=1).model()
    result = verify(other, patched, Planted().debug(PAIRS))
    assert {"base", "unbake"} <= failed(result)
    assert "unflagged clean" in failed(result)
    assert graphs.fingerprint(other) in next(c.detail for c in result.checks if c.name == "base")
    assert verify(model, patched).passed


def test_a_model_that_is_not_patched() -> None:
    model = Planted().model()
    with pytest.raises(UnbakeError, match="expected a patched model"):
        verify(model, model)


def test_a_debug_set_for_another_model() -> None:
    model, patched = planted_and_patched(Planted())
    with pytest.raises(DebugSetError):
        verify(model, patched, Planted(tokens=9).debug(PAIRS))


def test_a_missing_file(tmp_path) -> None:
    with pytest.raises(ModelFileError):
        verify(tmp_path / "no.onnx", tmp_path / "neither.onnx")


def test_the_result_is_plain_json() -> None:
    result = verify(*planted_and_patched(Planted()))
    shown = json.loads(json.dumps(result.to_json()))
    assert shown["passed"] is True
    assert shown["checks"][2] == {
        "name": "additions",
        "passed": True,
        "detail": "what is added is what baking writes, and nothing else",
    }


def test_progress_is_told() -> None:
    stages = set()
    verify(
        *planted_and_patched(Planted()), Planted().debug(PAIRS), progress=lambda stage, done, total: stages.add(stage)
    )
    assert stages == {
        f"verifying {side} inputs, {level} optimization"
        for side in ("clean", "counterfactual")
        for level in ("no", "default")
    }
