"""What is told of a value while it is followed how far something reaches in a graph: see `measuring.paths`.

Of a value there is an entry for each of its elements, but one for all samples: the number of samples is a size like no
other, so that what is found holds for any.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.matching.arithmetic import compute

Sizes = tuple[int | None, ...]
"""None: the number of samples."""

Bools = NDArray[np.bool_]

SAMPLES = np.iinfo(np.int64).min + 7
"""Stands for the number of samples in the shapes that a graph computes with: a size that no tensor can have."""

KNOWN = 4096
"""Constants of up to this many elements are computed with: shapes, places, flags."""


@dataclass(frozen=True, eq=False)
class Told:
    """What is told of a value."""

    sizes: Sizes | None
    """None: not known; `reached` has one entry then."""

    reached: Bools
    """Which entries may depend on the source, of the shape `sizes` with 1 for the number of samples."""

    known: NDArray[np.generic] | None = None
    """The value, of the same shape, where no input decides it."""

    @property
    def clean(self) -> bool:
        """Whether nothing of it depends on the source."""
        return not self.reached.any()


class UnfollowedError(Exception):
    """A rule does not follow this node."""


Rule = Callable[[ir.Node, Sequence[Told | None]], list[Told]]
"""From a node and what is told of its operands, whose sizes are known, to what is told of its results."""


def plain(sizes: Sequence[int | None]) -> tuple[int, ...]:
    """A shape with 1 for the number of samples."""
    return tuple(1 if size is None else size for size in sizes)


def constant(array: NDArray[np.generic]) -> Told:
    """What is told of a weight."""
    known = array if array.size <= KNOWN and not counts_samples(array) else None
    return Told(array.shape, np.zeros(array.shape, np.bool_), known)


def nowhere(sizes: Sizes | None) -> Told:
    """Of a value that nothing of the source reaches."""
    return Told(sizes, np.zeros(() if sizes is None else plain(sizes), np.bool_))


def everywhere(sizes: Sizes | None) -> Told:
    """Of a value that the source may reach anywhere."""
    return Told(sizes, np.ones(() if sizes is None else plain(sizes), np.bool_))


def counts_samples(array: NDArray[np.generic]) -> bool:
    """Whether the number of samples is in a shape."""
    return array.dtype == np.int64 and bool((array == SAMPLES).any())


def sizes_of(one: Told) -> Sizes:
    """The sizes of a value, of which it is seen to before that they are known."""
    assert one.sizes is not None, "follow asks for it"
    return one.sizes


def number(node: ir.Node, name: str, default: int) -> int:
    """A number that an attribute holds."""
    return node.attributes[name].as_int() if name in node.attributes else default


def numbers(node: ir.Node, name: str, operands: Sequence[Told | None], index: int) -> list[int] | None:
    """A list of numbers that an attribute or a constant operand holds; None where there is none."""
    if name in node.attributes:
        return [int(number) for number in node.attributes[name].as_ints()]
    one = operands[index] if len(operands) > index else None
    if one is None:
        return None
    if one.known is None or counts_samples(one.known) or None in sizes_of(one):
        raise UnfollowedError
    return [int(number) for number in one.known.reshape(-1)]


def operand(operands: Sequence[Told | None], index: int) -> Told:
    """An operand that has to be there."""
    one = operands[index] if len(operands) > index else None
    if one is None:
        raise UnfollowedError
    return one


def broadcast(*shapes: Sizes) -> Sizes:
    """The sizes that shapes broadcast to; samples with samples, or with one."""
    rank = max(map(len, shapes))
    found: list[int | None] = []
    for sizes in zip(*((1,) * (rank - len(shape)) + tuple(shape) for shape in shapes), strict=True):
        several = {size for size in sizes if size != 1}
        if len(several) > 1:
            raise UnfollowedError
        found.append(several.pop() if several else 1)
    return tuple(found)


def computed(node: ir.Node, operands: Sequence[Told | None]) -> NDArray[np.generic] | None:
    """The only result of constants; None where an operand is none."""
    given = [one for one in operands if one is not None]
    if any(one.known is None or counts_samples(one.known) for one in given) or len(node.outputs) != 1:
        return None
    names = [value.name for value in node.inputs if value is not None]
    feeds = {str(name): one.known for name, one in zip(names, given, strict=True) if one.known is not None}
    results = compute(ir.to_proto(node), feeds)
    return np.asarray(results[0]) if len(results) == 1 and results[0].size <= KNOWN else None
