"""Shapes of a graph's values, also where the exporter left them unknown.

onnx's inference loses symbolic dimensions in the shape arithmetic of a TorchScript export (Shape, Gather, Concat,
Reshape). There the graph is inferred twice more with numbers in place of symbols: what two trials agree on is static,
what follows a symbol, a sum or a multiple of symbols is named so, and other sizes that depend on the input get a name
of their own (`size_149_349`), so that equal sizes are known to be equal; `told` answers what people are told of these.
"""

import ast
import itertools
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import onnx
import onnx_ir as ir

from atpatch_onnx import graph
from atpatch_onnx.matching import sized_shapes, tokenizers
from atpatch_onnx.matching.sites import Dim

Shapes = dict[str, tuple[Dim, ...]]


@dataclass(frozen=True)
class Inferred:
    """Shapes by value name."""

    shapes: Shapes
    """Sizes, symbols of the model's inputs, simple expressions of them, or None."""

    sizes: dict[str, tuple[int, ...]]
    """The same in numbers, of values whose every size is known once numbers stand for the symbols."""

    declared: Shapes
    """What onnx's own inference says, and so any runtime's: fewer sizes, none of them from a trial."""


def infer(model: ir.Model) -> Inferred:
    """The shapes of the main graph's values."""
    symbols = _symbols(model)
    bare = graph.skeleton(model)
    inferred = graph.infer_shapes(model, bare)
    known = {name: tuple(_own(size, symbols) for size in shape) for name, shape in inferred.items()}
    declared = dict(known)
    numbers = {symbol.name: symbol.first for symbol in symbols}
    if _incomplete(model, known):
        first, second, symbols = _trials(bare, symbols)
        for name, shape in _compared(first.shapes, second.shapes, symbols).items():
            old = known.get(name, ())
            if len(old) != len(shape):
                old = (None,) * len(shape)
            known[name] = tuple(b if a is None else a for a, b in zip(shape, old, strict=True))
        found = first.shapes
    else:
        found = {name: tuple(_number(size, numbers) for size in shape) for name, shape in known.items()}
    sizes = {name: tuple(size for size in shape if size is not None) for name, shape in found.items()}
    whole = {name: shape for name, shape in sizes.items() if len(shape) == len(found[name])}
    return Inferred(known, whole, declared)


def _number(size: Dim, numbers: Mapping[str, int]) -> int | None:
    """What a size is with these numbers for its symbols: exporters write sums, products and quotients of symbols."""
    if not isinstance(size, str):
        return size
    if size in numbers:
        return numbers[size]
    try:
        result = _evaluate(ast.parse(size, mode="eval").body, numbers)
    except (SyntaxError, KeyError, ZeroDivisionError, RecursionError):
        return None
    return result if result > 0 else None


_ARITHMETIC: Mapping[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
    ast.Mod: operator.mod,
}


def _evaluate(node: ast.expr, numbers: Mapping[str, int]) -> int:
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return numbers[node.id]
    if isinstance(node, ast.BinOp):
        return _ARITHMETIC[type(node.op)](_evaluate(node.left, numbers), _evaluate(node.right, numbers))
    raise KeyError(ast.dump(node))


@dataclass(frozen=True)
class _Symbol:
    """A symbolic dimension of the inputs with the numbers that stand for it in the two trials."""

    name: str
    first: int
    second: int


_Symbols = tuple[_Symbol, ...]


def _symbols(model: ir.Model) -> _Symbols:
    found: dict[str, _Symbol] = {}
    for value in model.graph.inputs:
        continuous = value.dtype is not None and value.dtype.is_floating_point()
        for axis, size in enumerate(value.shape or ()):
            name = None if isinstance(size, int) else size.value
            if name is None or name.isdecimal() or name in found:
                continue
            found[name] = _Symbol(name, *_numbers(axis, len(value.shape or ()) if continuous else 0, found))
    for node in model.graph:
        name = tokenizers.length_of(node.op_type, str(node.outputs[0].name)) if node.domain and node.outputs else None
        if name is not None:
            count = len(found)
            found[name] = _Symbol(name, 7 + 4 * count, 10 + 9 * count)  # short: learned positions may be few
    return tuple(found.values())


