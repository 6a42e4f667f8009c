"""How the tensors of a site are laid out, as a short pattern, and how to bring them to the four axes of the arithmetic.

A pattern has one entry for each axis of a tensor: a letter, or several in parentheses where axes were folded into one.

| letter | axis                                                                                       |
|--------|--------------------------------------------------------------------------------------------|
| `n`    | maps: samples, and within each sample its parts, where it has more than one                |
| `b`    | samples, where the parts are a separate axis or come first                            |
| `w`    | parts of a sample that attend on their own: windows, channels, chunks                      |
| `h`    | heads (of K and V where they have fewer)                                                   |
| `g`    | the heads that share one head of K and V, where that is a separate axis                 |
| `q`    | queries                                                                                    |
| `k`    | keys                                                                                       |
| `d`    | depth                                                                                      |
| `1`    | an axis of size one                                                                        |

`nhqk` is the map of most exports, `(nh)qk` one with heads folded into the batch, `nk(hd)` packed values. The canonical
form has four axes: maps, heads, and two of queries, keys and depth, in this order.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_ORDER = "nbwhgqkd"
_MERGED = ("nbw", "hg")

MAP, VALUES, OUTPUT = "nhqk", "nhkd", "nhqd"
"""The canonical patterns."""


@dataclass(frozen=True)
class Layout:
    """A pattern, read."""

    axes: tuple[str, ...]
    """The letters of each axis of the tensor, outer ones first; "" for an axis of size one."""

    @classmethod
    def parse(cls, pattern: str) -> "Layout":
        """Read a pattern.

        Raises:
            ValueError: It is none, or a letter stands twice.
        """
        entries = re.findall(r"\(([a-z]+)\)|([a-z1])", pattern)
        axes = tuple(folded or ("" if single == "1" else single) for folded, single in entries)
        letters = "".join(axes)
        if str(cls(axes)) != pattern or set(letters) - set(_ORDER) or len(set(letters)) < len(letters):
            raise ValueError(f"{pattern!r} is no layout: letters of {_ORDER!r}, once each, or 1, folded ones in ()")
        return cls(axes)

    def __str__(self) -> str:
        return "".join({0: "1", 1: axis}.get(len(axis), f"({axis})") for axis in self.axes)

    @property
    def letters(self) -> str:
        """All letters in the tensor's order."""
        return "".join(self.axes)

    @property
    def ordered(self) -> str:
        """All letters in canonical order."""
        return "".join(sorted(self.letters, key=_ORDER.index))

    @property
    def permutation(self) -> tuple[int, ...]:
        """Brings the letters from the tensor's order into the canonical one."""
        return tuple(self.letters.index(letter) for letter in self.ordered)

    @property
    def groups(self) -> tuple[str, ...]:
        """The letters of each of the four canonical axes; "" for an axis of size one."""
        rest = "".join(_MERGED)
        merged = ("".join(letter for letter in self.ordered if letter in group) for group in _MERGED)
        return (*merged, *(letter for letter in self.ordered if letter not in rest))

    @property
    def is_canonical(self) -> bool:
        """Whether the tensor already has the four canonical axes."""
        return self.axes == self.groups and len(self.axes) == 4


def canonical(array: NDArray[np.generic], pattern: str, sizes: Mapping[str, int]) -> NDArray[np.generic]:
    """An array brought to the four canonical axes.

    Args:
        array: The tensor.
        pattern: Its layout.
        sizes: Sizes of folded letters; one of each fold may be left out.
    """
    layout = Layout.parse(pattern)
    split = array.reshape(_split(array.shape, layout, sizes)).transpose(layout.permutation)
    by_letter = dict(zip(layout.ordered, split.shape, strict=True))
    return split.reshape([int(np.prod([by_letter[letter] for letter in group], dtype=int)) for group in layout.groups])


def _split(shape: Sequence[int], layout: Layout, sizes: Mapping[str, int]) -> list[int]:
    """The sizes of all letters in the tensor's order."""
    found: list[int] = []
    for size, axis in zip(shape, layout.axes, strict=True):
        known = [sizes.get(letter, -1) for letter in axis] if len(axis) > 1 else [size] * len(axis)
        rest = size // int(np.prod([k for k in known if k > 0], dtype=int))
        found += [rest if k < 0 else k for k in known]
    return found
