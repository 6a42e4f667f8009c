"""Shapes of a graph's values, also where the exporter left them unknown.

onnx's inference loses a symbolic dimension in the shape arithmetic of a TorchScript export (Shape, Gather, Concat,
Reshape). There the graph is inferred twice with numbers in place of the symbols, node by node, computing the shape
arithmetic on the way; what two different trials agree on is static, what follows a symbol has its name.
"""


import onnx_ir as ir

from atpatch_onnx.sites import Dim


def infer(model: ir.Model) -> dict[str, tuple[Dim, ...]]:
    """Shapes by value name: sizes, names of the inputs' symbols or simple expressions of them, or None."""
    found = {name: tuple(map(_number, shape)) for name, shape in _onnx_shapes(model).items()}
    symbols = _Symbols.of(model, found)
    known = {name: tuple(symbols.own(size) for size in shape) for name, shape in found.items()}
    if (symbols.names and any(None in shape for shape in known.values())) or len(known) < _values(model):
        first, second, symbols = _trials(model, found, symbols)
        for name in first.keys() & second.keys():
            if len(first[name]) == len(second[name]):
                old = known.get(name, ())
                new = tuple(symbols.name(a, b) for a, b in zip(first[name], second[name], strict=True))
                known[name] = _merged(new, old)
    return known


def _merged(new: tuple[Dim, ...], old: tuple[Dim, ...]) -> tuple[Dim, ...]:
    if len(old) != len(new):
        return new
    return tuple(b if a is None else a for a, b in zip(new, old, strict=True))


def _values(model: ir.Model) -> int:
    return sum(1 for node in model.graph for value in node.outputs if value.name)
