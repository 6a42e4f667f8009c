"""What every patched graph must obey, as a list of rules; a rule answers what breaks it.

`bake` runs them as its postcondition, `verify` on whatever file it is given.
"""

from collections.abc import Callable, Iterator

import onnx
import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.metadata import PatchRecord, read_record
from atpatch_onnx.errors import InvariantError, UnbakeError
from atpatch_onnx.graph.insertion import replaced_value
from atpatch_onnx.graph.names import PREFIX, REPLACES_KEY, SITE_KEY


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


def replacements_are_read(model: ir.Model, record: PatchRecord) -> Iterator[str]:
    """What stands in for a value of the base is declared and read in its place; what a site names is replaced."""
    replaced = set()
    names = {node.metadata_props[REPLACES_KEY] for node in model.graph if REPLACES_KEY in node.metadata_props}
    declared = {site.site for site in record.sites if site.redistributes} | {layer.scope for layer in record.layers}
    for node in (node for node in model.graph if REPLACES_KEY in node.metadata_props):
        value = replaced_value(node)
        if SITE_KEY not in node.metadata_props or value is None:
            yield f"the node {node.name!r} stands in for {node.metadata_props[REPLACES_KEY]!r} and does not read it"
            continue
        replaced.add(node.metadata_props[REPLACES_KEY])
        if node.metadata_props[SITE_KEY] not in declared:
            yield f"the file does not say that {node.name!r} stands in for a value"
        result = node.outputs[0]
        unread = all(SITE_KEY in use.node.metadata_props for use in result.uses()) and not result.is_graph_output()
        if unread and result.name not in names:
            yield f"nothing of the base reads {result.name!r}, which stands in for {value.name!r}"
        others = any(SITE_KEY not in reader.metadata_props for reader in value.consumers())
        if value.is_graph_output() and not others:
            yield f"the value {value.name!r}, which {node.name!r} stands in for, is an output of the model"
    for site in record.sites:
        for name in {site.key, site.value} - replaced if site.redistributes else ():
            yield f"nothing stands in for {name!r} at site {site.site}"


def conditionals_are_declared(model: ir.Model, record: PatchRecord) -> Iterator[str]:
    """There is no `If` of the patch but in a file that says so, and each changes nothing where nothing is flagged."""
    for node in _ours(model):
        if node.op_type != "If":
            continue
        if not record.conditional:
            yield f"the node {node.name!r} is an If in a file that says it has none of ours"
        otherwise = node.attributes["else_branch"].as_graph()
        if [inner.op_type for inner in otherwise] != ["Identity"]:
            yield f"the node {node.name!r} does more than pass its value on where nothing is flagged"


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
    replacements_are_read,
    conditionals_are_declared,
    onnx_accepts_it,
)
