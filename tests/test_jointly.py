"""A joint decision in the graph: it decides as its scores say, repeats the base, and leaves nothing behind."""

import json
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from models import VARIANTS, Net, draw_joint_patch, run, same_bits, with_outputs
from onnx import TensorProto, helper
from planted import Planted

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.edits import edited
from atpatch_onnx.baking.emission import Emission
from atpatch_onnx.baking.expose import expose
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.baking.second_pass import repeat, unfold
from atpatch_onnx.baking.unbake import unbake
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.errors import BakeError, PatchMismatchError, UnbakeError
from atpatch_onnx.fitting.switchboard import JointSetting, Setting, Trial
from atpatch_onnx.graph.names import PREFIX
from atpatch_onnx.matching import find_sites, sample_outputs
from atpatch_onnx.matching.hidden import find_hidden_layers
from atpatch_onnx.measuring.verify import verify
from atpatch_onnx.patches.patch import LayerEdit, Patch
from atpatch_onnx.running.sessions import Session

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
    assert graphs.fingerprint(unbake(patched)) == graphs.fingerprint(model)


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
    own = {name for name in patched.graph.initializers if not name.startswith(PREFIX)}
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
    with pytest.raises(PatchMismatchError, match="a site that redistributes"):
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
    assert [check.name for check in verify(model, patched).failures][:1] == ["repetition"]
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


def edited_joint(patched: ir.Model, **changes) -> None:
    """The metadata entry of the decision says something else."""
    entry = json.loads(patched.metadata_props["atpatch.joint"])
    patched.metadata_props["atpatch.joint"] = json.dumps({**entry, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"threshold": 1},
        {"threshold": float("nan")},
        {"outputs": {"logits": 1}},
        {"outputs": "logits"},
        {"outputs": [1]},
        {"reach": None},
        {"more": 1},
    ],
    ids=str,
)
def test_metadata_of_another_kind_is_refused(changes):
    model, patch, _ = drawn(Planted())
    patched = bake(model, patch)
    edited_joint(patched, **changes)
    with pytest.raises(UnbakeError, match="complete entries"):
        verify(model, patched)


@pytest.mark.parametrize("outputs", [[], ["x"], ["hidden"], ["logits", "logits"]], ids=str)
def test_other_outputs_in_the_metadata_are_found_out(outputs):
    model, patch, _ = drawn(Planted())
    patched = bake(model, patch)
    edited_joint(patched, outputs=outputs)
    assert not verify(model, patched).passed
    assert not verify(model, patched, Planted().debug(6, seed=5)).passed


def test_a_reach_that_the_file_does_not_name_is_found_out():
    model, patch, _ = drawn(Planted(), reach=0.1)
    patched = bake(model, patch)
    edited_joint(patched, reach=0.0)
    assert [check.name for check in verify(model, patched).failures] == ["weights"]


# Bases of all kinds


def net_with(*nodes: onnx.NodeProto, outputs: dict[str, tuple[int, list]], **options) -> tuple[ir.Model, dict]:
    """A net with further nodes behind it, and outputs by type and shape."""
    net = Net(**options)
    proto = net.proto()
    proto.graph.node.extend(nodes)
    proto.graph.output.extend(helper.make_tensor_value_info(name, *kind) for name, kind in outputs.items())
    return ir.from_proto(proto), net.feed(np.random.default_rng(0))


def checked(model: ir.Model, feed: dict[str, np.ndarray]) -> list[ir.Model]:
    """A drawn patch in both emissions, both of which verify and come out again."""
    patch = draw_joint_patch(model, feed, share=0.1)
    turned = {name: array[::-1].copy() for name, array in feed.items()}
    found = []
    for emission in Emission:
        found.append(bake(model, patch, emission=emission))
        result = verify(model, found[-1], DebugSet.from_pairs(feed, turned), batch_size=4)
        assert result.passed, result.failures
    return found


def bool_output() -> tuple[ir.Model, dict]:
    zero = helper.make_node("Constant", [], ["zero"], value_float=0.0)
    node = helper.make_node("Greater", ["logits", "zero"], ["positive"])
    return net_with(zero, node, outputs={"positive": (TensorProto.BOOL, ["batch", 3])})


def short_output() -> tuple[ir.Model, dict]:
    node = helper.make_node("Cast", ["logits"], ["short"], to=TensorProto.INT16)
    return net_with(node, outputs={"short": (TensorProto.INT16, ["batch", 3])})


def infinite_output() -> tuple[ir.Model, dict]:
    nodes = [helper.make_node("Relu", ["logits"], ["r"]), helper.make_node("Log", ["r"], ["log"])]
    return net_with(*nodes, outputs={"log": (TensorProto.FLOAT, ["batch", 3])})


