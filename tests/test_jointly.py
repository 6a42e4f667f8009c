"""A joint decision in the graph: it decides as its scores say, repeats the base, and leaves nothing behind."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import VARIANTS, draw_joint_patch, run, same_bits, with_outputs
from onnx import TensorProto, helper
from planted import Planted

from atpatch_onnx import graph as graphs
from atpatch_onnx.bake import bake
from atpatch_onnx.edits import edited
from atpatch_onnx.emission import Emission
from atpatch_onnx.errors import PatchMismatchError
from atpatch_onnx.hidden import find_hidden_layers
from atpatch_onnx.inspection import expose
from atpatch_onnx.matching import find_sites
from atpatch_onnx.metadata import read_record
from atpatch_onnx.patch import LayerEdit, Patch
from atpatch_onnx.runtime import Session
from atpatch_onnx.second_pass import repeat, unfold
from atpatch_onnx.strip import strip
from atpatch_onnx.trial import JointSetting, Setting, Trial
from atpatch_onnx.verify import verify

CASES = {
    "decomposed": Planted(),
    "fused": Planted(form="attention"),
    "fused-masked-free": Planted(form="attention", masked=True, free=True, tokens=12),
    "packed-masked": Planted(form="packed", masked=True, tokens=12),
    "scalar-output": Planted(scalar_output=True),
    "fixed-batch": Planted(batch=4),
    "with-mlp": Planted(mlp=8),
}


def drawn(planted: Planted, **options) -> tuple[ir.Model, Patch, dict[str, np.ndarray]]:
    model = planted.model()
    count = planted.batch if isinstance(planted.batch, int) else 40
    feed = planted.inputs(count)[0]
    return model, draw_joint_patch(model, feed, **options), feed


@pytest.mark.parametrize(("emission", "inline"), VARIANTS)
@pytest.mark.parametrize("name", CASES)
def test_a_joint_patch_passes_every_check(name, emission, inline):
    model, patch, _ = drawn(CASES[name])
    debug = CASES[name].debug(20, seed=5)
    patched = bake(model, patch, emission=emission, inline=inline)
    result = verify(model, patched, debug, batch_size=10)
    assert result.passed, result.failures
    assert any(check.name.startswith("second pass") for check in result.checks)
    assert graphs.fingerprint(strip(patched)) == graphs.fingerprint(model)


@pytest.mark.parametrize("reach", [0.0, 0.1])
@pytest.mark.parametrize("name", ["decomposed", "fused-masked-free", "packed-masked"])
def test_it_decides_by_the_weighted_sum_of_all_scores(name, reach):
    """And does what the fit tried: flags from the base's scores, then one pass with these flags."""
    model, patch, feed = drawn(CASES[name], reach=reach)
    sites = find_sites(model)
    trial = Trial(model, list(zip(sites, patch.sites, strict=True)), "logits")
    weights = dict(zip((site.name for site in sites), patch.joint.weights.tolist(), strict=True))
    setting = Setting(
        betas={entry.site: entry.redistribution.beta for entry in patch.sites},
        joint=JointSetting(weights, patch.joint.threshold, patch.joint.reach),
    )
    flags = setting.flags(trial.scores(feed).margins)
    assert 0 < flags.any(axis=1).mean() < 1
    found = run(bake(model, patch, site_flags=True), feed)
    for site in sites:
        assert np.array_equal(found[f"atpatch/{site.name}/flags"], flags)
    expected = trial.second_pass(feed, flags, setting)
    np.testing.assert_allclose(found["logits"], expected, atol=1e-4)  # sums over keys, in another order
    assert np.array_equal(found["atpatch/flagged"][:, 0], flags.any(axis=1))


@pytest.mark.parametrize("emission", Emission)
@pytest.mark.parametrize("name", CASES)
def test_what_is_not_flagged_keeps_its_bits_beside_what_is(name, emission):
    model, patch, feed = drawn(CASES[name])
    before, after = run(model, feed), run(bake(model, patch, emission=emission), feed)
    flagged = after["atpatch/flagged"][:, 0]
    assert flagged.any()
    assert same_bits(before["logits"][~flagged], after["logits"][~flagged])
    assert not np.array_equal(before["logits"][flagged], after["logits"][flagged])


