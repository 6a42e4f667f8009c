"""Two graphs in one file: a decoder for prompts and one for steps, merged under an `If` that an input decides.

    branches  ->  branch: each as a model by itself  ->  whatever is to be changed  ->  joined: both in one file again

What a branch captures, it shares with the other one: weights and inputs of the file. What a change adds, stays in its
branch. The metadata of a changed branch are those of its graph, so that it can be taken out again.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from atpatch_onnx.graph.parts import copy

_NAMES = ("then_branch", "else_branch")


@dataclass(frozen=True)
class Branches:
    """The attributes of the `If` that hold the two graphs."""

    begins: str
    """The one that reads fewer inputs of the model: nothing was read before."""

    goes_on: str
    """The one that goes on from a cache."""

    switch: str
    """The input that says which is to run: true for `then_branch`."""

    def __iter__(self) -> Iterator[str]:
        return iter((self.begins, self.goes_on))


def branches(model: ir.Model) -> Branches | None:
    """The two graphs that a model is made of; None where it is a graph like others.

    That is: its only node is an `If`, which an input decides; one branch reads more inputs than the other, its cache,
    and what it reads alone comes out again, beside something else.
    """
    node = model.graph.node(0) if len(model.graph) == 1 else None
    if node is None or node.op_type != "If" or node.domain != "" or set(node.attributes) != set(_NAMES):
        return None
    switch = node.inputs[0]
    if switch is None or not switch.is_graph_input() or list(model.graph.outputs) != list(node.outputs):
        return None
    read = {name: {str(value.name) for value in branch(model, name).graph.inputs} for name in _NAMES}
    begins, goes_on = sorted(_NAMES, key=lambda name: len(read[name]))
    if len(read[begins]) == len(read[goes_on]) or len(node.outputs) <= len(read[goes_on] - read[begins]):
        return None
    return Branches(begins, goes_on, str(switch.name))


def beginning(model: ir.Model) -> ir.Model:
    """The graph that a model of two begins with, as a model by itself; any other model as it is."""
    two = branches(model)
    return model if two is None else branch(model, two.begins)


def branch(model: ir.Model, name: str) -> ir.Model:
    """One branch as a model by itself: a copy, with the inputs and weights that it reads. Weights are shared."""
    whole = copy(model)
    node = whole.graph.node(0)
    within = _graph(node, name)
    outputs, nodes, weights = list(within.outputs), list(within), list(within.initializers.values())
    metadata = dict(within.metadata_props)
    within.outputs.clear()
    within.remove(nodes)
    for value in weights:
        within.initializers.pop(str(value.name))
    whole.graph.outputs.clear()
    for other in _NAMES:  # what is left of it is read by nobody, and reads nothing
        _let_go(_graph(node, other))
    whole.graph.remove(node, safe=True)
    whole.graph.extend(nodes)
    for value in weights:
        whole.graph.register_initializer(value)
    whole.graph.outputs.extend(outputs)
    _drop_unread(whole.graph)
    whole.metadata_props.clear()
    whole.metadata_props.update(metadata)
    return whole


def joined(model: ir.Model, changed: Mapping[str, ir.Model]) -> ir.Model:
    """A copy of a model of two graphs with others in their places.

    Args:
        model: The model.
        changed: For each branch a changed copy of what `branch` gives, the one after whose outputs new ones are named
            first. Both have as many outputs, in one order.

    Raises:
        ValueError: One has more than the other.
    """
    whole = copy(model)
    node = whole.graph.node(0)
    for name, one in changed.items():
        _fill(_graph(node, name), copy(one), whole.graph)
    outputs = [_graph(node, name).outputs for name in changed]
    if len({len(ones) for ones in outputs}) > 1:
        raise ValueError("one branch has more outputs than the other")
    _hand_out(whole.graph, node, outputs[0])
    return whole


def _fill(place: ir.Graph, model: ir.Model, outer: ir.Graph) -> None:
    """Put the nodes of a model into a branch; what the outer graph has is captured from there."""
    source = model.graph
    outputs, nodes, own = list(source.outputs), list(source), set(place.initializers)
    place.outputs.clear()
    _let_go(place)
    place.remove(list(place))
    place.initializers.clear()
    outside = {str(value.name): value for value in (*outer.inputs, *outer.initializers.values())}
    given = [*source.inputs, *(value for name, value in source.initializers.items() if name not in own)]
    for value in given:
        if value.name in outside:
            value.replace_all_uses_with(outside[value.name])
    source.outputs.clear()
    source.remove(nodes)
    place.extend(nodes)
    for name, value in list(source.initializers.items()):
        if name in own or name not in outside:
            source.initializers.pop(name)
            place.register_initializer(value)
    place.outputs.extend(outputs)
    place.metadata_props.clear()
    place.metadata_props.update(model.metadata_props)


def _hand_out(graph: ir.Graph, node: ir.Node, wanted: Sequence[ir.Value]) -> None:
    """Let the `If` and the graph have as many outputs as the branches."""
    before = len(node.outputs)
    del graph.outputs[len(wanted) :]
    node.resize_outputs(len(wanted))
    for value, inner in zip(node.outputs[before:], wanted[before:], strict=True):
        value.name, value.type, value.shape = inner.name, inner.type, inner.shape
        graph.outputs.append(value)


def _let_go(graph: ir.Graph) -> None:
    """Let the nodes of a graph read nothing: they would stay users of what is around it."""
    for node in graph.all_nodes():
        for index in range(len(node.inputs)):
            node.replace_input_with(index, None)


def _graph(node: ir.Node, name: str) -> ir.Graph:
    return node.attributes[name].as_graph()


def _drop_unread(graph: ir.Graph) -> None:
    """Take away inputs and weights that only the other branch reads."""
    read = {value for node in graph.all_nodes() for value in node.inputs} | {*graph.outputs}
    for name in [name for name, value in graph.initializers.items() if value not in read]:
        graph.initializers.pop(name)
    for value in [value for value in graph.inputs if value not in read]:
        graph.inputs.remove(value)