def conditional_tail() -> tuple[ir.Model, dict]:
    return net_with(outputs={}, y_in_if=True)


def site_output() -> tuple[ir.Model, dict]:
    return net_with(outputs={}, y_is_output=True)


def output_twice() -> tuple[ir.Model, dict]:
    model, feed = net_with(outputs={})
    model.graph.outputs.append(model.graph.outputs[0])
    return model, feed


def clash_of_names() -> tuple[ir.Model, dict]:
    model, feed = net_with(outputs={})
    logits = model.graph.outputs[0].producer()
    logits.name = ""
    other = next(node for node in model.graph if node is not logits and node.outputs[0].name != "logits")
    other.name = f"{logits.op_type}_logits"
    return model, feed


BASES = [bool_output, short_output, infinite_output, conditional_tail, site_output, output_twice, clash_of_names]


@pytest.mark.parametrize("base", BASES)
def test_bases_of_all_kinds(base):
    model, feed = base()
    for patched in checked(model, feed):
        for name, array in run(bake(model, quiet(model, feed)), feed).items():
            if name in run(model, feed):
                assert same_bits(array, run(model, feed)[name])
        assert graphs.fingerprint(unbake(patched)) == graphs.fingerprint(model)


def quiet(model: ir.Model, feed: dict[str, np.ndarray]) -> Patch:
    patch = draw_joint_patch(model, feed, share=0.1)
    return replace(patch, joint=replace(patch.joint, threshold=3.0))


def test_outputs_with_the_samples_first():
    """Whatever their dimensions are called; not those that have them elsewhere, or none."""
    turned = helper.make_node("Transpose", ["hidden"], ["turned"], perm=[1, 0, 2])
    largest = helper.make_node("ReduceMax", ["hidden"], ["largest"], keepdims=0)
    model, _ = net_with(
        turned,
        largest,
        outputs={"turned": (TensorProto.FLOAT, ["a", "b", 8]), "largest": (TensorProto.FLOAT, [])},
    )
    assert sample_outputs(model) == {"logits", "hidden"}
    model.graph.outputs[0].shape = ir.Shape(["Gemm_dim_0", 3])
    assert "logits" in sample_outputs(model)


def test_an_axis_as_long_as_the_batch_is_not_taken_for_it():
    node = helper.make_node("Transpose", ["hidden"], ["turned"], perm=[1, 0, 2])
    model, feed = net_with(node, outputs={"turned": (TensorProto.FLOAT, [5, 5, 8])}, batch=5, tokens=5)
    found = run(bake(model, draw_joint_patch(model, feed, share=0.15)), feed)
    flagged = found["atpatch/flagged"][:, 0]
    assert 0 < flagged.mean() < 1
    np.testing.assert_allclose(found["turned"][:, flagged], found["hidden"].transpose(1, 0, 2)[:, flagged], atol=1e-6)


def test_a_batch_that_is_fixed_and_not_full():
    planted = Planted(batch=4)
    model, patch, _ = drawn(planted)
    result = verify(model, bake(model, patch), planted.debug(18, seed=5))
    assert result.passed, result.failures
    assert any(check.name.startswith("second pass") for check in result.checks)


def test_weights_belong_to_their_sites_in_whatever_order():
    model, patch, feed = drawn(Planted())
    weights = np.array([0.7, 0.2, 0.1], np.float32)
    one = replace(patch, joint=replace(patch.joint, weights=weights))
    other = replace(one, sites=one.sites[::-1], joint=replace(patch.joint, weights=weights[::-1].copy()))
    for name, array in run(bake(model, one), feed).items():
        assert same_bits(array, run(bake(model, other), feed)[name])
    with pytest.raises(PatchMismatchError, match="a weight for each of 3"):
        bake(model, replace(patch, joint=replace(patch.joint, weights=weights[:2])))


def test_what_cannot_be_handed_out_is_refused():
    with pytest.raises(BakeError, match="half precision that the model itself reads"):
        draw_joint_patch(*net_with(outputs={}, half=True))
    model = Planted(mlp=8).model()
    layer = find_hidden_layers(model)[1]
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.append(values[layer.value])
    patch = draw_joint_patch(model, Planted().inputs(20)[0])
    edit = LayerEdit(layer.name, np.array([0]), np.zeros(1, np.float32), np.ones(1, np.float32))
    with pytest.raises(BakeError, match="hidden units that are edited"):
        bake(model, replace(patch, edits=(edit,)))


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
