"""Deferred maps: which they are, that nothing but memory tells them from those asked for at once, and the way back."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import NEVER, Net, draw_patch, fire_on_some, run, same_bits, with_outputs
from onnx import TensorProto, helper
from planted import Planted, fitted

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.deferral import recalled
from atpatch_onnx.baking.emission import Emission
from atpatch_onnx.baking.expose import expose
from atpatch_onnx.baking.invariants import violations
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.baking.unbake import unbake
from atpatch_onnx.errors import UnbakeError
from atpatch_onnx.graph.names import PREFIX
from atpatch_onnx.matching import find_sites
from atpatch_onnx.measuring.inspect import site_values, value_names
from atpatch_onnx.measuring.verify import verify
from atpatch_onnx.patches.patch import Features, Patch

LANDMARKS = Features.LANDMARKS

DEFERRED = {
    "free": Net(opset=23, form="attention"),
    "free, grouped": Net(opset=23, form="attention", heads=4, kv_heads=2),
    "free, masked": Net(opset=24, form="attention", bias=True),
    "fixed": Net(opset=23, form="attention", batch=3, tokens=40),
    "fixed, masked": Net(opset=24, form="attention", bias=True, batch=3, tokens=40),
    "fixed, packed, grouped": Net(opset=23, form="packed", heads=4, kv_heads=2, batch=3, tokens=40),
    "Y is an output": Net(opset=23, form="attention", y_is_output=True),
    "Y is used inside an If": Net(opset=23, form="attention", y_in_if=True),
}

HELD_BACK = sorted(set(DEFERRED) - {"fixed, packed, grouped"})

AT_ONCE = {
    "decomposed": Net(opset=23),
    "causal by itself": Net(opset=23, form="attention", causal=True),
    "free, packed": Net(opset=23, form="packed"),
}


def branches(model: ir.Model, op_type: str) -> list[int]:
    """How many nodes of this type each branch of an `If` of ours has: where something is flagged, where not."""
    ours = [node for node in model.graph if node.op_type == "If" and (node.name or "").startswith(PREFIX)]
    graphs_ = [node.attributes[name].as_graph() for node in ours for name in ("then_branch", "else_branch")]
    return [sum(node.op_type == op_type for node in one) for one in graphs_]


def asked(model: ir.Model) -> list[ir.Node]:
    """Nodes of the base in the main graph that are asked for their map."""
    return [node for node in model.graph if "atpatch.outputs" in node.metadata_props]


def patched(net: Net, share: float = 0.01, **options: object) -> tuple[ir.Model, Patch, dict[str, np.ndarray]]:
    model = net.model()
    feed = net.feed(np.random.default_rng(0), tokens=11)
    return model, fire_on_some(model, draw_patch(model, 1, features=LANDMARKS, **options), feed, share), feed


@pytest.mark.parametrize("name", DEFERRED)
def test_the_map_is_written_out_where_something_is_flagged_only(name):
    model, patch, feed = patched(DEFERRED[name])
    conditional, branchless = (bake(model, patch, emission=emission) for emission in Emission)
    assert asked(conditional) == []
    assert branches(conditional, "Attention") == [1, 1] * len(patch.sites)
    assert branches(conditional, "Identity") == [0, 0] * len(patch.sites)
    assert branches(conditional, "BenignValues") == [1, 0] * len(patch.sites)
    assert branches(conditional, "SelectFlagged") == [name not in HELD_BACK, 0] * len(patch.sites)
    assert len(asked(branchless)) == len(patch.sites)
    for optimize in (False, True):
        found, expected = (run(one, feed, optimize=optimize) for one in (conditional, branchless))
        assert expected["atpatch/flagged"].any()
        for output, array in expected.items():
            np.testing.assert_allclose(found[output], array, atol=1e-5)


@pytest.mark.parametrize("name", DEFERRED)
@pytest.mark.parametrize("inline", [False, True], ids=["functions", "inlined"])
def test_what_is_not_flagged_keeps_its_bits(name, inline):
    model, _, feed = patched(DEFERRED[name])
    silent = bake(model, draw_patch(model, 1, features=LANDMARKS), inline=inline)
    for optimize in (False, True):
        expected, found = (run(one, feed, optimize=optimize) for one in (model, silent))
        assert all(same_bits(array, found[output]) for output, array in expected.items())


@pytest.mark.parametrize("name", DEFERRED)
@pytest.mark.parametrize("neutral", [True, False], ids=["neutral", "own"])
@pytest.mark.parametrize("emission", Emission)
def test_samples_beside_a_flagged_one_keep_their_bits(name, neutral, emission):
    """What they take through the correction is the base's own node, given their values times one."""
    model, patch, feed = patched(DEFERRED[name], 0.001, neutral=neutral)
    file = bake(model, patch, emission=emission)
    for optimize in (False, True):
        expected, found = (run(one, feed, optimize=optimize) for one in (model, file))
        quiet = ~found["atpatch/flagged"][:, 0]
        assert 0 < quiet.sum() < len(quiet)
        assert all(same_bits(array[quiet], found[output][quiet]) for output, array in expected.items())


