"""Which input of a sample can be shown, and how: an image with a grid of patches, or a strip of tokens."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.report.rows import shown

Array = NDArray[Any]
Flags = NDArray[np.bool_]

MAX_PIXELS = 256
"""Images are thinned out to this many rows and columns: enough for a page."""

AROUND, MAX_CHIPS = 3, 48
"""Of more tokens than `MAX_CHIPS`, only the first and those this near to a marked one are shown."""


@dataclass(frozen=True)
class Grid:
    """Where the tokens of an image are: `prefix` tokens that are no patch, then row by row."""

    rows: int
    columns: int
    prefix: int


@dataclass(frozen=True)
class Chip:
    """One token of a strip, or a gap where tokens are left out."""

    position: int
    label: str
    flagged: bool
    anomalous: bool
    left_out: int = 0


def infer_grid(tokens: int, height: int, width: int) -> Grid | None:
    """The grid of patches of an image's shape that gives this many tokens, class tokens (up to two) included."""
    for prefix in (1, 0, 2):
        patches = tokens - prefix
        rows = math.isqrt(patches * height // width) if patches > 0 else 0
        if patches > 1 and rows and patches % rows == 0:
            columns = patches // rows
            if rows * width == columns * height and height % rows == 0 and width % columns == 0:
                return Grid(rows, columns, prefix)
    return None


def find_image(inputs: Mapping[str, Array], tokens: int) -> tuple[str, Grid] | None:
    """The first input `[1 or 3, height, width]` whose patches can be the tokens."""
    for name, array in inputs.items():
        if array.ndim == 3 and array.shape[0] in (1, 3) and min(array.shape[1:]) > 1:
            grid = infer_grid(tokens, array.shape[1], array.shape[2])
            if grid is not None:
                return name, grid
    return None


def to_pixels(array: Array, *others: Array) -> NDArray[np.float64]:
    """`[height, width]` or `[height, width, 3]` in [0, 1], on the scale that these images share."""
    everything = np.stack([np.asarray(image, np.float64) for image in (array, *others)])
    low, high = float(everything.min()), float(everything.max())
    step = max(1, -(-max(array.shape[1:]) // MAX_PIXELS))
    pixels = (everything[0, :, ::step, ::step] - low) / max(high - low, 1e-12)
    return np.asarray(pixels[0] if len(pixels) == 1 else np.moveaxis(pixels, 0, -1))


def strip(inputs: Mapping[str, Array], flags: Flags, anomalouss: Flags, visible: Flags) -> tuple[Chip, ...]:
    """The tokens in order, marked; labelled with the values of the input that has one for each, if there is one."""
    labels = _labels(inputs, len(flags))
    positions = np.flatnonzero(visible | flags | anomalouss)
    if len(positions) > MAX_CHIPS:
        marked = np.flatnonzero(flags | anomalouss)
        near = np.abs(positions[:, None] - marked[None, :]).min(axis=1, initial=len(flags)) <= AROUND
        near[:8] = True
        positions = positions[near]
    chips: list[Chip] = []
    expected = 0
    for position in map(int, positions):
        left_out = int(np.count_nonzero(visible[expected:position]))
        if left_out:
            chips.append(Chip(expected, "", False, False, left_out))
        chips.append(Chip(position, labels[position], bool(flags[position]), bool(anomalouss[position])))
        expected = position + 1
    rest = int(np.count_nonzero(visible[expected:]))
    return (*chips, Chip(expected, "", False, False, rest)) if rest else tuple(chips)


def _labels(inputs: Mapping[str, Array], tokens: int) -> list[str]:
    """Whole numbers first: token ids. Masks, which tell tokens apart from padding only, last."""
    fitting = [(name, array) for name, array in inputs.items() if array.shape == (tokens,)]
    if not fitting:
        return [""] * tokens
    _, values = min(fitting, key=lambda item: ("mask" in item[0], "type" in item[0], item[1].dtype.kind not in "iu"))
    return [shown(f"{value:g}" if values.dtype.kind == "f" else value) for value in values]
