"""Find the values of a graph."""

from collections.abc import Iterator

import onnx_ir as ir

from atpatch_onnx.errors import BakeError


def find_value(graph: ir.Graph, name: str) -> ir.Value:
    """The value of this name among a graph's inputs, weights and node outputs.

    Raises:
        BakeError: There is none.
    """
    for value in graph_values(graph):
        if value.name == name:
            return value
    raise BakeError(
        name,
        expected="a value of this name in the graph",
        found="none",
        advice="Find the sites of this very model again: it changed since.",
    )


def graph_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """The inputs, weights and node outputs of a graph, its subgraphs left out."""
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs
