"""Plain ONNX nodes in few words: constants, sizes, parts of axes, and the axes of heads.

`name` is what the result is called within the insertion; constants that a word needs are called after it.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from atpatch_onnx.graph.insertion import Insertion

QUERY, KEY, VALUE = QKV = ("map/query", "map/key", "values/new")
"""What Q, K and V of the node's own inputs are called; what is done to each of them is called after it."""

END = int(np.iinfo(np.int64).max)
"""Where a slice ends that goes to the end."""


def ints(at: Insertion, name: str, *values: int) -> ir.Value:
    """A constant int64 `[values]`."""
    return at.constant(name, np.array(values, np.int64))


def scalar(at: Insertion, name: str, value: int) -> ir.Value:
    """A constant int64 without axes."""
    return at.constant(name, np.array(value, np.int64))


def floats(at: Insertion, name: str, *values: float) -> ir.Value:
    """A constant float32 `[values]`."""
    return at.constant(name, np.array(values, np.float32))


def cast(at: Insertion, value: ir.Value, dtype: ir.DataType, name: str) -> ir.Value:
    """The value in a type; the value itself where that is its type."""
    if value.dtype == dtype:
        return value
    return at.op("Cast", value, name=name, attributes=[ir.AttrInt64("to", dtype)])


def as_float(at: Insertion, value: ir.Value, name: str) -> ir.Value:
    """The value as float32; the value itself where it is."""
    return cast(at, value, ir.DataType.FLOAT, name)


def axis(index: int) -> ir.Attr:
    """The attribute that tells an operator its axis."""
    return ir.AttrInt64("axis", index)


def sizes(at: Insertion, value: ir.Value, start: int, end: int, name: str) -> ir.Value:
    """The sizes of the axes from `start` to before `end`: int64 `[end - start]`."""
    span = [ir.AttrInt64("start", start), ir.AttrInt64("end", end)]
    return at.op("Shape", value, name=name, attributes=span)


def length(at: Insertion, value: ir.Value, index: int, name: str) -> ir.Value:
    """The size of an axis: int64 `[1]`."""
    return sizes(at, value, index, index + 1, name)


def counted(at: Insertion, count: ir.Value, name: str, *shape: int) -> ir.Value:
    """0, 1, 2, ... of `count` int64 `[1]`, in a shape."""
    first, step = scalar(at, f"{name}_from", 0), scalar(at, f"{name}_step", 1)
    numbers = at.op("Range", first, at.op("Squeeze", count, name=f"{name}_count"), step, name=f"{name}_flat")
    return at.op("Reshape", numbers, ints(at, f"{name}_shape", *shape), name=name)


def entry(at: Insertion, value: ir.Value, number: int, index: int, name: str) -> ir.Value:
    """Entry `number` of an axis, which goes."""
    return at.op("Gather", value, scalar(at, f"{name}_index", number), name=name, attributes=[axis(index)])


def joined(at: Insertion, first: ir.Value, second: ir.Value, index: int, name: str) -> ir.Value:
    """One behind the other along an axis."""
    return at.op("Concat", first, second, name=name, attributes=[axis(index)])


def part(
    at: Insertion,
    value: ir.Value,
    start: ir.Value,
    end: ir.Value,
    index: int,
    name: str,
    step: ir.Value | None = None,
) -> ir.Value:
    """The part of an axis from `start` to before `end`, and of that each `step`-th entry; all int64 `[1]`."""
    steps = () if step is None else (step,)
    return at.op("Slice", value, start, end, ints(at, f"{name}_axis", index), *steps, name=name)


def three_parts(
    at: Insertion, value: ir.Value, cuts: tuple[ir.Value, ir.Value], index: int, names: Sequence[str]
) -> list[ir.Value]:
    """An axis cut in three, at two places int64 `[1]`."""
    bounds = (ints(at, f"{names[0]}_start", 0), *cuts, ints(at, f"{names[2]}_end", END))
    return [part(at, value, bounds[n], bounds[n + 1], index, name) for n, name in enumerate(names)]


def apart(at: Insertion, value: ir.Value, heads: int, name: str) -> ir.Value:
    """`[batch, heads, positions, depth]` of `[batch, positions, heads * depth]`."""
    split = at.op("Reshape", value, ints(at, f"{name}_shape", 0, 0, heads, -1), name=f"{name}_apart")
    return heads_first(at, split, name)


def heads_first(at: Insertion, value: ir.Value, name: str) -> ir.Value:
    """`[batch, heads, positions, depth]` of `[batch, positions, heads, depth]`."""
    return at.op("Transpose", value, name=name, attributes=[ir.AttrInt64s("perm", [0, 2, 1, 3])])
