"""Prove on a graph that entries of its inputs decide nothing of its outputs: no path leads from one to the other.

The graph is walked once for every source. Of each value it is told which of its entries may depend on that source
(`measuring.path_rules`), for any number of samples and whatever else the inputs hold; what an operator without a rule
makes of a source is taken to depend on it everywhere. So an output that is not reached does not depend on the source,
and of one that is reached it is only said that no proof was found.

A residual stream does no harm here: what a token adds to itself reaches its own entries, and these are a path where
something reads them, such as a mean over all tokens.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx import graph as graphs
from atpatch_onnx.measuring.path_rules import follow
from atpatch_onnx.measuring.path_values import Sizes, Told, UnfollowedError, constant, everywhere, nowhere, plain

SHOWN = 3
"""Nodes of a path that are named at either end."""


@dataclass(frozen=True)
class Reach:
    """What a source reaches."""

    outputs: tuple[str, ...]
    """Outputs that may depend on it."""

    path: tuple[str, ...]
    """Names of nodes from the source to the first of them."""

    unfollowed: str | None
    """The first node of the path whose operator has no rule, with the operator."""

    nodes: int
    """How many nodes were walked."""

    def __str__(self) -> str:
        """Why there is no proof, or that there is one."""
        if not self.outputs:
            return f"no path leads to any of the outputs, by {self.nodes} nodes"
        named = self.path if len(self.path) <= 2 * SHOWN else (*self.path[:SHOWN], "...", *self.path[-SHOWN:])
        way = f"a path leads to {self.outputs[0]}, by {', '.join(named) or 'no node'}"
        if self.unfollowed is None:
            return way
        return f"it cannot be told whether a path leads to {self.outputs[0]}: {self.unfollowed} is not followed"


Shapes = Mapping[str, tuple[int | str | None, ...]]


def reach(model: ir.Model, sources: Mapping[str, NDArray[np.bool_]], shapes: Shapes | None = None) -> Reach:
    """Follow what some entries of the inputs hold.

    Args:
        model: The model; its nodes stand in an order in which values are there before they are used.
        sources: Which entries, by input: bool, of the input's shape with 1 for the samples.
        shapes: What `inferred` says of the model, where it was asked before.
    """
    walk = walked(model, sources, shapes)
    outputs = tuple(str(value.name) for value in model.graph.outputs if not walk.of(value).clean)
    path = walk.path(outputs[0]) if outputs else []
    unfollowed = next((f"{_name(node)} ({node.op_type})" for node in path if node in walk.unfollowed), None)
    return Reach(outputs, tuple(_name(node) for node in path), unfollowed, walk.count)


def inferred(model: ir.Model) -> Shapes:
    """Shapes by onnx's own inference, from the inputs and weights alone: what a file declares within proves nothing."""
    bare = graphs.skeleton(model)
    del bare.graph.value_info[:]
    return graphs.infer_shapes(model, bare)


def walked(model: ir.Model, sources: Mapping[str, NDArray[np.bool_]], shapes: Shapes | None = None) -> "Walk":
    """What is told of every value of a model; arguments as in `reach`."""
    walk = Walk(model, inferred(model) if shapes is None else shapes)
    for value in model.graph.inputs:
        name = str(value.name)
        if name in walk.told:
            continue  # a weight that is among the inputs as well
        sizes = walk.declared(value.shape)
        source = sources.get(name)
        if source is None or not source.any():
            walk.told[name] = nowhere(sizes)
        elif sizes is None or len(sizes) != source.ndim:
            walk.told[name] = everywhere(sizes)
        else:
            walk.told[name] = Told(sizes, np.broadcast_to(source, plain(sizes)))
    walk.nodes(model.graph)
    return walk