@pytest.mark.parametrize("name", DEFERRED)
@pytest.mark.parametrize("neutral", [True, False], ids=["neutral", "own"])
@pytest.mark.parametrize("emission", Emission)
def test_samples_with_a_flag_get_what_the_oracle_says(name, neutral, emission):
    model, patch, feed = patched(DEFERRED[name], 0.001, neutral=neutral)
    file = bake(model, patch, emission=emission)
    site = read_record(file).sites[0]
    seen = run(expose(file, value_names(site)), feed)
    values = site_values(file, site, seen)
    assert values.flags.any()
    assert np.abs(values.reference() - values.Y).max() > 0.01
    np.testing.assert_allclose(values.corrected, values.reference(), atol=1e-5)


def products_with_map(file: ir.Model) -> int:
    """Of the correction, whether it is in a branch or not."""
    return sum(node.op_type == "Attend" for node in file.graph.all_nodes())


@pytest.mark.parametrize("name", HELD_BACK)
@pytest.mark.parametrize("emission", Emission)
def test_benign_values_meet_the_map_once(name, emission):
    """In the base's own node; what is left to multiply with it is one column. Values of their own need all of Y."""
    for neutral, products in ((True, 1), (False, 3)):
        model, patch, _ = patched(DEFERRED[name], neutral=neutral)
        file = bake(model, patch, emission=emission, inline=False)
        assert products_with_map(file) == products * len(patch.sites)
        assert graphs.fingerprint(unbake(file)) == graphs.fingerprint(model)


def test_a_map_that_is_read_as_a_whole_comes_before_the_flags():
    """So its node cannot wait for them, and holds nothing back."""
    model = Net(opset=23, form="attention").model()
    file = bake(model, draw_patch(model, features=Features.SUMMARY), emission=Emission.BRANCHLESS, inline=False)
    assert products_with_map(file) == 2 * 2


@pytest.mark.parametrize("name", AT_ONCE)
def test_maps_that_rows_of_q_do_not_give_are_asked_for_at_once(name):
    model, patch, _ = patched(AT_ONCE[name])
    conditional = bake(model, patch, emission=Emission.CONDITIONAL)
    assert len(asked(conditional)) == (0 if name == "decomposed" else len(patch.sites))
    assert branches(conditional, "Identity") == [0, 1] * len(patch.sites)


def test_maps_that_are_read_as_a_whole_are_asked_for_at_once():
    model = Net(opset=23, form="attention").model()
    conditional = bake(model, draw_patch(model, features=Features.SUMMARY), emission=Emission.CONDITIONAL)
    assert len(asked(conditional)) == 2
    assert branches(conditional, "Attention") == [0, 0] * 2


@pytest.mark.parametrize("name", DEFERRED)
def test_a_site_that_only_detects_is_never_asked_for_its_map(name):
    model = DEFERRED[name].model()
    patch = draw_patch(model, features=LANDMARKS, redistributes=False)
    conditional = bake(model, patch, emission=Emission.CONDITIONAL)
    assert asked(conditional) == []
    assert branches(conditional, "Attention") == []
    assert graphs.fingerprint(unbake(conditional)) == graphs.fingerprint(model)