def test_the_second_pass_is_all_that_a_conditional_adds():
    """On clean inputs one `If` is asked, not one a site; what the outputs do not need is not repeated."""
    model, patch, feed = drawn(Planted())
    quiet = bake(model, replace(patch, joint=replace(patch.joint, threshold=3.0)), inline=True)
    (folded,) = [node for node in quiet.graph if node.op_type == "If"]
    assert {node.name for node in second_pass_nodes(quiet)} < {node.name for node in then_branch(folded)}
    assert len(second_pass_nodes(quiet)) < len(model.graph)
    for name, array in run(model, feed).items():
        assert same_bits(array, run(quiet, feed)[name])


def then_branch(node: ir.Node) -> ir.Graph:
    return node.attributes["then_branch"].as_graph()


def test_weights_are_shared_by_both_passes():
    model, patch, _ = drawn(Planted())
    patched = bake(model, patch)
    own = {name for name in patched.graph.initializers if not name.startswith(graphs.PREFIX)}
    assert own == set(model.graph.initializers)
    assert not any(graph.initializers for graph in patched.graphs() if graph is not patched.graph)
    for name in own:
        assert patched.graph.initializers[name].const_value is model.graph.initializers[name].const_value


def test_detection_needs_not_all_sites_and_redistribution_neither():
    model = Planted().model()
    feed = Planted().inputs(40)[0]
    patch = draw_joint_patch(model, feed, detects=[True, False, True])
    first, second, third = patch.sites
    entries = (replace(first, redistribution=None), second, replace(third, redistribution=None))
    chosen = replace(patch, sites=entries)
    patched = bake(model, chosen)
    record = read_record(patched)
    assert [(site.margin is not None, site.value) for site in record.sites] == [
        (True, None),
        (False, "neutral"),
        (True, None),
    ]
    assert all(site.threshold is None for site in record.sites)
    assert record.joint.outputs == ("logits",)
    result = verify(model, patched, Planted().debug(20, seed=5))
    assert result.passed, result.failures


def test_what_cannot_decide_together_is_refused():
    model, patch, _ = drawn(Planted())
    detecting = tuple(replace(entry, redistribution=None) for entry in patch.sites)
    with pytest.raises(PatchMismatchError, match="some of which redistribute"):
        bake(model, replace(patch, sites=detecting))


def test_neuron_edits_are_in_both_passes():
    planted = Planted(mlp=8)
    model, patch, feed = drawn(planted)
    layer = find_hidden_layers(model)[1].name
    edit = LayerEdit(layer, np.array([0, 3]), np.zeros(2, np.float32), np.array([0.5, -0.5], np.float32))
    patched = bake(model, replace(patch, edits=(edit,)))
    found, without = run(patched, feed), run(bake(model, patch), feed)
    flagged = found["atpatch/flagged"][:, 0]
    assert flagged.any()
    assert same_bits(found["logits"][~flagged], run(edited(model, [edit]), feed)["logits"][~flagged])
    assert not np.isclose(found["logits"][flagged], without["logits"][flagged]).all(axis=1).any()
    result = verify(model, patched, planted.debug(20, seed=5))
    assert result.passed, result.failures


# What somebody may have changed


def second_pass_nodes(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph.all_nodes() if (node.name or "").startswith("atpatch/again/")]


def skips_the_repair(model: ir.Model) -> None:
    """Nodes of the second pass read what the sites gave before it was corrected."""
    values = {value.name: value for node in model.graph.all_nodes() for value in node.outputs}
    own = values["atpatch/layer1.attention/base"]
    for node, index in list(values["atpatch/again/layer1.attention/Y"].uses()):
        if node in second_pass_nodes(model):
            node.replace_input_with(index, own)


def hands_out_the_first_pass(model: ir.Model) -> None:
    values = {value.name: value for node in model.graph.all_nodes() for value in node.outputs}
    chosen = values["atpatch/joint/0/chosen"].producer()
    chosen.replace_input_with(1, chosen.inputs[2])


def computes_something_else(model: ir.Model) -> None:
    """A product of the second pass reads other weights than the base's."""
    node = [node for node in second_pass_nodes(model) if node.op_type == "MatMul"][-1]
    weight = node.inputs[1]
    doubled = ir.Value(
        name="atpatch/joint/other", shape=weight.shape, const_value=ir.tensor(2 * weight.const_value.numpy())
    )
    doubled.dtype = weight.dtype
    model.graph.register_initializer(doubled)
    node.replace_input_with(1, doubled)


