"""Neuron edits in a graph: only the edited units change, and the base comes back bit for bit."""

import json
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import ALWAYS, FORMS, Net, draw_patch, run, same_bits, with_outputs

from atpatch_onnx import graph
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.edits import edited
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.baking.targets import TARGETS
from atpatch_onnx.baking.unbake import unbake
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.errors import PatchMismatchError, UnbakeError
from atpatch_onnx.matching import find_sites
from atpatch_onnx.matching.hidden import find_hidden_layers
from atpatch_onnx.measuring.evaluate import evaluate
from atpatch_onnx.measuring.verify import verify
from atpatch_onnx.patches.patch import LayerEdit, Patch

UNITS = 6
NET = Net(mlp=UNITS)


def edit(layer: str, *units: int, factor: float = 0.0, constant: float = 0.5) -> LayerEdit:
    count = len(units)
    arrays = (np.full(count, value, np.float32) for value in (factor, constant))
    return LayerEdit(layer, np.array(units, np.int64), *arrays)


def patch_of(net: Net, *edits: LayerEdit) -> Patch:
    return Patch(graph.fingerprint(net.model()), (), {}, edits)


def layers(net: Net) -> tuple[str, ...]:
    return tuple(layer.name for layer in find_hidden_layers(net.model()))


@given(
    factor=st.lists(st.floats(-10, 10, width=32), min_size=UNITS, max_size=UNITS),
    constant=st.lists(st.floats(-10, 10, width=32), min_size=UNITS, max_size=UNITS),
    chosen=st.sets(st.integers(0, UNITS - 1), min_size=1),
)
def test_edited_units_are_factor_times_h_plus_constant_and_the_others_keep_their_bits(factor, constant, chosen):
    units = np.array(sorted(chosen), np.int64)
    one = LayerEdit(layers(NET)[1], units, *(np.array(a, np.float32)[units] for a in (factor, constant)))
    patched, feed = bake(NET.model(), patch_of(NET, one)), NET.feed(np.random.default_rng(0))
    (layer,) = read_record(patched).layers
    found = run(with_outputs(patched, [layer.value, layer.edited_value]), feed)
    before, after = found[layer.value], found[layer.edited_value]
    others = np.setdiff1d(np.arange(UNITS), units)
    assert same_bits(before[..., others], after[..., others])
    expected = before[..., units].astype(np.float64) * one.factor + one.constant
    np.testing.assert_allclose(after[..., units], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("conditional", FORMS)
def test_a_patch_of_edits_alone_is_verified_and_unbaked(conditional):
    first, second = layers(NET)
    patch = patch_of(NET, edit(second, 0, 3), edit(first, 5))  # in whatever order
    base = NET.model()
    patched = bake(base, patch, conditional=conditional)
    record = read_record(patched)
    assert [(layer.layer, layer.edited) for layer in record.layers] == [(first, 1), (second, 2)]
    assert record.monitors == (), "nothing is detected that could be monitored"
    assert graph.to_bytes(unbake(patched)) == graph.to_bytes(base)
    result = verify(base, patched, pairs(NET))
    assert result.passed, result.failures
    assert sum(check.name.startswith("hidden layer") for check in result.checks) == 4, "layers, sides"


@pytest.mark.parametrize("conditional", FORMS)
def test_edits_and_attention_together(conditional):
    base = NET.model()
    patches = [patch_of(NET, edit(layers(NET)[0], 1, 2)), draw_patch(base, threshold=ALWAYS)]
    patched = bake(base, patches, conditional=conditional)
    result = verify(base, patched, pairs(NET))
    assert result.passed, result.failures
    assert graph.fingerprint(unbake(patched)) == graph.fingerprint(base)
    quiet = bake(base, [patches[0], draw_patch(base)], conditional=conditional)
    alone, feed = edited(base, patches[0].edits), NET.feed(np.random.default_rng(1))
    for name, array in run(alone, feed).items():
        assert same_bits(array, run(quiet, feed)[name]), "nothing is flagged: the edited model's own bits"
        assert not np.array_equal(array, run(base, feed)[name])


def pairs(net: Net, count: int = 6) -> DebugSet:
    rng = np.random.default_rng(2)
    sides = [net.feed(rng, batch=count) for _ in range(2)]
    suspects = np.zeros((count, 5), bool)
    suspects[:, 1] = True
    labels = np.arange(count) % 3
    return DebugSet.from_pairs(*sides, labels, suspects=suspects, target=0)


def test_an_evaluation_says_that_every_input_changes_and_nothing_is_detected():
    base = NET.model()
    found = evaluate(base, bake(base, patch_of(NET, edit(layers(NET)[0], 0))), pairs(NET))
    assert found.columns is None
    assert found.input_level is None
    assert found.clean_bit_identical is None
    assert found.clean_changed.value == 1
    assert found.clean_flag_rate.value == 0


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_takes_edits(target):
    base = NET.model()
    patched = bake(base, patch_of(NET, edit(layers(NET)[0], 0)), target=target)
    feed = NET.feed(np.random.default_rng(0))
    for name, array in run(edited(base, [edit(layers(NET)[0], 0)]), feed).items():
        assert same_bits(array, run(patched, feed)[name])


def test_half_precision_keeps_what_is_not_edited():
    net = replace(NET, half=True)
    base = net.model()
    patched = bake(base, patch_of(net, edit(layers(net)[1], 4)))
    result = verify(base, patched, pairs(net))
    assert result.passed, result.failures


def test_an_edit_that_changes_nothing_changes_nothing():
    """As in the probing graph, where every layer has a factor and a constant."""
    base, feed = NET.model(), NET.feed(np.random.default_rng(0))
    same = [edit(name, *range(UNITS), factor=1, constant=0) for name in layers(NET)]
    for name, array in run(edited(base, same), feed).items():
        assert same_bits(array, run(base, feed)[name])


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([edit("layer7.hidden", 0)], "expected the hidden layer 'layer7.hidden'"),
        ([edit(layers(NET)[0], 0), edit(layers(NET)[0], 1)], "expected each hidden layer once"),
        ([edit(layers(NET)[0], UNITS)], f"expected units below {UNITS}; found unit {UNITS}"),
        ([], "at least one site or neuron edit"),
    ],
    ids=["no-such-layer", "twice", "no-such-unit", "nothing"],
)
def test_edits_that_do_not_fit_are_refused(edits, message):
    with pytest.raises(PatchMismatchError, match=message):
        bake(NET.model(), patch_of(NET, *edits))