def _numbers(axis: int, rank: int, found: Mapping[str, _Symbol]) -> tuple[int, int]:
    """Numbers for the next symbol, such that no sum, difference or multiple of them is another's.

    The first axes of all inputs are taken for one batch. Lengths of waves and sides of images (continuous inputs, of
    the given rank) have to survive strides and patches; tokens have to stay below the number of learned positions, and
    are multiples of eight for models that pool them.
    """
    count = len(found)
    if axis == 0:
        return 5, 12
    if rank > 3:
        return 96 + 32 * count, 192 + 64 * count
    if rank > 0:
        return 3200 + 1600 * count, 6400 + 4800 * count
    tokens = sum(1 for symbol in found.values() if symbol.first % 8 == 0)
    return 16 + 8 * tokens, 24 + 24 * tokens


def _own(size: Dim, symbols: _Symbols) -> Dim:
    """`size` without names that say nothing: "3" is 3, and names that no input has are unknown."""
    if not isinstance(size, str):
        return size
    if size.isdecimal() and len(size) < 10:
        return int(size)
    words = set(re.findall(r"[A-Za-z_][\w.:/]*", size))
    return size if words and words <= {symbol.name for symbol in symbols} else None


def _incomplete(model: ir.Model, known: Mapping[str, tuple[Dim, ...]]) -> bool:
    """Whether onnx's inference left some size open: at shape arithmetic, or at operators that a runtime brings."""
    names = [value.name for node in model.graph for value in node.outputs if value.name]
    return any(None in known.get(name, (None,)) for name in names)


_ATTEMPTS = 8
"""Trials to explain the conflicts of one: a graph that is wrong in itself has conflicts that nothing explains."""


def _trials(proto: onnx.ModelProto, symbols: _Symbols) -> tuple[sized_shapes.Trial, sized_shapes.Trial, _Symbols]:
    """Two trials, after the sizes that did not fit each other in a first one were made equal."""
    first = sized_shapes.run(proto, {symbol.name: symbol.first for symbol in symbols})
    for _ in symbols:
        attempts = [
            (sized_shapes.run(proto, {symbol.name: symbol.first for symbol in fewer}), fewer)
            for fewer in itertools.islice(_reconciled(first.conflicts, symbols), _ATTEMPTS)
        ]
        best = min(attempts, key=lambda one: _wrong(one[0]), default=(first, symbols))
        if _wrong(best[0]) >= _wrong(first):
            break
        first, symbols = best
    if not symbols:
        return first, first, symbols
    second = sized_shapes.run(proto, {symbol.name: symbol.second for symbol in symbols})
    for fewer in _shorter(symbols) if _wrong(second) > _wrong(first) else ():
        again, further = (
            sized_shapes.run(proto, {symbol.name: number(symbol) for symbol in fewer}) for number in (_FIRST, _SECOND)
        )
        if max(_wrong(again), _wrong(further)) <= _wrong(first):
            return again, further, fewer
    return first, second, symbols


def _wrong(trial: sized_shapes.Trial) -> tuple[int, int]:
    """How much of a trial cannot be: sizes that did not fit, then tensors of which nothing is left, as in a few."""
    return len(trial.conflicts), sum(0 in shape for shape in trial.shapes.values())


def _compared(
    first: Mapping[str, sized_shapes.Sizes], second: Mapping[str, sized_shapes.Sizes], symbols: _Symbols
) -> Shapes:
    """What two trials say together."""
    return {
        name: tuple(_named(a, b, symbols) for a, b in zip(shape, second[name], strict=True))
        for name, shape in first.items()
        if name in second and len(second[name]) == len(shape)
    }


def _reconciled(conflicts: Sequence[tuple[int, int]], symbols: _Symbols) -> Iterator[_Symbols]:
    """The symbols with two of them made one, or one made a number, for each conflict that this could explain.

    Exporters name each axis of each input, and some name axes that the graph has a fixed size for; a length that meets
    another must be the same length. A conflict of sizes that follow from symbols may be any two symbols'.
    """
    numbers = {symbol.first: symbol for symbol in reversed(symbols)}
    met = list(dict.fromkeys(conflicts))
    for one, other in met:
        if one in numbers and other in numbers:
            kept, gone = sorted((numbers[one], numbers[other]), key=symbols.index)
            yield _with_numbers(symbols, gone, kept.first, kept.second)
    yield from _shorter(symbols) if met else ()
    for kept, gone in itertools.combinations(symbols, 2) if met else ():
        yield _with_numbers(symbols, gone, kept.first, kept.second)
    for pair in met:
        for size, fixed in (pair, pair[::-1]):
            if size in numbers and fixed not in numbers:
                yield _with_numbers(symbols, numbers[size], fixed, fixed)