@pytest.mark.parametrize("change", [skips_the_repair, hands_out_the_first_pass, computes_something_else])
def test_a_second_pass_that_is_not_the_base_is_found_out(change):
    model, patch, _ = drawn(Planted())
    patched = bake(model, patch)
    change(patched)
    result = verify(model, patched, Planted().debug(20, seed=5))
    assert any(check.name.startswith("second pass") for check in result.failures), result.checks


@pytest.mark.parametrize("name", ["threshold", "reach", "weight"])
def test_other_numbers_of_the_decision_are_found_out(name):
    model, patch, _ = drawn(Planted(), reach=0.1)
    patched = bake(model, patch)
    scope = "layer0.attention/detection" if name == "weight" else "joint"
    value = patched.graph.initializers[f"atpatch/{scope}/{name}"]
    value.const_value = ir.tensor(value.const_value.numpy() + np.float32(1.5), name=value.name)
    (failure,) = [check for check in verify(model, patched).failures if check.name == "weights"]
    assert f"atpatch/{scope}/{name}" in failure.detail


# The second pass by itself


def test_unfolded_it_is_the_branchless_form():
    model, patch, feed = drawn(Planted())
    folded = bake(model, patch, emission=Emission.CONDITIONAL)
    flat = graphs.copy(folded)
    unfold(flat)
    assert not [node for node in flat.graph.all_nodes() if node.op_type == "If"]
    for name, array in run(folded, feed).items():
        assert same_bits(array, run(flat, feed)[name])
    nothing_to_do = graphs.copy(model)
    unfold(nothing_to_do)
    assert graphs.fingerprint(nothing_to_do) == graphs.fingerprint(model)


def test_inner_values_of_the_second_pass_can_be_looked_at():
    model, patch, feed = drawn(Planted())
    patched = bake(model, patch)
    site = read_record(patched).sites[1]
    seen = Session(expose(patched, [site.base_output, site.output])).run(feed)
    flagged = seen["atpatch/flagged"][:, 0]
    assert same_bits(seen[site.base_output][~flagged], seen[site.output][~flagged])
    assert not np.array_equal(seen[site.base_output][flagged], seen[site.output][flagged])


def with_branch() -> ir.Model:
    """`y = x W`, then an `If` whose branches read what lies before it and have weights of their own."""

    def branch(name: str, factor: float) -> onnx.GraphProto:
        weight = helper.make_tensor(f"{name}/factor", TensorProto.FLOAT, [1], [factor])
        nodes = [
            helper.make_node("Mul", ["y", f"{name}/factor"], [f"{name}/scaled"], name=f"{name}/mul"),
            helper.make_node("Add", [f"{name}/scaled", "z"], [f"{name}/sum"]),
        ]
        out = helper.make_tensor_value_info(f"{name}/sum", TensorProto.FLOAT, None)
        return helper.make_graph(nodes, name, [], [out], [weight])

    nodes = [
        helper.make_node("MatMul", ["x", "W"], ["y"], name="product"),
        helper.make_node("Neg", ["x"], ["z"], name="aside"),
        helper.make_node("ReduceMax", ["y"], ["m"], keepdims=0),
        helper.make_node("Greater", ["m", "zero"], ["c"]),
        helper.make_node("If", ["c"], ["out"], then_branch=branch("then", 2.0), else_branch=branch("else", 3.0)),
        helper.make_node("Neg", ["y"], ["dead"]),
    ]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "g",
        [value("x", TensorProto.FLOAT, ["n", 3])],
        [value("out", TensorProto.FLOAT, ["n", 3])],
        [
            helper.make_tensor("W", TensorProto.FLOAT, [3, 3], np.eye(3).ravel() * 2),
            helper.make_tensor("zero", TensorProto.FLOAT, [], [0.0]),
        ],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10))


def test_nodes_with_subgraphs_are_repeated_as_well():
    model = with_branch()
    fingerprint = graphs.fingerprint(model)
    again = graphs.copy(model)
    repeated = repeat(again, ["y"])
    assert repeated == {"y", "m", "c", "out"}  # nothing that no output depends on
    onnx.checker.check_model(ir.to_proto(again), full_check=True)
    names = [value.name for graph in again.graphs() for node in graph for value in node.outputs]
    assert len(set(names)) == len(names)
    seen = with_outputs(again, ["atpatch/again/out"])
    for x in (np.ones((2, 3), np.float32), -np.ones((2, 3), np.float32)):
        found = run(seen, {"x": x})
        assert same_bits(found["out"], found["atpatch/again/out"])
    assert graphs.fingerprint(model) == fingerprint  # weights of subgraphs kept their names
