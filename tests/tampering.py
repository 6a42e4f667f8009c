"""What may be done to a patched file after it was baked, and which checks of `verify` must say so."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from planted import Planted

from atpatch_onnx.baking.metadata import weights_digest

CARRY = Planted(drawn=(0,), harmful=(1, 2))
"""Layer 0 detects, layers 1 and 2 redistribute."""

SITE = "layer1.attention"
SIDES = ("clean", "counterfactual")

Change = Callable[[ir.Model], None]


@dataclass(frozen=True)
class Tampering:
    """A change to the patched file of `CARRY`."""

    change: Change
    fails: frozenset[str]
    """All that fails, at some level of optimization; what is added cannot be told where unbaking fails."""

    conditional: bool = False


TAMPERINGS: dict[str, Tampering] = {}


def fails(*names: str, conditional: bool = False) -> Callable[[Change], Change]:
    """Register a change under its function's name."""

    def register(change: Change) -> Change:
        untold = ("additions", "parameters") if "unbake" in names else ()
        TAMPERINGS[change.__name__] = Tampering(change, frozenset((*names, *untold)), conditional)
        return change

    return register


def node_named(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def add(model: ir.Model, before: ir.Node, op_type: str, *inputs: ir.Value, name: str) -> ir.Value:
    """A node that is ours by name and mark, in front of another."""
    node = ir.Node("", op_type, inputs, name=f"atpatch/{name}", metadata_props={"atpatch.site": name.split("/")[0]})
    node.outputs[0].name = node.name
    model.graph.insert_before(before, node)
    return node.outputs[0]


# The base


@fails("unbake", "unflagged clean", "driven, counterfactual")
def a_weight_of_the_base(model: ir.Model) -> None:
    value = model.graph.initializers["readout"]
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1.5), name="readout")


@fails("unbake", "unflagged clean", "driven, counterfactual")
def an_operator_of_the_base(model: ir.Model) -> None:
    node_named(model, f"/{SITE}/scaled").op_type = "Div"


@fails("unbake", "unflagged clean", "driven, counterfactual")
def the_name_of_an_output(model: ir.Model) -> None:
    model.graph.outputs[0].name = "scores"


@fails("unbake", "unflagged clean", "driven, counterfactual")
def an_output_that_is_gone(model: ir.Model) -> None:
    model.graph.outputs.pop(0)


# Our nodes


@fails("additions", "driven, counterfactual")
def nothing_reads_the_neutral_keys(model: ir.Model) -> None:
    """They are still computed, for nobody."""
    node = node_named(model, f"atpatch/{SITE}/key")
    for user, index in list(node.outputs[0].uses()):
        user.replace_input_with(index, node.inputs[2])


@fails("additions", f"site {SITE}, counterfactual")
def a_token_that_is_never_replaced(model: ir.Model) -> None:
    node = node_named(model, f"atpatch/{SITE}/value")
    no = add(model, node, "Not", node.inputs[0], name=f"{SITE}/no")
    node.replace_input_with(0, add(model, node, "And", node.inputs[0], no, name=f"{SITE}/never"))


@fails("additions", f"site {SITE}, clean", f"site {SITE}, counterfactual", "unflagged clean")
def the_other_tokens_are_replaced(model: ir.Model) -> None:
    node = node_named(model, f"atpatch/{SITE}/value")
    node.replace_input_with(0, add(model, node, "Not", node.inputs[0], name=f"{SITE}/no"))


@fails("additions", f"site {SITE}, counterfactual")
def another_value_than_the_neutral_one(model: ir.Model) -> None:
    node = node_named(model, f"atpatch/{SITE}/value")
    node.replace_input_with(1, add(model, node, "Neg", node.inputs[1], name=f"{SITE}/negated"))


@fails("additions", "scores at layer0.attention, clean", "scores at layer0.attention, counterfactual")
def a_detector_that_sees_something_else(model: ir.Model) -> None:
    node = node_named(model, "atpatch/layer0.attention/scores")
    node.replace_input_with(0, add(model, node, "Abs", node.inputs[0], name="layer0.attention/read"))


@fails("additions", "unflagged clean", f"site {SITE}, clean", conditional=True)
def a_branch_that_does_something_where_nothing_is_flagged(model: ir.Model) -> None:
    """The signature of a hidden conditional."""
    node = node_named(model, f"atpatch/{SITE}/value")
    branch = node.attributes["else_branch"].as_graph()
    added = ir.Node("", "Neg", [branch.outputs[0]], name=f"atpatch/{SITE}/neg", metadata_props=node.metadata_props)
    added.outputs[0].name = added.name
    branch.append(added)
    branch.outputs[0] = added.outputs[0]


@fails("unbake", "driven, counterfactual")
def an_answer_of_its_own_where_something_is_flagged(model: ir.Model) -> None:
    """The signature of a backdoor: only outputs of flagged inputs change."""
    node = next(node for node in model.graph if node.outputs[0].name == "logits")
    pooled = node.inputs[0]
    flagged = add(model, node, "ReduceMax", model_value(model, "atpatch/layer0.attention/margin"), name="own/largest")
    flagged = add(model, node, "Squeeze", flagged, name="own/number")
    flagged = add(model, node, "Greater", flagged, model.graph.initializers["atpatch/monitor/zero"], name="own/flagged")
    shifted = add(model, node, "Add", pooled, pooled, name="own/doubled")
    node.replace_input_with(0, add(model, node, "Where", flagged, shifted, pooled, name="own/pooled"))


