"""Sizes that do not fit each other, whatever goes in: a graph that has them cannot run, and its axes cannot be told.

Exporters write them where they take a number of the traced sample for a constant. Only fixed sizes are held against
each other: a free one that was guessed wrong is no contradiction.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from math import prod

import onnx_ir as ir

from atpatch_onnx.matching.rules import label
from atpatch_onnx.matching.sites import Dim
from atpatch_onnx.matching.view import View

_Shapes = Sequence[tuple[Dim, ...]]


def contradiction(view: View) -> str | None:
    """The first node of the graph whose sizes cannot be, in words; None where there is none."""
    for node in view.model.graph:
        fits = _FITS.get(node.op_type) if node.domain == "" else None
        shapes = [view.shape(value) for value in _held(node)]
        known = [shape for shape in shapes if shape is not None]
        if fits is not None and len(known) == len(shapes) and not fits(known):
            return f"at {label(node)} sizes do not fit, {' and '.join(map(_shown, known))}"
    return None


def undecided(value: ir.Value, view: View) -> str | None:
    """Why nothing can be told of the axes of a value, in words; None where its sizes are known and nothing contradicts.

    The node behind which sizes are lost: the last one on the way back that has them all in front of it.
    """
    wrong = contradiction(view)
    if wrong is not None:
        return f"{wrong}, so that no input runs"
    if view.sizes(value) is not None:
        return None
    pending, seen = [value], {value}
    while pending:
        node = pending.pop(0).producer()
        sources = [] if node is None else [source for source in node.inputs if source is not None]
        lost = [source for source in sources if view.sizes(source) is None]
        if node is not None and not lost:
            return f"the sizes of what {label(node)} gives cannot be inferred"
        pending += [source for source in lost if source not in seen]
        seen.update(lost)
    return "the sizes of its tensors cannot be inferred"


def _shown(shape: tuple[Dim, ...]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"


def _held(node: ir.Node) -> list[ir.Value]:
    """What is held against each other: operands, or what a Reshape takes and what it makes of it."""
    if node.op_type == "Reshape":
        return [value for value in (*node.inputs[:1], *node.outputs) if value is not None]
    return [value for value in node.inputs if value is not None]


def _as_many(shapes: _Shapes) -> bool:
    """As many entries before as after; free sizes that stand on both sides count for nothing."""
    free = [Counter(size for size in shape if not isinstance(size, int)) for shape in shapes]
    before, after = (prod(size for size in shape if isinstance(size, int)) for shape in shapes)
    return free[0] != free[1] or None in free[0] or before == after


def _broadcast(shapes: _Shapes) -> bool:
    pairs = (
        pair for one, other in combinations(shapes, 2) for pair in zip(reversed(one), reversed(other), strict=False)
    )
    return all(_alike(one, other) or 1 in (one, other) for one, other in pairs)


def _multiplied(shapes: _Shapes) -> bool:
    first, second = shapes
    inner = min(len(first), len(second)) < 2 or _alike(first[-1], second[-2])
    return inner and _broadcast([first[:-2], second[:-2]])


def _alike(one: Dim, other: Dim) -> bool:
    return one == other or not (isinstance(one, int) and isinstance(other, int))


_FITS: Mapping[str, Callable[[_Shapes], bool]] = {
    "Reshape": _as_many,
    "MatMul": _multiplied,
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Where"), _broadcast),
}