def test_a_site_that_only_redistributes_needs_no_rows():
    model = Net(opset=23, form="attention").model()
    patch = draw_patch(model, features=LANDMARKS, detects=[True, False])
    conditional = bake(model, patch, emission=Emission.CONDITIONAL)
    assert branches(conditional, "Attention") == [1, 1, 1, 1]
    small = [node for node in conditional.graph if node.op_type == "Attention"]
    assert len(small) == 2  # the probed rows and the landmarks of the first site


@pytest.mark.parametrize("name", DEFERRED)
def test_rows_of_q_give_the_rows_of_the_map(name):
    model, patch, feed = patched(DEFERRED[name])
    conditional = recalled(bake(model, patch, emission=Emission.CONDITIONAL, inline=False))
    site = find_sites(model)[0].name
    rows, probes = f"atpatch/{site}/landmark_rows/attention/map", f"atpatch/{site}/landmarks"
    seen = run(with_outputs(conditional, [rows, f"atpatch/{site}/map"]), feed)
    P = seen[f"atpatch/{site}/map"]
    if probes in conditional.graph.initializers:
        landmarks = np.tile(conditional.graph.initializers[probes].const_value.numpy(), (len(P), 1))
    else:
        landmarks = run(with_outputs(conditional, [probes], "INT64"), feed)[probes]
    expected = np.stack([P[sample][:, landmarks[sample]] for sample in range(len(P))])
    np.testing.assert_allclose(seen[rows], expected, atol=1e-6)


@pytest.mark.parametrize("name", DEFERRED)
def test_rows_of_the_map_cost_no_product_with_the_values(name):
    """What a small Attention multiplies its map with is as narrow as the op allows, one column a head, and cut once."""
    model, patch, feed = patched(DEFERRED[name])
    conditional = bake(model, patch, emission=Emission.CONDITIONAL, inline=False)
    small = [node for node in conditional.graph if node.op_type == "Attention"]
    assert len(small) >= len(patch.sites)
    assert len({node.inputs[2] for node in small}) == 1
    queries, _, values = (value.name or "" for value in small[0].inputs[:3])
    seen = run(with_outputs(conditional, [queries, values]), feed)
    site = find_sites(model)[0]
    assert seen[values].shape[-1] == (site.kv_heads if seen[queries].ndim == 3 else 1)


@pytest.mark.parametrize("heads", [1, 2], ids=["one head for all", "its own heads"])
@pytest.mark.parametrize("batch", [1, "batch"], ids=["one for all samples", "of each sample"])
def test_masks_of_every_shape(batch, heads):
    """Keys that a mask hides are hidden from the rows as well, whatever it is broadcast over."""
    model = with_mask(Net(opset=24, form="attention", bias=True), (batch, heads, "tokens", "tokens"))
    feed = Net().feed(np.random.default_rng(0), tokens=11)
    feed["bias"] = np.zeros((3 if batch == "batch" else 1, heads, 11, 11), np.float32)
    feed["bias"][..., 8:] = np.finfo(np.float32).min
    if batch == "batch":
        feed["bias"][1, ..., 4:] = np.finfo(np.float32).min
    patch = fire_on_some(model, draw_patch(model, 1, features=LANDMARKS), feed, 0.01)
    conditional, branchless = (bake(model, patch, emission=emission) for emission in Emission)
    assert branches(conditional, "Attention") == [1, 1] * 2
    found, expected = run(conditional, feed), run(branchless, feed)
    assert 0 < expected["atpatch/flagged"].sum() < 3
    for output, array in expected.items():
        np.testing.assert_allclose(found[output], array, atol=1e-5)


def with_mask(net: Net, shape: tuple[int | str, ...]) -> ir.Model:
    proto = net.proto()
    bias = next(value for value in proto.graph.input if value.name == "bias")
    bias.CopyFrom(helper.make_tensor_value_info("bias", TensorProto.FLOAT, shape))
    onnx.checker.check_model(proto, full_check=True)
    return ir.from_proto(proto)


