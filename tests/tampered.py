"""What an attacker may do to a patched file so that it does something else, or says something else of itself.

Each changes the file in a way that no run on a debug set need show; who does it makes the file's own digest anew.
"""

import json
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from tampering import SITE, add, edit_sites, model_value, node_named

Change = Callable[[ir.Model], None]

FIRST = "layer0.attention"
"""The site that detects; `SITE` behind it redistributes."""

TAMPERED: dict[str, Change] = {}
"""To a file without an `If`, by name."""

CONDITIONAL: dict[str, Change] = {}
"""To a file with `If`s."""

BESIDE_PATCH: dict[str, Change] = {}
"""What could as well have been baked from another patch: known beside the patch that is said to be in the file."""


def to(group: dict[str, Change]) -> Callable[[Change], Change]:
    def register(change: Change) -> Change:
        group[change.__name__] = change
        return change

    return register


def initializer(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """A new weight, or another content for one that is there."""
    tensor = ir.tensor(array, name=name)
    if name in model.graph.initializers:
        value = model.graph.initializers[name]
        value.const_value, value.shape, value.dtype = tensor, tensor.shape, tensor.dtype
        return value
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def changed(model: ir.Model, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    old = model.graph.initializers[name].const_value.numpy()
    initializer(model, name, np.asarray(change(old.copy()), old.dtype))


def logits(model: ir.Model) -> ir.Node:
    return next(node for node in model.graph if node.outputs[0].name == "logits")


# Nodes that are marked as ours


@to(TAMPERED)
def a_trigger_where_in_front_of_the_logits(model: ir.Model) -> None:
    node = logits(model)
    largest = add(model, node, "ReduceMax", model_value(model, f"atpatch/{FIRST}/margin"), name=f"{SITE}/largest")
    level = initializer(model, f"atpatch/{SITE}/other", np.full((1, 1, 1), 3.0, np.float32))
    seen = add(model, node, "Greater", largest, level, name=f"{SITE}/seen")
    seen = add(model, node, "Squeeze", seen, name=f"{SITE}/number")
    shifted = add(model, node, "Add", node.inputs[0], node.inputs[0], name=f"{SITE}/shifted")
    node.replace_input_with(0, add(model, node, "Where", seen, shifted, node.inputs[0], name=f"{SITE}/chosen"))


@to(TAMPERED)
def an_if_of_its_own(model: ir.Model) -> None:
    node = logits(model)
    value, some = node.inputs[0], initializer(model, f"atpatch/{SITE}/always", np.array(False))
    branches = []
    for which, op_type in (("then", "Neg"), ("else", "Identity")):
        inner = ir.Node("", op_type, [value], name=f"atpatch/{SITE}/{which}", metadata_props={"atpatch.site": SITE})
        inner.outputs[0].name = inner.name
        branches.append(
            ir.AttrGraph(f"{which}_branch", ir.Graph([], [inner.outputs[0]], nodes=[inner], name=f"{which}_graph"))
        )
    choice = ir.Node("", "If", [some], branches, name=f"atpatch/{SITE}/if", metadata_props={"atpatch.site": SITE})
    choice.outputs[0].name = choice.name
    model.graph.insert_before(node, choice)
    node.replace_input_with(0, choice.outputs[0])


@to(TAMPERED)
def a_node_of_ours_that_nobody_reads(model: ir.Model) -> None:
    add(model, logits(model), "Neg", model.graph.inputs[0], name=f"{SITE}/idle")


@to(TAMPERED)
def the_values_of_another_site_are_replaced(model: ir.Model) -> None:
    node = node_named(model, f"atpatch/{SITE}/value")
    node.replace_input_with(2, node_named(model, f"atpatch/{SITE}/key").inputs[2])


@to(TAMPERED)
def flags_are_raised_where_margins_are_not(model: ir.Model) -> None:
    node_named(model, f"atpatch/{SITE}/flagged").op_type = "Less"


@to(TAMPERED)
def a_margin_of_zero_is_flagged(model: ir.Model) -> None:
    node_named(model, f"atpatch/{SITE}/flagged").op_type = "GreaterOrEqual"


@to(TAMPERED)
def scores_are_summed_instead_of_subtracted(model: ir.Model) -> None:
    node_named(model, f"atpatch/{FIRST}/margin").op_type = "Add"


@to(TAMPERED)
def neutral_and_own_are_exchanged(model: ir.Model) -> None:
    node = node_named(model, f"atpatch/{SITE}/key")
    neutral, own = node.inputs[1], node.inputs[2]
    node.replace_input_with(1, own)
    node.replace_input_with(2, neutral)


@to(TAMPERED)
def the_detector_reads_values(model: ir.Model) -> None:
    node = node_named(model, f"atpatch/{FIRST}/scores")
    node.replace_input_with(0, model_value(model, f"{FIRST}/v/product"))


@to(TAMPERED)
def the_neutral_key_stands_for_the_value_too(model: ir.Model) -> None:
    weights = model.graph.initializers
    node_named(model, f"atpatch/{SITE}/value").replace_input_with(1, weights[f"atpatch/{SITE}/neutral_key"])


@to(TAMPERED)
def the_neutral_key_is_a_weight_of_the_base(model: ir.Model) -> None:
    readout = model.graph.initializers["readout"]
    node_named(model, f"atpatch/{SITE}/value").replace_input_with(1, readout)


@to(TAMPERED)
def only_the_value_is_read(model: ir.Model) -> None:
    node = node_named(model, f"atpatch/{SITE}/key")
    for user, index in list(node.outputs[0].uses()):
        user.replace_input_with(index, node.inputs[2])


@to(TAMPERED)
def an_attribute_is_added(model: ir.Model) -> None:
    node_named(model, f"atpatch/{SITE}/flagged").attributes["alpha"] = ir.AttrFloat32("alpha", 1.0)


@to(TAMPERED)
def an_operator_of_another_domain(model: ir.Model) -> None:
    node_named(model, f"atpatch/{SITE}/flagged").domain = "com.microsoft"


@to(TAMPERED)
def a_node_with_a_doc_string(model: ir.Model) -> None:
    node_named(model, f"atpatch/{SITE}/flagged").doc_string = "nothing to see here"


@to(TAMPERED)
def a_node_with_metadata_of_its_own(model: ir.Model) -> None:
    node_named(model, f"atpatch/{SITE}/flagged").metadata_props["reviewed"] = "yes"


@to(TAMPERED)
def a_node_that_is_marked_as_another_sites(model: ir.Model) -> None:
    node_named(model, f"atpatch/{SITE}/flagged").metadata_props["atpatch.site"] = FIRST


@to(TAMPERED)
def two_nodes_in_another_order(model: ir.Model) -> None:
    node = node_named(model, f"atpatch/{SITE}/value")
    before = node_named(model, f"atpatch/{SITE}/key")
    model.graph.remove(node)
    model.graph.insert_before(before, node)


@to(TAMPERED)
def a_shape_of_ours_that_is_not_so(model: ir.Model) -> None:
    node_named(model, f"atpatch/{SITE}/key").outputs[0].shape = ir.Shape([1, 2, 3])


@to(TAMPERED)
def a_shape_of_ours_that_is_not_declared(model: ir.Model) -> None:
    node_named(model, f"atpatch/{SITE}/key").outputs[0].shape = None


@to(TAMPERED)
def a_type_of_ours_that_is_not_so(model: ir.Model) -> None:
    node_named(model, f"atpatch/{SITE}/key").outputs[0].dtype = ir.DataType.DOUBLE


@to(TAMPERED)
def a_node_of_the_base_that_is_marked_as_ours(model: ir.Model) -> None:
    logits(model).metadata_props["atpatch.site"] = SITE


@to(TAMPERED)
def a_node_of_ours_that_is_marked_as_the_bases(model: ir.Model) -> None:
    del node_named(model, f"atpatch/{SITE}/flagged").metadata_props["atpatch.site"]


@to(TAMPERED)
def a_replacement_of_another_value(model: ir.Model) -> None:
    node_named(model, f"atpatch/{SITE}/key").metadata_props["atpatch.replaces"] = f"{SITE}/v/product"


@to(TAMPERED)
def the_base_reads_our_margins(model: ir.Model) -> None:
    """Adds them, less themselves, to what the readout reads."""
    node = logits(model)
    margin = model_value(model, f"atpatch/{FIRST}/margin")
    nothing = add(model, node, "Sub", margin, margin, name=f"{SITE}/nothing")
    nothing = add(model, node, "ReduceMax", nothing, name=f"{SITE}/none")
    nothing = add(model, node, "Squeeze", nothing, name=f"{SITE}/zero")
    node.replace_input_with(0, add(model, node, "Add", node.inputs[0], nothing, name=f"{SITE}/sum"))


# Outputs


@to(TAMPERED)
def an_output_that_tells_more(model: ir.Model) -> None:
    model.graph.outputs.append(model_value(model, f"atpatch/{FIRST}/margin"))


@to(TAMPERED)
def one_monitor_fewer(model: ir.Model) -> None:
    model.graph.outputs.pop()
    model.metadata_props["atpatch.monitors"] = json.dumps(["atpatch/flagged"])


@to(TAMPERED)
def monitors_in_another_order(model: ir.Model) -> None:
    last = model.graph.outputs.pop()
    model.graph.outputs.insert(1, last)
    model.metadata_props["atpatch.monitors"] = json.dumps(["atpatch/score", "atpatch/flagged"])


@to(TAMPERED)
def a_monitor_that_watches_one_sample(model: ir.Model) -> None:
    next(node for node in model.graph if node.outputs[0].name == "atpatch/flagged").op_type = "Less"


# What the file says of itself


@to(TAMPERED)
def a_made_up_site_on_the_logits(model: ir.Model) -> None:
    sites = json.loads(model.metadata_props["atpatch.sites"])
    made_up = dict(sites[-1], site="logits", key="logits", value="logits")
    model.metadata_props["atpatch.sites"] = json.dumps([*sites, made_up], sort_keys=True)


@to(TAMPERED)
def a_site_that_says_it_does_not_redistribute(model: ir.Model) -> None:
    edit_sites(model, 1, redistributes=False)


@to(TAMPERED)
def a_site_that_says_it_does_not_detect(model: ir.Model) -> None:
    edit_sites(model, 0, own=None, threshold=None)


@to(TAMPERED)
def a_threshold_of_nan(model: ir.Model) -> None:
    edit_sites(model, 0, threshold=float("nan"))


@to(TAMPERED)
def margins_of_the_other_site(model: ir.Model) -> None:
    edit_sites(model, 1, margin=f"atpatch/{SITE}/key")


@to(TAMPERED)
def sites_in_another_order(model: ir.Model) -> None:
    sites = json.loads(model.metadata_props["atpatch.sites"])
    model.metadata_props["atpatch.sites"] = json.dumps(sites[::-1], sort_keys=True)


@to(TAMPERED)
def a_conditional_that_is_none(model: ir.Model) -> None:
    model.metadata_props["atpatch.conditional"] = "yes"


@to(TAMPERED)
def an_entry_of_its_own(model: ir.Model) -> None:
    model.metadata_props["atpatch.reviewed"] = "yes"


@to(TAMPERED)
def another_digest_of_the_weights(model: ir.Model) -> None:
    model.metadata_props["atpatch.weights"] = "0" * 64


@to(TAMPERED)
def an_edited_layer_that_is_none(model: ir.Model) -> None:
    model.metadata_props["atpatch.layers"] = json.dumps([{"layer": "mlp", "value": "logits", "edited": 1}])


# Around the graph


@to(TAMPERED)
def a_weight_of_ours_too_many(model: ir.Model) -> None:
    initializer(model, f"atpatch/{SITE}/more", np.zeros(3, np.float32))


@to(TAMPERED)
def a_weight_of_ours_that_is_an_input(model: ir.Model) -> None:
    """Whoever calls the model may then set it."""
    model.graph.inputs.append(model.graph.initializers[f"atpatch/{SITE}/level"])


@to(TAMPERED)
def another_operator_set(model: ir.Model) -> None:
    model.graph.opset_imports[""] = 17


@to(TAMPERED)
def an_operator_set_more(model: ir.Model) -> None:
    model.graph.opset_imports["com.example"] = 1


@to(TAMPERED)
def a_function_that_shadows_an_operator(model: ir.Model) -> None:
    value = ir.Value(name="given")
    node = ir.Node("", "Neg", [value])
    node.outputs[0].name = "result"
    graph = ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 18})
    function = ir.Function("", "Where", graph=graph, attributes=[])
    model.functions[function.identifier()] = function


