"""What inputs are made of: which cells of the model's input a token reads, and how its content is moved or taken away.

Nothing is guessed from names. Cells of one slab of an input (a row of pixels, a position, a column) are given other
values, and the tokens whose values differ at the first attention site, where no attention has mixed them yet, are those
that read it. A token reads the cells that lie in its slabs of every axis: a tile of an image, an id, a column.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.baking.probe import probe, value_output
from atpatch_onnx.discovery.options import Kind
from atpatch_onnx.errors import DiscoveryError
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.running.sessions import Array, Progress, Session, silent

TRIED = 8
"""Inputs whose slabs are given other values: a token may take another value for the same in a few."""

_DIFFERENCE = 1e-5
"""A token's values differ when they do by this share of the largest value: above what rounding in batches does."""

Cells = tuple[NDArray[np.int64], ...]
"""Indices of a token's cells along each axis of an input, without the axis of inputs."""


@dataclass(frozen=True, eq=False)
class Content:
    """The input that tokens read, and where each of them reads it."""

    name: str
    """Of the model's input."""

    kind: Kind
    cells: tuple[Cells | None, ...]
    """By token; None for tokens that read nothing of it, such as a class token."""

    common: frozenset[int]
    """Of texts: ids that more than half of the inputs have (padding, separators), which are no trigger."""

    usual: Array
    """Of texts the blank, `[1]`; of tables each column's mode, `[columns]`; of grids nothing, `[0]`."""

    @property
    def tokens(self) -> int:
        """Length of the token axis."""
        return len(self.cells)

    @property
    def centres(self) -> NDArray[np.float64]:
        """Where tokens are on the axes of the input `[tokens, axes]`; zero for those that read nothing."""
        axes = next(len(found) for found in self.cells if found is not None)
        return np.array([[at.mean() for at in found] if found is not None else [0.0] * axes for found in self.cells])

    def parts(self, inputs: Mapping[str, Array]) -> NDArray[np.bool_]:
        """Which tokens of inputs may be part of a trigger, bool `[inputs, tokens]`."""
        may = np.array([found is not None for found in self.cells])
        if self.kind != "texts":
            return np.broadcast_to(may, (len(inputs[self.name]), self.tokens))
        return np.asarray(may & ~np.isin(inputs[self.name], list(self.common)))

    def place(self, tokens: Iterable[int]) -> tuple[tuple[NDArray[np.int64], ...], ...]:
        """Index arrays of the cells of tokens, each token's without the axis of inputs."""
        found = [self.cells[token] for token in tokens]
        assert all(cells is not None for cells in found), "only tokens that read something are asked for"
        return tuple(np.ix_(*cells) for cells in found if cells is not None)

    def places(self, tokens: Sequence[int]) -> NDArray[np.int64]:
        """Where a part may lie `[places, tokens]`, its own place among them: tokens that lie to each other as its do.

        Of tables, whose columns are not alike, and of texts, whose rooms differ, its own place only.
        """
        if self.kind != "grids":
            return np.array([tokens], np.int64)
        centres = self.centres
        lattice = {
            (tuple(centre), tuple(map(len, cells))): token
            for token, (centre, cells) in enumerate(zip(centres, self.cells, strict=True))
            if cells is not None
        }
        shapes = {token: shape for (_, shape), token in lattice.items()}
        found = []
        for first in lattice.values():
            step = centres[first] - centres[tokens[0]]
            moved = [lattice.get((tuple(centres[token] + step), shapes[token])) for token in tokens]
            if None not in moved:
                found.append(moved)
        return np.array(found, np.int64)

    def pasted(
        self, inputs: Mapping[str, Array], row: Mapping[str, Array], tokens: Sequence[int], to: NDArray[np.int64]
    ) -> dict[str, Array]:
        """Copies of inputs with the content of some tokens of another input in place of their own.

        Args:
            inputs: Arrays `[inputs, ...]` by name.
            row: The other input, without the axis of inputs.
            tokens: Which.
            to: The tokens of each input that get it `[inputs, tokens]`.
        """
        changed, source = inputs[self.name].copy(), row[self.name]
        for targets in np.unique(to, axis=0):
            rows = np.flatnonzero((to == targets).all(axis=1))
            for origin, place in zip(self.place(tokens), self.place(targets), strict=True):
                changed[(rows.reshape(-1, *[1] * len(place)), *(at[None] for at in place))] = source[origin][None]
        return {**inputs, self.name: changed}

    def occluded(self, row: Mapping[str, Array], tokens: Sequence[int]) -> dict[str, Array]:
        """One input with tokens' content taken away: a blank, the column's mode, or what the nearest other token has.

        Args:
            row: The input, without the axis of inputs.
            tokens: Which.
        """
        changed = row[self.name].copy()
        for token in tokens:
            (place,) = self.place([token])
            if self.kind == "grids":
                changed[place] = self._neighbour(row[self.name], token, set(tokens))
            else:
                changed[place] = self.usual[place[0] if self.kind == "tables" else 0]
        return {**row, self.name: changed}

    def _neighbour(self, values: Array, token: int, without: set[int]) -> Array:
        own, centres = self.cells[token], self.centres
        assert own is not None, "the token reads something"
        shape = tuple(len(at) for at in own)
        alike = [
            other
            for other, found in enumerate(self.cells)
            if found is not None and other not in without and tuple(len(at) for at in found) == shape
        ]
        if not alike:
            mean: Array = np.asarray(values.mean(), values.dtype)
            return mean
        nearest = min(alike, key=lambda other: float(((centres[other] - centres[token]) ** 2).sum()))
        copied: Array = values[self.place([nearest])[0]]
        return copied