@pytest.mark.parametrize("rows", [1, "rows"], ids=["one for all", "unknown"])
def test_a_mask_of_other_rows_keeps_the_map_where_it_was(rows):
    model = with_mask(Net(opset=24, form="attention", bias=True), ("batch", 1, rows, "tokens"))
    conditional = bake(model, draw_patch(model, features=LANDMARKS), emission=Emission.CONDITIONAL)
    assert len(asked(conditional)) == 2


@pytest.mark.parametrize("name", DEFERRED)
@pytest.mark.parametrize("inline", [False, True], ids=["functions", "inlined"])
def test_the_base_comes_back_node_for_node(name, inline):
    model, patch, _ = patched(DEFERRED[name])
    conditional = bake(model, patch, emission=Emission.CONDITIONAL, inline=inline)
    before = graphs.to_bytes(conditional)
    woven = recalled(conditional)
    assert len(asked(woven)) == len(patch.sites)
    assert branches(woven, "Attention") == [name != "fixed, packed, grouped", 0] * len(patch.sites)
    assert branches(woven, "Identity")[1::2] == [1] * len(patch.sites)
    assert graphs.to_bytes(conditional) == before
    assert graphs.fingerprint(unbake(conditional)) == graphs.fingerprint(model)


PLANTED = Planted(form="attention", masked=True, free=True, tokens=12)


def other_scale(twin: ir.Node) -> None:
    twin.attributes["scale"] = ir.AttrFloat32("scale", 0.5)


def other_values(twin: ir.Node) -> None:
    twin.replace_input_with(2, twin.inputs[1])


def without_mask(twin: ir.Node) -> None:
    twin.replace_input_with(3, None)


@pytest.mark.parametrize("tamper", [other_scale, other_values, without_mask])
def test_a_twin_that_is_none_is_named(tamper):
    """Where nothing is flagged the model would no longer be the base's."""
    model = PLANTED.model()
    file = bake(model, fitted(PLANTED))
    conditional = next(node for node in file.graph if node.op_type == "If" and "Attention" in else_types(node))
    assert violations(file) == ()
    tamper(next(iter(conditional.attributes["else_branch"].as_graph())))
    assert any("more than pass its values on" in found for found in violations(file))
    failed = {check.name for check in verify(model, file, PLANTED.debug(24)).failures}
    assert {"invariants", "unbake"} <= failed


@pytest.mark.parametrize(
    ("key", "text"), [("atpatch.mode", "many"), ("atpatch.outputs", "many"), ("atpatch.outputs", "0")]
)
def test_a_moved_node_whose_metadata_was_edited_is_refused(key, text):
    model = PLANTED.model()
    file = bake(model, fitted(PLANTED))
    moved = next(node for node in file.graph.all_nodes() if "atpatch.outputs" in node.metadata_props)
    assert moved.graph is not file.graph
    moved.metadata_props[key] = text
    with pytest.raises(UnbakeError):
        unbake(file)
    assert "unbake" in {check.name for check in verify(model, file, PLANTED.debug(8)).failures}


def else_types(node: ir.Node) -> list[str]:
    return [inner.op_type for inner in node.attributes["else_branch"].as_graph()]


def test_verification_looks_behind_deferred_maps():
    model, patch = PLANTED.model(), fitted(PLANTED)
    file = bake(model, patch)
    assert branches(file, "Attention").count(1) > 0
    result = verify(model, file, PLANTED.debug(24, seed=5))
    assert result.passed, result.failures
    assert any(check.name.startswith("site ") for check in result.checks)


def test_a_detector_that_never_fires_needs_no_map_at_any_length():
    """So what clean inputs take does not grow with the square of the length."""
    model = Net(opset=23, form="attention").model()
    file = bake(model, draw_patch(model, features=LANDMARKS, threshold=NEVER))
    main = [value.name or "" for node in file.graph for value in node.outputs]
    assert not [name for name in main if name.endswith("/map") and "attention" not in name]
