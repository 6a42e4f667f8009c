"""Functions of a model call each other in one way: each once, none an operator's, in no circle, and to an end.

A runtime puts a function's nodes in place of each call. Where functions call others twice each, a file of a few
kilobytes has more nodes than fit into memory.
"""

from collections.abc import Iterable, Iterator, Mapping

import onnx

from atpatch_onnx.graph.one_schema import Refusal

MOST_NODES = 200_000
"""Nodes that the calls of a model may unfold to; the largest models that are known have some 50,000."""

MOST_DEEP = 50
"""Functions within each other: shape inference uses the stack for each."""

_OVERLOADS = 10
"""The IR version that brought overloads; older readers do not look at them."""

Identifier = tuple[str, str, str]
"""Domain, name, overload."""


def domain(name: str) -> str:
    """A domain under one name: `ai.onnx` is another one for that of the operators."""
    return "" if name == "ai.onnx" else name


def nodes_within(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes and those of their subgraphs."""
    for node in nodes:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes_within(attribute.g.node)
            for graph in attribute.graphs:
                yield from nodes_within(graph.node)


def check_calls(model: onnx.ModelProto, refusal: Refusal) -> None:
    """Refuse functions that shadow operators or each other, call themselves, or unfold to very many nodes.

    Raises:
        Exception: What `refusal` makes.
    """
    functions: dict[Identifier, onnx.FunctionProto] = {}
    for function in model.functions:
        key = domain(function.domain), function.name, function.overload
        where = f"the function {'::'.join(key[:2])!r}"
        if is_reserved(key[0]):
            raise refusal(where, "functions in separate domains", "one in a domain of operators, which it shadows")
        if key in functions:
            raise refusal(where, "each function once", "two of this domain, name and overload")
        if function.overload and model.ir_version < _OVERLOADS:
            raise refusal(where, f"no overloads before IR version {_OVERLOADS}", f"IR version {model.ir_version}")
        functions[key] = function
    for node in nodes_within(node for part in (model.graph, *model.functions) for node in part.node):
        if node.overload and _identifier(node) not in functions:
            raise refusal(f"node {node.name!r}", "an overload that a function has", f"the overload {node.overload!r}")
    _check_unfolding(model.graph, functions, refusal)


def is_reserved(name: str) -> bool:
    """Whether a domain belongs to operators of ONNX or of onnxruntime."""
    return name == "" or name.split(".")[0:2] in (["ai", "onnx"], ["com", "microsoft"], ["com", "ms"])


def _identifier(node: onnx.NodeProto) -> Identifier:
    return domain(node.domain), node.op_type, node.overload


def _check_unfolding(
    graph: onnx.GraphProto, functions: Mapping[Identifier, onnx.FunctionProto], refusal: Refusal
) -> None:
    if not functions:
        return
    calls = {key: [_identifier(node) for node in nodes_within(body.node)] for key, body in functions.items()}
    measured: dict[Identifier, tuple[int, int]] = {}

    def measure(key: Identifier, above: tuple[Identifier, ...] = ()) -> tuple[int, int]:
        """Nodes that a function unfolds to, and functions within each other; each function is looked at once."""
        where = f"the function {'::'.join(key[:2])!r}"
        if key in above:
            raise refusal(where, "functions that end", "one that calls itself")
        if key not in measured:
            inner = [measure(called, (*above, key)) for called in calls[key] if called in calls]
            nodes = len(calls[key]) - len(inner) + sum(one for one, _ in inner)
            measured[key] = nodes, 1 + max((deep for _, deep in inner), default=0)
        nodes, deep = measured[key]
        if nodes > MOST_NODES:
            raise refusal(where, f"calls that unfold to at most {MOST_NODES} nodes", f"{nodes} nodes")
        if len(above) + deep > MOST_DEEP:
            raise refusal(where, f"at most {MOST_DEEP} functions within each other", "more")
        return measured[key]

    for key in functions:
        measure(key)
    called = [key for node in nodes_within(graph.node) if (key := _identifier(node)) in functions]
    total = sum(measured[key][0] for key in called)
    if total > MOST_NODES:
        raise refusal("the functions", f"calls that unfold to at most {MOST_NODES} nodes", f"{total} nodes")