def set_weight(model: ir.Model, name: str, array: np.ndarray) -> None:
    model.graph.initializers[name].const_value = ir.tensor(array, name=name)


def test_verify_sees_what_was_changed_after_baking():
    base, layer = NET.model(), layers(NET)[0]
    patched = bake(base, patch_of(NET, edit(layer, 0)))
    more = graph.copy(patched)
    set_weight(more, f"atpatch/{layer}/units/edited", np.ones(UNITS, np.bool_))
    failed = {check.name: check.detail for check in verify(base, more).failures}
    assert "the metadata entry atpatch.layers is not what baking writes" in failed["additions"]
    odd = graph.copy(patched)
    set_weight(odd, f"atpatch/{layer}/units/factor", np.zeros((UNITS, 2), np.float32))
    assert f"edited, factor, constant for each of its {UNITS} units" in str(verify(base, odd).failures)
    hollow = graph.copy(patched)
    node = next(node for node in hollow.graph if node.name == f"atpatch/{layer}/units/shifted")
    node.replace_input_with(1, hollow.graph.initializers[f"atpatch/{layer}/units/factor"])
    names = {check.name for check in verify(base, hollow, pairs(NET)).failures}
    assert any(name.startswith(f"hidden layer {layer}") for name in names)


def test_units_that_are_not_edited_keep_their_negative_zeros():
    """GELU gives them for large negative sums, and adding 0 would make them positive."""
    proto = NET.proto()
    for node in proto.graph.node:
        if node.op_type == "Relu":
            node.op_type = "LeakyRelu"
            node.attribute.append(onnx.helper.make_attribute("alpha", 0.0))
    model = ir.from_proto(proto)
    patched = bake(model, Patch(graph.fingerprint(model), (), {}, (edit(layers(NET)[0], 0),)))
    (layer,) = read_record(patched).layers
    found = run(with_outputs(patched, [layer.value, layer.edited_value]), NET.feed(np.random.default_rng(0)))
    before = found[layer.value][..., 1:]
    assert (np.signbit(before) & (before == 0)).any()
    assert same_bits(before, found[layer.edited_value][..., 1:])
    result = verify(model, patched, pairs(NET))
    assert result.passed, result.failures


def set_metadata(model: ir.Model, change) -> None:
    entries = json.loads(model.metadata_props["atpatch.layers"])
    change(entries)
    model.metadata_props["atpatch.layers"] = json.dumps(entries)


@pytest.mark.parametrize(
    "change",
    [
        lambda entries: entries[0].update(layer=["a"]),
        lambda entries: entries[0].update(value={}),
        lambda entries: entries[0].update(edited="1"),
        lambda entries: entries.append(dict(entries[0])),
        lambda entries: entries[0].update(more=1),
        lambda entries: entries[0].pop("value"),
    ],
    ids=["layer", "value", "edited", "twice", "more", "missing"],
)
def test_tampered_entries_of_layers_are_refused_where_they_are_read(change):
    patched = bake(NET.model(), patch_of(NET, edit(layers(NET)[0], 0)))
    set_metadata(patched, change)
    with pytest.raises(UnbakeError, match="complete entries of schema"):
        read_record(patched)


@pytest.mark.parametrize(
    "change",
    [
        lambda entry: entry.update(value="logits"),
        lambda entry: entry.update(layer="other"),
        lambda entry: entry.update(edited=2),
    ],
    ids=["value", "layer", "edited"],
)
def test_entries_of_layers_that_the_base_does_not_have_fail_the_checks(change):
    base = NET.model()
    patched = bake(base, patch_of(NET, edit(layers(NET)[0], 0)))
    set_metadata(patched, lambda entries: change(entries[0]))
    for debug in (None, pairs(NET)):
        assert "additions" in {check.name for check in verify(base, patched, debug).failures}


def test_a_layer_of_a_sites_name_is_edited_beside_it():
    model = NET.model()
    (layer, *_), site = find_hidden_layers(model), find_sites(model)[0]
    for node in model.graph:
        if node.name in layer.nodes[:1]:
            node.name = "/" + "/".join([*site.name.split("."), "up"])
    named = dict(zip((one.value for one in find_hidden_layers(model)), find_hidden_layers(model), strict=True))
    assert named[layer.value].name.startswith(site.name.rpartition(".")[0])
    patches = [Patch(graph.fingerprint(model), (), {}, (edit(named[layer.value].name, 0),)), draw_patch(model)]
    assert verify(model, bake(model, patches), pairs(NET)).passed