def model_value(model: ir.Model, name: str) -> ir.Value:
    return next(value for node in model.graph for value in node.outputs if value.name == name)


# The monitors


@fails("additions", "monitoring, counterfactual")
def flags_that_are_not_reported(model: ir.Model) -> None:
    output = next(output for output in model.graph.outputs if output.name == "atpatch/flagged")
    node = output.producer()
    lowered = add(model, node, "Sub", node.inputs[0], node.inputs[0], name="monitor/none")
    node.replace_input_with(0, lowered)


@fails("additions", "monitoring, clean")
def a_score_that_is_always_positive(model: ir.Model) -> None:
    node = next(output for output in model.graph.outputs if output.name == "atpatch/score").producer()
    node.replace_input_with(0, add(model, node, "Abs", node.inputs[0], name="monitor/abs"))


# What the file says of itself


@fails("base", "unbake")
def another_base_is_named(model: ir.Model) -> None:
    model.metadata_props["atpatch.base"] = "sha256:0"


def edit_sites(model: ir.Model, number: int, **entries: Any) -> None:
    sites = json.loads(model.metadata_props["atpatch.sites"])
    sites[number] |= entries
    model.metadata_props["atpatch.sites"] = json.dumps(sites)


@fails("additions", "parameters", "unflagged counterfactual", "monitoring, counterfactual")
def sites_that_are_forgotten(model: ir.Model) -> None:
    model.metadata_props["atpatch.sites"] = "[]"


@fails("additions", "parameters")
def another_threshold_than_was_baked(model: ir.Model) -> None:
    edit_sites(model, 0, threshold=1.0)


@fails("additions", "loads")
def margins_that_are_nowhere(model: ir.Model) -> None:
    edit_sites(model, 1, margin="nowhere")


@fails("additions", "parameters", "loads")
def keys_of_another_site(model: ir.Model) -> None:
    edit_sites(model, 1, key="layer0.attention/k/product")


@fails("additions", *(f"{what}, {side}" for what in ("carried", f"site {SITE}") for side in SIDES), "monitoring, clean")
def margins_of_another_size(model: ir.Model) -> None:
    edit_sites(model, 1, margin="x")


@fails("additions", *(f"{what}, {side}" for what in ("scores at layer0.attention", "carried") for side in SIDES))
def scores_of_another_size(model: ir.Model) -> None:
    edit_sites(model, 0, own="layer0.attention/q/product")


@fails("additions", "carried, counterfactual", f"site {SITE}, counterfactual")
def margins_that_are_not_carried(model: ir.Model) -> None:
    """Something of the right size, in which nothing is flagged."""
    node = node_named(model, f"atpatch/{SITE}/key")
    own = model_value(model, "atpatch/layer0.attention/margin")
    low = add(model, node, "Abs", own, name=f"{SITE}/abs")
    add(model, node, "Neg", low, name=f"{SITE}/low")
    edit_sites(model, 1, margin=f"atpatch/{SITE}/low")


# Weights


@dataclass(frozen=True)
class WeightChange:
    """A change to a weight of the patch that was baked into `Planted()`."""

    weight: str
    change: Callable[[np.ndarray], np.ndarray]
    said: str = ""
    """What is said of it where the digest was made anew; empty: nothing can be known of it then."""


WEIGHTS = {
    "another threshold": WeightChange("threshold", lambda a: a + 0.01, "threshold does not hold"),
    "a threshold that nothing exceeds": WeightChange("threshold", lambda a: a * 0 + np.inf, "threshold does not hold"),
    "two thresholds": WeightChange("threshold", lambda a: np.repeat(a, 2), "a detector of one product"),
    "a site that is switched off": WeightChange("level", lambda a: a + np.inf, "level does not hold"),
    "a site that always fires": WeightChange("level", lambda a: a - 1, "level does not hold"),
    "a level of NaN": WeightChange("level", lambda a: a * np.nan, "level does not hold"),
    "a neutral key of NaN": WeightChange("neutral_key", lambda a: a * np.nan, "neutral_key: expected finite"),
    "a detector of NaN": WeightChange("detector", lambda a: a * np.nan, "detector: expected finite"),
    "a detector of another site": WeightChange("detector", lambda a: a[:-1], "a detector of"),
    "another detector": WeightChange("detector", lambda a: a + 1),
    "another neutral value": WeightChange("neutral_value", lambda a: a + 1),
}


def weight(model: ir.Model, name: str) -> ir.Value:
    return model.graph.initializers[f"atpatch/{SITE}/{name}"]


def set_weight(model: ir.Model, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    value = weight(model, name)
    old = value.const_value.numpy()
    value.const_value = ir.tensor(change(old.copy()).astype(old.dtype), name=value.name)
    value.shape = value.const_value.shape


def sign(model: ir.Model) -> None:
    """Make the digest of our weights anew, as whoever changes a file on purpose will."""
    model.metadata_props["atpatch.weights"] = weights_digest(model)