@to(TAMPERED)
def another_producer(model: ir.Model) -> None:
    model.producer_name = "someone"


@to(TAMPERED)
def another_name_of_the_graph(model: ir.Model) -> None:
    model.graph.name = "other"


# Weights whose numbers no patch brings


@to(TAMPERED)
def a_level_below_zero(model: ir.Model) -> None:
    changed(model, f"atpatch/{SITE}/level", lambda array: array - np.float32(1e-30))


@to(TAMPERED)
def a_monitor_that_flags_from_one_on(model: ir.Model) -> None:
    changed(model, "atpatch/monitor/zero", lambda array: array + 1)


@to(TAMPERED)
def a_neutral_key_of_double_precision(model: ir.Model) -> None:
    name = f"atpatch/{SITE}/neutral_key"
    initializer(model, name, model.graph.initializers[name].const_value.numpy().astype(np.float64))


@to(TAMPERED)
def a_neutral_key_for_each_token(model: ir.Model) -> None:
    """A key that depends on the position can tell the place of the trigger."""
    name = f"atpatch/{SITE}/neutral_key"
    array = model.graph.initializers[name].const_value.numpy()
    initializer(model, name, np.repeat(array, 8, axis=1))


@to(TAMPERED)
def an_infinite_neutral_value(model: ir.Model) -> None:
    changed(model, f"atpatch/{SITE}/neutral_value", lambda array: array + np.inf)


