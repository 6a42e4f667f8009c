"""Every rule of a patched graph is broken once, by hand, and has to say so."""

import json
from collections.abc import Callable

import numpy as np
import onnx
import onnx.helper
import onnx.numpy_helper
import onnx_ir as ir
import pytest
from models import FORMS, Net, draw_patch

from atpatch_onnx import graph
from atpatch_onnx.baking import invariants
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.invariants import RULES, require_invariants, violations
from atpatch_onnx.baking.unbake import unbake
from atpatch_onnx.errors import InvariantError


def baked(conditional: bool = True) -> ir.Model:
    model = Net().model()
    return bake(model, draw_patch(model), conditional=conditional)


def node_named(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph.all_nodes() if node.name == name)


@pytest.mark.parametrize("conditional", FORMS)
def test_baked_models_obey(conditional: bool) -> None:
    model = baked(conditional)
    assert violations(model) == ()
    require_invariants(model)


def test_operators_that_a_runtime_added_to_onnxs_domain_are_none_of_our_business() -> None:
    """onnxruntime's fusions put SimplifiedLayerNormalization there, which onnx's checker does not know."""
    proto = Net().proto()
    proto.graph.node.append(
        onnx.helper.make_node("SimplifiedLayerNormalization", ["logits", "scale"], ["normalized"], name="fused")
    )
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones(3, np.float32), "scale"))
    proto.graph.output.append(onnx.helper.make_tensor_value_info("normalized", onnx.TensorProto.FLOAT, None))
    model = ir.from_proto(proto)
    patched = bake(model, draw_patch(model))
    assert violations(patched) == ()
    assert graph.fingerprint(unbake(patched)) == graph.fingerprint(model)


def unmark(model: ir.Model) -> None:
    node_named(model, "atpatch/site_0/margin").metadata_props.clear()


def disguise(model: ir.Model) -> None:
    node_named(model, "atpatch/site_0/margin").name = "harmless"


def disguise_within_a_branch(model: ir.Model) -> None:
    node_named(model, "atpatch/site_0/key/then").name = "harmless"


def mark_the_bases(model: ir.Model) -> None:
    node_named(model, "node/logits").name = "atpatch/node"


def repeat_a_name(model: ir.Model) -> None:
    node_named(model, "atpatch/site_0/margin").outputs[0].name = "layer0/product"


def move_monitors_forward(model: ir.Model) -> None:
    outputs = list(model.graph.outputs)
    model.graph.outputs.clear()
    model.graph.outputs.extend([*outputs[-2:], *outputs[:-2]])


def drop_a_monitor(model: ir.Model) -> None:
    model.graph.outputs.pop()


def add_a_monitor(model: ir.Model) -> None:
    model.graph.outputs.append(node_named(model, "atpatch/site_0/margin").outputs[0])


def read_the_bases_keys(model: ir.Model) -> None:
    own = node_named(model, "node/layer0/k/sum").outputs[0]
    node_named(model, "node/layer0/k/split").replace_input_with(0, own)


def replace_another_value(model: ir.Model) -> None:
    """What stands in for the keys does not read them."""
    node = node_named(model, "atpatch/site_0/key")
    for branch in ("then_branch", "else_branch"):
        for inner in node.attributes[branch].as_graph():
            for index, value in enumerate(inner.inputs):
                if value is not None and value.name == "layer0/k/sum":
                    inner.replace_input_with(index, node_named(model, "node/layer0/v/sum").outputs[0])


def replace_an_output_of_the_model(model: ir.Model) -> None:
    model.graph.outputs.insert(0, node_named(model, "node/layer0/k/sum").outputs[0])


def forget_what_is_replaced(model: ir.Model) -> None:
    del node_named(model, "atpatch/site_0/key").metadata_props["atpatch.replaces"]


def forget_a_site(model: ir.Model) -> None:
    sites = json.loads(model.metadata_props["atpatch.sites"])
    model.metadata_props["atpatch.sites"] = json.dumps(sites[1:])


def claim_to_have_no_if(model: ir.Model) -> None:
    model.metadata_props["atpatch.conditional"] = "no"


def act_where_nothing_is_flagged(model: ir.Model) -> None:
    branch = node_named(model, "atpatch/site_0/key").attributes["else_branch"].as_graph()
    next(iter(branch)).op_type = "Neg"


def use_a_value_before_it_is_there(model: ir.Model) -> None:
    margin = node_named(model, "atpatch/site_0/margin")
    model.graph.remove(margin)
    model.graph.append(margin)


def forget_what_it_is(model: ir.Model) -> None:
    model.metadata_props.clear()


BREAKS: dict[Callable[[ir.Model], None], Callable[..., object] | None] = {
    unmark: invariants.names_are_ours,
    disguise: invariants.names_are_ours,
    disguise_within_a_branch: invariants.names_are_ours,
    mark_the_bases: invariants.names_are_ours,
    repeat_a_name: invariants.names_are_unique,
    move_monitors_forward: invariants.monitors_come_last,
    drop_a_monitor: invariants.monitors_come_last,
    add_a_monitor: invariants.monitors_come_last,
    read_the_bases_keys: invariants.replacements_are_read,
    replace_another_value: invariants.replacements_are_read,
    replace_an_output_of_the_model: invariants.replacements_are_read,
    forget_what_is_replaced: invariants.replacements_are_read,
    forget_a_site: invariants.replacements_are_read,
    claim_to_have_no_if: invariants.conditionals_are_declared,
    act_where_nothing_is_flagged: invariants.conditionals_are_declared,
    use_a_value_before_it_is_there: invariants.onnx_accepts_it,
    forget_what_it_is: None,
}
"""What is done to a patched model, and the rule that has to notice (None: there is no record to hold it to)."""


@pytest.mark.parametrize("damage", BREAKS, ids=lambda damage: damage.__name__)
def test_damage_is_noticed(damage: Callable[[ir.Model], None]) -> None:
    model = baked()
    damage(model)
    found = violations(model)
    assert found
    rule = BREAKS[damage]
    if rule is not None:
        record = invariants.read_record(model)
        assert list(rule(model, record)), f"{rule.__name__} says nothing, only {found}"
    with pytest.raises(InvariantError) as caught:
        require_invariants(model)
    assert all(words in str(caught.value) for words in found), "the error lists everything"


def test_every_rule_is_broken_by_a_test() -> None:
    assert {rule for rule in BREAKS.values() if rule is not None} == set(RULES)


def test_violations_leave_the_model_alone() -> None:
    model = baked()
    before = graph.to_bytes(model)
    violations(model)
    assert graph.to_bytes(model) == before
