"""What every patched graph must obey, as a list of rules; a rule answers what breaks it.

`bake` runs them as its postcondition, `verify` on whatever file it is given.
"""

from collections.abc import Callable, Iterator

import onnx
import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.deferral import recalled
from atpatch_onnx.baking.emission import Emission
from atpatch_onnx.baking.metadata import PatchRecord, read_record
from atpatch_onnx.errors import InvariantError, UnbakeError
from atpatch_onnx.graph.names import AGAIN, DOMAIN, PREFIX, SITE_KEY, base_name


def violations(model: ir.Model) -> tuple[str, ...]:
    """Everything about a patched model that breaks a rule, in words; empty for a sound one."""
    try:
        record = read_record(model)
    except UnbakeError as error:
        return (str(error),)
    return tuple(found for rule in RULES for found in rule(model, record))


def require_invariants(model: ir.Model) -> None:
    """Raise unless a patched model obeys every rule.

    Raises:
        InvariantError: It breaks at least one; the error lists them all.
    """
    found = violations(model)
    if found:
        raise InvariantError(
            "the patched graph",
            expected="every rule of a patched graph to hold",
            found="; ".join(found),
            advice="Report this with the model: a baked patch must never break a rule.",
        )


def _ours(model: ir.Model) -> Iterator[ir.Node]:
    return (node for node in model.graph.all_nodes() if SITE_KEY in node.metadata_props)


def _as_woven(model: ir.Model) -> ir.Model:
    """The model before maps were deferred; itself where its graph is broken, of which another rule tells."""
    return recalled(model) if graphs.undefined_value(model) is None else model


def names_are_ours(model: ir.Model, record: PatchRecord) -> Iterator[str]:
    """Every node we add is named under `atpatch/`, and no other node is."""
    for node in model.graph.all_nodes():
        if (SITE_KEY in node.metadata_props) != (node.name or "").startswith(PREFIX):
            yield f"the node {node.name!r} is named or marked as ours, but not both"


def names_are_unique(model: ir.Model, record: PatchRecord) -> Iterator[str]:
    """A value's name stands once in the whole model, subgraphs included."""
    seen: set[str] = set()
    for graph in model.graphs():
        values = [*graph.inputs, *(output for node in graph for output in node.outputs)]
        values += [value for value in graph.initializers.values() if not value.is_graph_input()]
        for value in values:
            if value.name and value.name in seen:
                yield f"the name {value.name!r} stands twice"
            seen.add(value.name or "")


def monitors_come_last(model: ir.Model, record: PatchRecord) -> Iterator[str]:
    """The outputs we add stand behind the model's own and are the ones the file names."""
    names = [output.name or "" for output in model.graph.outputs]
    count = len(names) - len(record.monitors)
    if tuple(names[count:]) != record.monitors or any(name.startswith(PREFIX) for name in names[:count]):
        yield f"the outputs are {names}, the monitoring outputs {list(record.monitors)} should come last"


def outputs_are_corrected(model: ir.Model, record: PatchRecord) -> Iterator[str]:
    """At every redistributing site the base's output feeds our nodes only; what the model hands out is corrected."""
    model = _as_woven(model)
    values = {value.name: value for node in model.graph for value in node.outputs}
    for site, name in record.outputs.items():
        own, corrected = values.get(base_name(site)), values.get(name)
        if own is None or corrected is None:
            yield f"site {site} has no output {name!r} beside its own"
            continue
        producer = corrected.producer()
        if producer is None or SITE_KEY not in producer.metadata_props:
            yield f"the output {name!r} of site {site} does not come from our nodes"
        handed_out = record.joint is not None and name in record.joint.outputs  # nodes of the base may read the base's
        leaks = not handed_out and any(SITE_KEY not in node.metadata_props for node in own.consumers())
        if leaks or own.is_graph_output():
            yield f"the uncorrected output of site {site} is used by the model"


def conditionals_are_declared(model: ir.Model, record: PatchRecord) -> Iterator[str]:
    """A branchless patch adds no `If`; a conditional one only those that change nothing where nothing is flagged."""
    for node in _ours(_as_woven(model)):
        if node.op_type != "If" or node.metadata_props[SITE_KEY] == AGAIN:  # the base's own, once more
            continue
        if record.emission != Emission.CONDITIONAL:
            yield f"the node {node.name!r} is an If in a {record.emission} patch"
        otherwise = node.attributes["else_branch"].as_graph()
        if {inner.op_type for inner in otherwise} != {"Identity"}:
            yield f"the node {node.name!r} does more than pass its values on where nothing is flagged"


def functions_are_known(model: ir.Model, record: PatchRecord) -> Iterator[str]:
    """Every call of our domain has its function in the file, and no function is left over."""
    called = {node.op_identifier() for node in model.graph.all_nodes() if node.domain == DOMAIN}
    present = {identifier for identifier in model.functions if identifier[0] == DOMAIN}
    for identifier in called ^ present:
        yield f"the function {identifier[1]} is " + ("called and missing" if identifier in called else "never called")


def onnx_accepts_it(model: ir.Model, record: PatchRecord) -> Iterator[str]:
    """Onnx's own checker finds nothing: types, order, single assignment. Weights are not looked at.

    It knows no operators that a runtime added to onnx's own domain (onnxruntime's fusions do), and refuses outputs
    without a shape, which runtimes take; such a model is spared.
    """
    missing = graphs.undefined_value(model)
    if missing is not None:
        yield f"the value {missing!r} is used before it is there"
        return
    foreign = any(node.domain == "" and not onnx.defs.has(node.op_type) for node in model.graph.all_nodes())
    if foreign or any(output.shape is None for output in model.graph.outputs):
        return
    try:
        onnx.checker.check_model(graphs.skeleton(model))
    except (onnx.checker.ValidationError, ValueError) as error:
        yield f"onnx's checker says: {error}"


RULES: tuple[Callable[[ir.Model, PatchRecord], Iterator[str]], ...] = (
    names_are_ours,
    names_are_unique,
    monitors_come_last,
    outputs_are_corrected,
    conditionals_are_declared,
    functions_are_known,
    onnx_accepts_it,
)