class Walk:
    """What is told of the values so far, while nodes are walked."""

    def __init__(self, model: ir.Model, shapes: Shapes) -> None:
        self.told: dict[str, Told] = {}
        self.unfollowed: set[ir.Node] = set()
        self.count = 0
        self._samples = next((name for value in model.graph.inputs if (name := _free(value.shape)) is not None), None)
        self._shapes = shapes
        self._by: dict[str, ir.Node] = {}
        self._weights(model.graph)

    def declared(self, shape: Iterable[object] | None) -> Sizes | None:
        """A shape of numbers and of the number of samples; None where it has other sizes, or they are not known."""
        found = [size.value if isinstance(size, ir.SymbolicDim) else size for size in shape or ()]
        if shape is None or any(not isinstance(size, int) and size != self._samples for size in found):
            return None
        if any(size is None or size == self._samples for size in found[1:]):
            return None  # only the first axis is one of samples
        return tuple(size if isinstance(size, int) else None for size in found)

    def of(self, value: ir.Value) -> Told:
        """What is told of a value."""
        return self.told[str(value.name)]

    def nodes(self, graph: ir.Graph) -> None:
        """Walk a graph, or the branch of an `If` whose condition is constant."""
        for node in graph:
            self.count += 1
            branch = self._taken(node)
            if branch is not None:
                self._weights(branch)
                self.nodes(branch)
                results = [self.of(value) for value in branch.outputs]
            else:
                results = self._results(node)
            for value, result in zip(node.outputs, results, strict=False):
                self.told[str(value.name)] = result
                self._by[str(value.name)] = node

    def path(self, output: str) -> list[ir.Node]:
        """Nodes from a source to this output, by the values of which most is reached: not along a residual stream."""
        found: list[ir.Node] = []
        name: str | None = output
        while name is not None and name in self._by:
            node = self._by[name]
            found.append(node)
            reached = {read: self.told[read].reached.mean() for read in _read(node) if read in self.told}
            name = max((read for read in reached if reached[read] > 0), key=reached.__getitem__, default=None)
        return found[::-1]

    def _results(self, node: ir.Node) -> list[Told]:
        operands = [None if value is None else self.of(value) for value in node.inputs]
        if not any(attribute.type in _GRAPHS for attribute in node.attributes.values()):
            try:
                return follow(node, operands)
            except (
                UnfollowedError,
                ValueError,
                IndexError,
            ):  # shapes that no runtime would take are not followed either
                pass
        clean = all(self.told[name].clean for name in _read(node) if name in self.told)
        if not clean:
            self.unfollowed.add(node)
        sizes = [self.declared(self._shapes.get(str(value.name))) for value in node.outputs]
        return [nowhere(one) if clean else everywhere(one) for one in sizes]

    def _taken(self, node: ir.Node) -> ir.Graph | None:
        """The branch of an `If` that every input takes."""
        condition = self.of(node.inputs[0]) if node.op_type == "If" and node.inputs[0] is not None else None
        if condition is None or condition.known is None or condition.known.size != 1:
            return None
        return node.attributes["then_branch" if condition.known.item() else "else_branch"].as_graph()

    def _weights(self, graph: ir.Graph) -> None:
        for name, value in graph.initializers.items():
            tensor = value.const_value
            if tensor is None:
                continue
            small = tensor.size <= _SMALL
            sizes = tuple(size for size in tensor.shape if isinstance(size, int))
            self.told[name] = constant(tensor.numpy()) if small else nowhere(sizes)


_SMALL = 4096
"""Weights of more elements are not read."""

_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _free(shape: ir.Shape | None) -> str | None:
    """The name of the first size, where it is free."""
    size = shape[0] if shape is not None and len(shape) else None
    return size.value if isinstance(size, ir.SymbolicDim) else None


def _read(node: ir.Node) -> list[str]:
    """Names of all that a node reads, its branches included."""
    names = [str(value.name) for value in node.inputs if value is not None]
    for attribute in node.attributes.values():
        graphs_in = [attribute.as_graph()] if attribute.type is ir.AttributeType.GRAPH else []
        graphs_in += attribute.as_graphs() if attribute.type is ir.AttributeType.GRAPHS else []
        names += [name for graph in graphs_in for inner in graph.all_nodes() for name in _read_by(inner)]
        names += [str(value.name) for graph in graphs_in for value in graph.outputs]
    return names


def _read_by(node: ir.Node) -> list[str]:
    return [str(value.name) for value in node.inputs if value is not None]


def _name(node: ir.Node) -> str:
    return node.name or str(node.outputs[0].name)
