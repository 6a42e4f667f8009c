"""The small part of an input that decides its prediction: tokens whose neutralisation flips it, as few as can be.

First a cheap screen of every input: a handful of sets of its tokens, each made neutral at once. Sets are runs of tokens
that lie together, a quarter of the input each, since a trigger is in one place; and those that draw the most attention,
since that is what triggers do. Only where one of them flips the prediction, delta debugging looks for the smallest part
of it that still does.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.discovery.content import Content
from atpatch_onnx.discovery.looking import Looked
from atpatch_onnx.fitting.board import Board
from atpatch_onnx.fitting.ddmin import ddmin_of_many
from atpatch_onnx.running.sessions import Array, Progress, silent

RUNS = 4
"""Runs that the tokens of an input are divided into."""

DRAWING = (1 / 25, 1 / 8)
"""Shares of the tokens: so many that draw the most attention are made neutral together, two at least."""


@dataclass(frozen=True, eq=False)
class Screened:
    """Which sets of tokens flip which predictions."""

    sets: NDArray[np.bool_]
    """`[sets, inputs, tokens]`."""

    flips: NDArray[np.bool_]
    """`[sets, inputs]`."""

    def smallest(self) -> dict[int, NDArray[np.int64]]:
        """For each input that flips, the tokens of the smallest set that does it."""
        sizes = np.where(self.flips, self.sets.sum(axis=2), self.sets.shape[2] + 1)
        best = sizes.argmin(axis=0)
        return {int(row): np.flatnonzero(self.sets[best[row], row]) for row in np.flatnonzero(self.flips.any(axis=0))}


def in_place(centres: NDArray[np.float64]) -> NDArray[np.int64]:
    """Tokens `[tokens]` in an order in which runs are blocks: halved along the longer axis, and so on.

    Args:
        centres: Where they are `[tokens, axes]`.
    """

    def ordered(tokens: NDArray[np.int64]) -> list[int]:
        if len(tokens) < 2:
            return [int(token) for token in tokens]
        axis = int(np.ptp(centres[tokens], axis=0).argmax())
        tokens = tokens[np.argsort(centres[tokens, axis], kind="stable")]
        middle = (len(tokens) + 1) // 2
        return ordered(tokens[:middle]) + ordered(tokens[middle:])

    return np.array(ordered(np.arange(len(centres))), np.int64)


def sets_of(content: Content, parts: NDArray[np.bool_], mass: NDArray[np.float32] | None) -> NDArray[np.bool_]:
    """The sets of the screen, bool `[sets, inputs, tokens]`.

    Args:
        content: Where tokens are.
        parts: Tokens that may be part of a trigger `[inputs, tokens]`.
        mass: Attention that tokens draw `[inputs, tokens]`; where it is not known, two sets of every other token stand
            in for those that draw most of it.
    """
    count = parts.sum(axis=1, keepdims=True)
    order = in_place(content.centres)
    rank = np.zeros(parts.shape, np.int64)
    rank[:, order] = np.cumsum(parts[:, order], axis=1) - 1
    run = np.where(parts, rank * RUNS // np.maximum(count, 1), -1)
    found = [run == number for number in range(RUNS)]
    if mass is None:
        found += [parts & (rank % 2 == odd) for odd in (0, 1)]
    else:
        drawing = by_mass(parts, mass)
        found += [parts & (drawing < np.maximum(2, np.ceil(share * count))) for share in DRAWING]
    return np.stack(found)


def by_mass(parts: NDArray[np.bool_], mass: NDArray[np.float32]) -> NDArray[np.int64]:
    """Rank of each token `[inputs, tokens]` among the `parts` of its input by the attention it draws, most first."""
    return np.asarray(np.where(parts, -mass, np.inf).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable"))


def screen(
    board: Board, inputs: Mapping[str, Array], looked: Looked, sets: NDArray[np.bool_], progress: Progress = silent
) -> Screened:
    """Make each set neutral in every input."""
    flips = [
        board.predict(inputs, neutral, progress=progress, stage=f"screening, set {number} of {len(sets)}")
        != looked.predicted
        for number, neutral in enumerate(sets, 1)
    ]
    return Screened(sets, np.stack(flips) & sets.any(axis=2))


def minimal_parts(
    board: Board,
    inputs: Mapping[str, Array],
    looked: Looked,
    screened: Screened,
    progress: Progress = silent,
) -> dict[int, tuple[int, ...]]:
    """For each input that flips a 1-minimal part of the smallest set that does it.

    Neutral, all tokens of the part together flip the prediction; all but any one of them do not. All inputs are
    searched side by side, those tokens first that draw the most attention.
    """
    mass, tokens = looked.mass, screened.sets.shape[2]
    found = screened.smallest()
    if mass is not None:
        found = {row: own[np.argsort(-mass[row, own], kind="stable")] for row, own in found.items()}

    def flip(asked: Mapping[int, frozenset[int]]) -> list[bool]:
        rows, neutral = np.array(list(asked)), np.zeros((len(asked), tokens), np.bool_)
        for at, subset in enumerate(asked.values()):
            neutral[at, list(subset)] = True
        predicted = board.predict({name: array[rows] for name, array in inputs.items()}, neutral)
        progress("delta debugging", len(found) - len(rows), len(found))
        return list(predicted != looked.predicted[rows])

    parts = ddmin_of_many({row: own.tolist() for row, own in found.items()}, flip)
    return {row: tuple(sorted(part)) for row, part in parts.items()}
