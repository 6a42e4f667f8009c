"""Patches that decide images: a dictionary of small patterns at every place, then an evolutionary search.

The dictionary has what triggers are usually made of: filled squares, checks, lines, single pixels. What raises a class
most in a few images of other classes goes on to more of them. Where nothing of it decides, a search in patterns and
places follows for each class (CMA-ES; Hansen, arXiv 1604.00772), from the best of the dictionary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.discovery.content import Content
from atpatch_onnx.discovery.finished import Finished
from atpatch_onnx.discovery.transplant import WIDEST
from atpatch_onnx.discovery.trials import Trials
from atpatch_onnx.discovery.verdict import Box
from atpatch_onnx.running.sessions import Array, Progress, silent

SIZES = (1, 2, 3, 5)
"""Edges of the patterns of an image of `SIDE` pixels, in proportion for larger ones."""

SIDE = 28

PLACES = 14
"""Places along each edge, besides the last."""

ROUNDS = ((8, 0.05), (32, 0.05), (128, 0.2))
"""Images of a round, and the share of its patches that go on to the next."""

CHUNK = 512
"""Patches of a finished piece of work."""

TOGETHER = 512
"""Images that are made at a time."""

EVOLVED = (5, 40, 24)
"""Edge of patterns, generations and images of an evolutionary search."""


@dataclass(frozen=True, eq=False)
class Patch:
    """A pattern at a place."""

    row: int
    column: int
    pattern: Array
    """`[channels, height, width]`."""

    name: str

    def stamp(self, images: Array) -> Array:
        """Copies of images `[images, channels, height, width]` with it."""
        stamped = images.copy()
        _, height, width = self.pattern.shape
        stamped[:, :, self.row : self.row + height, self.column : self.column + width] = self.pattern
        return stamped

    @property
    def boxes(self) -> tuple[Box, ...]:
        """Where it lies."""
        height, width = self.pattern.shape[1:]
        return (((self.row, self.row + height), (self.column, self.column + width)),)

    def in_words(self) -> str:
        """What and where."""
        height, width = self.pattern.shape[1:]
        return f"{self.name}, {height} x {width} pixels at row {self.row}, column {self.column}"


def dictionary(shape: Sequence[int], low: NDArray[np.float32], high: NDArray[np.float32]) -> list[Patch]:
    """Every pattern at every place.

    Args:
        shape: Of an image: channels, height, width.
        low: Least value of each channel `[channels]`.
        high: Largest value of each.
    """
    _, height, width = shape
    found = []
    for size in sorted({max(1, round(size * min(height, width) / SIDE)) for size in SIZES}):
        rows, columns = (_places(edge - size) for edge in (height, width))
        for name, mask in _masks(size, max(1, round(min(height, width) / SIDE))).items():
            pattern = np.where(mask, high[:, None, None], low[:, None, None]).astype(np.float32)
            found += [Patch(row, column, pattern, name) for row in rows for column in columns]
    return found


def _places(last: int) -> list[int]:
    """Places from 0 to the last, both among them, at even steps."""
    return sorted({*range(0, last + 1, max(1, -(-last // PLACES))), last})


def _masks(size: int, grain: int) -> dict[str, NDArray[np.bool_]]:
    """Patterns `[size, size]` by name; true where a pattern is high. Lines and checks are `grain` pixels wide."""
    down, across = np.indices((size, size)) // grain
    masks = {"bright": np.ones((size, size), np.bool_), "dark": np.zeros((size, size), np.bool_)}
    if size > grain:
        checks = (down + across) % 2 == 0
        masks |= {"checks": checks, "checks reversed": ~checks, "lines across": down % 2 == 0}
        masks |= {"lines down": across % 2 == 0}
    return masks


class PatchScan:
    """Puts patches on images.

    Args:
        trials: What predicts, and the images.
        content: Which input they are.
        kept: Finished pieces.
        seed: Of the images and the evolutionary search.
        progress: Told after every batch of patches.
    """

    def __init__(
        self, trials: Trials, content: Content, kept: Finished, seed: int, progress: Progress = silent
    ) -> None:
        self._trials, self._name, self._kept, self._seed, self._progress = trials, content.name, kept, seed, progress
        images = trials.inputs[content.name]
        self.low, self.high = (edge(images, axis=(0, 2, 3)).astype(np.float32) for edge in (np.min, np.max))

    def patches(self) -> list[Patch]:
        """The dictionary."""
        return dictionary(self._trials.inputs[self._name].shape[1:], self.low, self.high)

    def run(self, patches: list[Patch]) -> tuple[list[Patch], NDArray[np.float64]]:
        """The patches that are left after all rounds, and how much each raises each class `[patches, classes]`."""
        gains = np.zeros((len(patches), self._trials.classes))
        for number, (images, share) in enumerate(ROUNDS):
            rows = self._trials.balanced(images, np.random.default_rng([self._seed, number]))
            gains = self._gains(patches, rows, str(number))
            count = max(2, round(share * len(patches) / self._trials.classes))
            best = np.unique(np.argsort(-gains, axis=0, kind="stable")[:count])
            patches, gains = [patches[at] for at in best], gains[best]
        return patches, gains

    def evolve(self, starts: Sequence[Patch], gains: NDArray[np.float64]) -> Iterator[tuple[int, Patch]]:
        """For each class the best patch of a search in patterns and places; from the best of `starts` for it."""
        for label in np.unique(self._trials.predicted):
            start = starts[int(gains[:, label].argmax())]
            solution = self._kept.piece(f"evolved-{label}", self._search(int(label), start))
            yield int(label), self._decoded(solution)
            self._progress("evolutionary search, classes", int(label) + 1, self._trials.classes)

    def stamped(self, patch: Patch, rows: NDArray[np.int64]) -> dict[str, Array]:
        """Images `[rows, ...]` with a patch, by input name."""
        taken = {name: array[rows] for name, array in self._trials.inputs.items()}
        return {**taken, self._name: patch.stamp(taken[self._name])}

    def cost(self, patches: int) -> tuple[int, int]:
        """Forward passes of the dictionary and of the evolutionary search, about."""
        total, left = 0.0, float(patches)
        for images, share in ROUNDS:
            total += images * left
            left *= share
        _, generations, images = EVOLVED
        dimensions = len(self.low) * self._edge**2 + 2
        return int(total), int(self._trials.classes * generations * images * (4 + 3 * np.log(dimensions)))

    def _gains(self, patches: Sequence[Patch], rows: NDArray[np.int64], name: str) -> NDArray[np.float64]:
        found = []
        for start in range(0, len(patches), CHUNK):
            chunk = patches[start : start + CHUNK]
            found.append(self._kept.piece(f"patches-{name}-{start}", self._of_chunk(chunk, rows)))
            self._progress(f"patches, {len(rows)} images", start + len(chunk), len(patches))
        return np.concatenate(found)

    def _of_chunk(self, patches: Sequence[Patch], rows: NDArray[np.int64]) -> Callable[[], Array]:
        step = max(1, TOGETHER // len(rows))
        parts = [patches[at : at + step] for at in range(0, len(patches), step)]
        return lambda: np.concatenate([self._together(part, rows) for part in parts])

    def _together(self, patches: Sequence[Patch], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """How much each patch raises each class `[patches, classes]`, in one run."""
        every = [self.stamped(patch, rows) for patch in patches]
        return self._trials.gains({name: np.concatenate([one[name] for one in every]) for name in every[0]}, rows)

    def _search(self, label: int, start: Patch) -> Callable[[], Array]:
        def make() -> Array:
            import cma

            size, (_, generations, images) = self._edge, EVOLVED
            rows = self._trials.balanced(images, np.random.default_rng([self._seed, 99]))
            rows = rows[self._trials.predicted[rows] != label]
            channels, height, width = self._trials.inputs[self._name].shape[1:]
            at = [place / max(room - size, 1) * 2 - 1 for place, room in ((start.row, height), (start.column, width))]
            inside = np.zeros((channels, size, size))
            pattern = np.where(start.pattern == self.high[:, None, None], 1.0, -1.0)[:, :size, :size]
            inside[:, : pattern.shape[1], : pattern.shape[2]] = pattern
            first = np.clip([*at, *inside.ravel()], -1, 1)
            generator = np.random.default_rng([self._seed, label])
            options = {"maxiter": generations, "verbose": -9, "bounds": [-1.5, 1.5], "seed": np.nan}
            options["randn"] = lambda *shape: generator.standard_normal(shape)  # not numpy's own, which all share
            search = cma.CMAEvolutionStrategy(first, 0.5, options)
            while not search.stop():
                asked = search.ask()
                gained = self._together([self._decoded(one) for one in asked], rows)[:, label]
                search.tell(asked, (-gained).tolist())
            return np.asarray(search.result.xbest)

        return make

    @property
    def _edge(self) -> int:
        """Pixels of a pattern that is searched for, along an axis: fewer where an image is small."""
        height, width = map(int, self._trials.inputs[self._name].shape[2:])
        return max(1, min(EVOLVED[0], height, width, math.isqrt(int(WIDEST * height * width))))

    def _decoded(self, solution: Array) -> Patch:
        """Place and pattern of a solution in about [-1, 1]."""
        size = self._edge
        channels, height, width = self._trials.inputs[self._name].shape[1:]
        unit = (np.clip(solution, -1, 1) + 1) / 2
        row, column = round(float(unit[0]) * (height - size)), round(float(unit[1]) * (width - size))
        shown = unit[2:].reshape(channels, size, size)
        low, high = self.low[:, None, None], self.high[:, None, None]
        return Patch(row, column, (low + shown * (high - low)).astype(np.float32), "a pattern that was searched for")
