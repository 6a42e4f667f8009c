"""The second pass of a joint decision: what is behind the redistributing sites, once more, and the choice.

    base  ->  a copy of every node from the sites' products on, weights shared (`repeat`)
    ->  outputs of the copy where a sample is flagged, of the base elsewhere (`choose`)
    ->  the copy moved into an `If` that runs only when something is flagged (`fold`)

`unfold` is the reverse of `fold`: the same nodes in the main graph, where their values can be looked at.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.errors import BakeError
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.graph.names import AGAIN, SCOPE, SITE_KEY, again, base_name, output_scope, own_name
from atpatch_onnx.graph.values import find_value, graph_values

_IF = own_name(SCOPE, "if_flagged")


def repeat(model: ir.Model, names: Iterable[str]) -> frozenset[str]:
    """Append a copy of each node that computes one of these values, and of all that the outputs depend on behind it.

    Returns:
        The names of the values that have a copy, which is named as `again` says.
    """
    twin = graphs.copy(model)
    first = {find_value(twin.graph, name).producer() for name in names}
    wanted = needed(twin.graph.outputs, twin.graph)
    nodes: list[ir.Node] = []
    computed: set[ir.Value] = set()
    for node in twin.graph:
        if node in wanted and (node in first or any(value in computed for value in read(node))):
            nodes.append(node)
            computed.update(node.outputs)
    repeated = frozenset(value.name for value in computed if value.name)
    shared = {value.name: value for value in graph_values(model.graph)}
    for part in (part for node in nodes for part in (node, *_inside(node))):
        for index, value in enumerate(part.inputs):
            if value is not None and value.graph is twin.graph and value not in computed:
                part.replace_input_with(index, shared[value.name])
    twin.graph.outputs.clear()
    twin.graph.remove(nodes)
    model.graph.extend(nodes)
    taken = {node.name for node in twin.graph.all_nodes()} | {node.name for node in nodes}
    for node in nodes:
        _name_again(node, taken)
    return repeated


def needed(values: Iterable[ir.Value], graph: ir.Graph) -> set[ir.Node]:
    """The nodes of a graph that some of these values depend on."""
    found = {value.producer() for value in values}
    for node in reversed(graph):
        if node in found:
            found.update(value.producer() for value in read(node))
    return {node for node in found if node is not None}


def _name_again(node: ir.Node, taken: set[str | None]) -> None:
    """Name a copied node, and whatever its subgraphs hold, as of the second pass; `taken` are names of nodes."""
    for part in (node, *_inside(node)):
        wanted = part.name or f"{part.op_type}_{part.outputs[0].name}"
        while not part.name and wanted in taken:
            wanted += "_"
        taken.add(wanted)
        part.name = again(wanted)
        part.metadata_props[SITE_KEY] = AGAIN
        for value in part.outputs:
            _rename(value)
    for graph in _subgraphs(node):
        for value in (*graph.inputs, *graph.initializers.values()):
            _rename(value)


def _rename(value: ir.Value) -> None:
    if value.name and not value.name.startswith(f"{AGAIN}/"):
        tensor, value.const_value = value.const_value, None  # shared with the base, and would be renamed with the value
        value.name = again(value.name)
        value.const_value = tensor


def read(node: ir.Node) -> Iterator[ir.Value]:
    """Everything that a node reads, subgraphs included."""
    for part in (node, *_inside(node)):
        yield from (value for value in part.inputs if value is not None)


def _inside(node: ir.Node) -> Iterator[ir.Node]:
    for graph in _subgraphs(node):
        yield from graph


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """The subgraphs of a node, and theirs."""
    for attribute in node.attributes.values():
        for graph in graphs.subgraphs(attribute):
            yield graph
            for inner in graph:
                yield from _subgraphs(inner)


@dataclass(frozen=True)
class Choice:
    """One output of the model in both passes."""

    first: ir.Value
    chosen: ir.Value
    """The second pass's where a sample is flagged, the first's elsewhere."""


def choose(
    model: ir.Model, repeated: frozenset[str], sampled: ir.Value, by_sample: frozenset[str]
) -> tuple[Choice, ...]:
    """Choose between the passes, output by output and sample by sample.

    An unflagged sample keeps the base's bits whatever kernels the second pass takes. An output that has its samples
    elsewhere, or none, is the second pass's.

    Args:
        model: The model, with the second pass at its end.
        repeated: What `repeat` answered.
        sampled: Whether a sample is flagged, bool `[samples, 1]`.
        by_sample: Names of the outputs with the samples on their first axis.

    Raises:
        BakeError: An output cannot be exchanged: it is a value that neuron edits changed, or one in half precision that
            the model reads as well, which onnxruntime rounds only where it is handed out.
    """
    at = Insertion(model.graph, SCOPE)
    choices = []
    for number, first in enumerate(dict.fromkeys(value for value in model.graph.outputs if value.name in repeated)):
        _require_exchangeable(first)
        second = find_value(model.graph, again(first.name or ""))
        if first.name not in by_sample or first.shape is None:
            chosen = at.op("Identity", second, name=f"{number}/second")
        else:
            rank = len(first.shape)
            shape = at.constant(f"rank_{rank}", np.array([-1, *[1] * (rank - 1)], np.int64))
            flagged = at.op("Reshape", sampled, shape, name=f"{number}/flagged")
            chosen = _selected(at, flagged, second, first, f"{number}/chosen")
        chosen.shape, chosen.type = first.shape, first.type
        choices.append(Choice(first, chosen))
    return tuple(choices)


def _require_exchangeable(output: ir.Value) -> None:
    producer = output.producer()
    edited = producer is not None and SITE_KEY in producer.metadata_props
    halves = output.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    if edited or (halves and any(SITE_KEY not in node.metadata_props for node in output.consumers())):
        raise BakeError(
            f"the output {output.name}",
            expected="one that a second pass can stand in for",
            found="hidden units that are edited" if edited else "one in half precision that the model itself reads",
            advice="Fit a patch whose sites decide alone (--decision alone).",
        )


_SELECTABLE = {
    ir.DataType[name] for name in ("FLOAT", "DOUBLE", "FLOAT16", "INT8", "UINT8", "INT32", "INT64", "STRING")
}
"""What onnxruntime's Where takes on the CPU."""