# Files with an If


def branches(model: ir.Model) -> tuple[ir.Node, ir.Graph, ir.Graph]:
    node = node_named(model, f"atpatch/{SITE}/value")
    return node, node.attributes["then_branch"].as_graph(), node.attributes["else_branch"].as_graph()


@to(CONDITIONAL)
def branches_that_are_exchanged(model: ir.Model) -> None:
    node, then, otherwise = branches(model)
    node.attributes["then_branch"] = ir.AttrGraph("then_branch", otherwise)
    node.attributes["else_branch"] = ir.AttrGraph("else_branch", then)


@to(CONDITIONAL)
def a_branch_that_hands_over_something_else(model: ir.Model) -> None:
    _, _, otherwise = branches(model)
    otherwise[0].replace_input_with(0, model_value(model, f"{SITE}/k/product"))


@to(CONDITIONAL)
def a_branch_that_negates(model: ir.Model) -> None:
    branches(model)[2][0].op_type = "Neg"


@to(CONDITIONAL)
def a_condition_that_always_holds(model: ir.Model) -> None:
    node = branches(model)[0]
    node.replace_input_with(0, initializer(model, f"atpatch/{SITE}/always", np.array(True)))


@to(CONDITIONAL)
def a_branch_with_a_weight_of_its_own(model: ir.Model) -> None:
    then = branches(model)[1]
    tensor = ir.tensor(np.zeros(1, np.float32), name=f"atpatch/{SITE}/hidden")
    then.register_initializer(
        ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
    )


@to(CONDITIONAL)
def a_file_that_says_it_has_no_if(model: ir.Model) -> None:
    model.metadata_props["atpatch.conditional"] = "no"


# What another patch would do


@to(BESIDE_PATCH)
def a_threshold_that_nothing_exceeds(model: ir.Model) -> None:
    edit_sites(model, 0, threshold=float(np.float32(1e30)))
    changed(model, f"atpatch/{FIRST}/threshold", lambda array: array * 0 + np.float32(1e30))


@to(BESIDE_PATCH)
def a_neutral_value_that_points_at_the_target(model: ir.Model) -> None:
    changed(model, f"atpatch/{SITE}/neutral_value", lambda array: array + 100)


@to(BESIDE_PATCH)
def a_detector_of_the_attackers_choice(model: ir.Model) -> None:
    changed(model, f"atpatch/{FIRST}/detector", lambda array: -array)


@to(BESIDE_PATCH)
def another_id(model: ir.Model) -> None:
    model.metadata_props["atpatch.patch"] = "0123456789abcdef"


@to(BESIDE_PATCH)
def better_figures(model: ir.Model) -> None:
    model.metadata_props["atpatch.figures"] = json.dumps({"meets_target": True, "recall": 1.0})