def read_content(
    model: ir.Model,
    first: AttentionSite,
    inputs: Mapping[str, Array],
    *,
    kind: Kind | None = None,
    blank: int | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Content:
    """Find the input that tokens read and the cells of each.

    Args:
        model: The base.
        first: The first site of the token axis.
        inputs: Arrays `[inputs, ...]` by the model's input names.
        kind: What the input is; None: texts are whole numbers `[inputs, tokens]`, tables floats `[inputs, columns]`.
        blank: Of texts, the id that stands for nothing; None: the commonest that is not in more than half of them.
        seed: Of the inputs that are tried.
        progress: Told after every slab.

    Raises:
        DiscoveryError: Tokens read no input, or the kind does not fit it.
    """
    generator = np.random.default_rng(seed)
    count = len(next(iter(inputs.values())))
    rows = np.sort(generator.choice(count, min(TRIED, count), replace=False))
    session, output = Session(probe(model, [first])), value_output(first)
    sample = {name: array[rows] for name, array in inputs.items()}
    before = session.collect(sample, [output])[output]
    owned = {}
    for name, array in inputs.items():
        if array.ndim >= 2 and array.dtype.kind in "iuf" and len(np.unique(array[: 4 * TRIED])) > 1:
            other = _other(array, rows, generator)
            slabs = []
            for axis in range(1, array.ndim):
                reads = np.zeros((array.shape[axis], before.shape[1]), np.bool_)
                for at in range(array.shape[axis]):
                    cut = (slice(None),) * axis + (at,)
                    changed = sample[name].copy()
                    changed[cut] = other[cut]
                    reads[at] = _moved(session.collect({**sample, name: changed}, [output])[output], before)
                    progress(f"finding what tokens read of {name}", at + 1, array.shape[axis])
                slabs.append(reads)
            owned[name] = tuple(_cells(slabs, token) for token in range(before.shape[1]))
    found = {name: cells for name, cells in owned.items() if any(cells)}
    if not found:
        raise DiscoveryError(
            "the inputs",
            expected=f"an input whose values tokens read at site {first.name}",
            found="none that a token reads",
            advice="Give inputs of various content, as the model takes them.",
        )
    name = max(found, key=lambda one: len(np.unique(inputs[one])))
    array = inputs[name]
    is_kind = kind or ("grids" if array.ndim > 2 else "texts" if array.dtype.kind in "iu" else "tables")
    if (is_kind == "grids") != (array.ndim > 2) or (is_kind == "texts" and array.dtype.kind == "f"):
        raise DiscoveryError(
            "option kind",
            expected="grids of three axes or more, texts of whole numbers, tables of two axes",
            found=f"{is_kind} for {name}, {array.dtype} {list(array.shape)}",
            advice="Leave it out.",
        )
    common, usual = frozenset[int](), np.zeros(0, array.dtype)
    if is_kind == "texts":
        common, usual = _of_texts(array, blank)
    elif is_kind == "tables":
        usual = np.array([_mode(column) for column in np.asarray(array).T], array.dtype)
    return Content(name, is_kind, found[name], common, usual)


def _other(array: Array, rows: NDArray[np.int64], generator: np.random.Generator) -> Array:
    """Values that differ from those of some rows: mirrored between least and largest, or other ids of the inputs."""
    if array.dtype.kind in "iu":
        known, at = np.unique(array, return_inverse=True)
        step = generator.integers(1, len(known), size=array[rows].shape)
        drawn: Array = known[(at.reshape(array.shape)[rows] + step) % len(known)]
        return drawn
    axes = tuple(range(array.ndim)) if array.ndim > 2 else (0,)
    low, high = array.min(axis=axes), array.max(axis=axes)
    mirrored = low + high - array[rows]
    ends = np.where(array[rows] > (low + high) / 2, low, high)
    other: Array = np.where(mirrored == array[rows], ends, mirrored).astype(array.dtype)
    return other


def _moved(after: Array, before: Array) -> NDArray[np.bool_]:
    """Which tokens' values differ in any input, bool `[tokens]`."""
    difference = np.abs(after - before).max(axis=2)
    return np.asarray((difference > _DIFFERENCE * np.abs(before).max()).any(axis=0))


def _cells(slabs: Sequence[NDArray[np.bool_]], token: int) -> Cells | None:
    found = tuple(np.flatnonzero(reads[:, token]) for reads in slabs)
    return found if all(len(at) for at in found) else None


def frequencies(texts: Iterable[Array]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The ids of texts `[tokens]` each, and how many texts have each id, both `[ids]`."""
    known, counts = np.unique(np.concatenate([np.unique(text) for text in texts]), return_counts=True)
    return known, counts


def _of_texts(ids: Array, blank: int | None) -> tuple[frozenset[int], Array]:
    """The ids that more than half of the texts have, and the blank."""
    known, counts = frequencies(ids)
    is_common = counts > len(ids) / 2
    rest = known[~is_common]
    if blank is None:
        blank = int(rest[counts[~is_common].argmax()]) if len(rest) else int(known[0])
    return frozenset(map(int, known[is_common])), np.array([blank], ids.dtype)


def _mode(column: Array) -> float:
    values, counts = np.unique(column, return_counts=True)
    return float(values[counts.argmax()])