_FIRST, _SECOND = operator.attrgetter("first"), operator.attrgetter("second")

_SHORT = (((9, 11), (7, 10), (3, 8)), ((6, 7), (3, 6)), ((3, 4), (2, 3)))
"""Lengths in tokens for tables of few learned positions: of 12, of 8, of 4; one pair for each symbol."""

_LENGTHS = range(6, 96)
"""Numbers that stand for lengths in tokens: neither the batch nor sides of images and lengths of waves."""


def _shorter(symbols: _Symbols) -> Iterator[_Symbols]:
    """The symbols with smaller numbers for lengths in tokens, which must not exceed the number of learned positions."""
    lengths = list(dict.fromkeys(symbol.first for symbol in symbols if symbol.first in _LENGTHS))
    for pairs in _SHORT:
        if 0 < len(lengths) <= len(pairs):
            short = dict(zip(lengths, pairs, strict=False))
            yield tuple(
                replace(symbol, first=short[symbol.first][0], second=short[symbol.first][1])
                if symbol.first in short
                else symbol
                for symbol in symbols
            )


def _with_numbers(symbols: _Symbols, changed: _Symbol, first: int, second: int) -> _Symbols:
    """The symbols with other numbers for one, and for those that are one with it."""
    return tuple(
        replace(symbol, first=first, second=second) if symbol.first == changed.first else symbol for symbol in symbols
    )


def _named(first: int | None, second: int | None, symbols: _Symbols) -> Dim:
    """What is `first` in one trial and `second` in the other."""
    if first is None or second is None:
        return None
    if first == second:
        return first
    return next(_expressions(first, second, symbols), f"size_{first}_{second}")


def told(size: Dim) -> Dim:
    """A size for people: None where its name means nothing, such as `size_149_349`, or `unk__7` of other tools."""
    return None if isinstance(size, str) and re.search(r"\b(size_\d+_\d+|unk__\d+)\b", size) else size


_STRIDES = (2, 4, 8, 14, 16, 32)
"""What patches and strides divide lengths and sides of images by."""


def _expressions(first: int, second: int, symbols: _Symbols) -> Iterator[str]:
    for symbol in symbols:
        if (symbol.first, symbol.second) == (first, second):
            yield symbol.name
    for one in symbols:
        for other in symbols:
            if (one.first + other.first, one.second + other.second) == (first, second):
                yield f"{one.name} + {other.name}"
    for symbol in symbols:
        if first - symbol.first == second - symbol.second:
            offset = first - symbol.first
            yield f"{symbol.name} {'+' if offset > 0 else '-'} {abs(offset)}"
        if first * symbol.second == second * symbol.first and first % symbol.first == 0:
            yield f"{first // symbol.first}*{symbol.name}"
    for one in symbols:
        for other in symbols:
            if (one.first * other.first, one.second * other.second) == (first, second):
                yield f"{one.name}*{other.name}"
    yield from _quotients(first, second, symbols)


def _quotients(first: int, second: int, symbols: _Symbols) -> Iterator[str]:
    """A side of an image in patches, and patches of an image with or without a class token beside them."""
    divided = [
        (f"{symbol.name}/{stride}", symbol.first // stride, symbol.second // stride)
        for stride in _STRIDES
        for symbol in symbols
        if symbol.first % stride == symbol.second % stride == 0
    ]
    both = [
        (f"{one} * {other}", first_one * first_other, second_one * second_other)
        for (one, first_one, second_one), (other, first_other, second_other) in itertools.product(divided, repeat=2)
        if one.rpartition("/")[2] == other.rpartition("/")[2]
    ]
    for offset in (0, 1, 2):
        yield from (
            f"{name} + {offset}" if offset else name
            for name, one, other in (*divided, *both)
            if (one + offset, other + offset) == (first, second)
        )