def _selected(at: Insertion, flagged: ir.Value, second: ir.Value, first: ir.Value, name: str) -> ir.Value:
    """The second pass's where flagged, the first's elsewhere, of any type."""
    if first.dtype is None or first.dtype in _SELECTABLE:
        return at.op("Where", flagged, second, first, name=name)
    wide = ir.DataType.FLOAT if first.dtype.is_floating_point() else ir.DataType.INT64
    to = [ir.AttrInt64("to", wide)]
    passes = [at.op("Cast", one, name=f"{name}/{one.name}", attributes=to) for one in (second, first)]
    return at.op("CastLike", at.op("Where", flagged, *passes, name=f"{name}/wide"), first, name=name)


def fold(model: ir.Model, first: ir.Node, condition: ir.Value, choices: Sequence[Choice]) -> tuple[Choice, ...]:
    """Move `first` and every node behind it into an `If` that hands the base's outputs on where `condition` is not."""
    nodes = list(model.graph)
    nodes = nodes[nodes.index(first) :]
    model.graph.remove(nodes)
    then = ir.Graph([], [choice.chosen for choice in choices], nodes=nodes, name=f"{_IF}/then")
    otherwise = ir.Graph([], [], nodes=[], name=f"{_IF}/else")
    at = Insertion(otherwise, f"{SCOPE}/if_flagged/else")
    for number, choice in enumerate(choices):
        otherwise.outputs.append(at.op("Identity", choice.first, name=str(number)))
        otherwise.outputs[-1].shape, otherwise.outputs[-1].type = choice.first.shape, choice.first.type
    branches = [ir.AttrGraph("then_branch", then), ir.AttrGraph("else_branch", otherwise)]
    node = ir.Node("", "If", [condition], branches, num_outputs=len(choices), name=_IF)
    node.metadata_props[SITE_KEY] = SCOPE
    model.graph.append(node)
    for choice, result in zip(choices, node.outputs, strict=True):
        result.name = f"{choice.chosen.name}/folded"
        result.shape, result.type = choice.first.shape, choice.first.type
    return tuple(Choice(choice.first, result) for choice, result in zip(choices, node.outputs, strict=True))


def unfold(model: ir.Model) -> None:
    """Put what `fold` moved back into the main graph, in place; nothing where it moved nothing."""
    folded = next((node for node in model.graph if node.name == _IF and node.op_type == "If"), None)
    if folded is None:
        return
    then = folded.attributes["then_branch"].as_graph()
    results, nodes = list(then.outputs), list(then)
    then.outputs.clear()
    then.remove(nodes)
    model.graph.insert_before(folded, nodes)
    for old, new in zip(list(folded.outputs), results, strict=True):
        name, old.name = old.name, f"{new.name}/folded"
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        new.name = name
    model.graph.remove(folded, safe=True)


def hand_out(model: ir.Model, choices: Sequence[Choice]) -> tuple[str, ...]:
    """Let the model's outputs be what was chosen, under their own names; the names.

    Nodes of the base that read such an output go on reading the base's own.
    """
    names = []
    for number, choice in enumerate(choices):
        names.append(choice.first.name or "")
        choice.first.name = base_name(output_scope(number))
        choice.chosen.name = names[-1]
        for index, output in enumerate(model.graph.outputs):
            if output is choice.first:
                model.graph.outputs[index] = choice.chosen
    return tuple(names)
