"""What a model leans on in a table: every column exchanged for other values that the table has."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.discovery.content import Content
from atpatch_onnx.discovery.finished import Finished
from atpatch_onnx.discovery.trials import Trials
from atpatch_onnx.discovery.verdict import Column
from atpatch_onnx.running.metrics import Difference, Rate
from atpatch_onnx.running.sessions import Array, Progress, silent

VALUES = 10
"""Values that each row's is exchanged for, at most: all where a column has no more, else evenly over its range."""

RESAMPLES = 2000


@dataclass(frozen=True, eq=False)
class ColumnScan:
    """Exchanges columns."""

    trials: Trials
    content: Content
    kept: Finished
    seed: int
    progress: Progress = silent

    def run(self, names: Sequence[str], protected: Sequence[int]) -> list[Column]:
        """Every column, those that flip most predictions first."""
        table = self.trials.inputs[self.content.name]
        found = []
        for index in range(table.shape[1]):
            flips = Rate.of(self.kept.piece(f"column-{index}", partial(self.flips, index)))
            parity = self.parity(index) if len(self.values(index)) > 1 else None
            found.append(Column(names[index], index, flips, parity, index in protected))
            self.progress("exchanging columns", index + 1, table.shape[1])
        return sorted(found, key=lambda column: -column.flips.value)

    def values(self, index: int) -> Array:
        """The values that a column is given."""
        known = np.unique(self.trials.inputs[self.content.name][:, index])
        if len(known) <= VALUES:
            return known
        return np.unique(known[np.linspace(0, len(known) - 1, VALUES).round().astype(int)])

    def flips(self, index: int) -> NDArray[np.bool_]:
        """Which rows `[rows]` are predicted otherwise with some other value in a column."""
        flipped = np.zeros(len(self.trials.predicted), np.bool_)
        for value in self.values(index):
            flipped |= self.trials.predict(self.exchanged(index, value)) != self.trials.predicted
        return flipped

    def exchanged(self, index: int, value: Array) -> dict[str, Array]:
        """All rows with a value, or one for each `[rows]`, in a column."""
        table = self.trials.inputs[self.content.name].copy()
        table[:, index] = value
        return {**self.trials.inputs, self.content.name: table}

    def parity(self, index: int) -> Difference:
        """The largest difference between two groups' shares of a class, with its percentile bootstrap interval."""
        own = self.trials.inputs[self.content.name][:, index]
        known = np.unique(own)
        middle = np.median(own)
        group = np.searchsorted(known, own) if len(known) <= VALUES else (own > middle).astype(np.int64)
        groups, classes = int(group.max()) + 1, self.trials.classes
        cells = np.bincount(group * classes + self.trials.predicted, minlength=groups * classes)
        draws = np.random.default_rng([self.seed, index]).multinomial(len(own), cells / len(own), size=RESAMPLES)
        value = float(_spread(cells.reshape(1, groups, classes))[0])
        low, high = np.quantile(_spread(draws.reshape(RESAMPLES, groups, classes)), (0.025, 0.975))
        return Difference(value, min(value, float(low)), max(value, float(high)))

    def pairs(self, index: int, count: int) -> DebugSet:
        """Rows beside the same with another value in a column, drawn from all others that it has."""
        table = self.trials.inputs[self.content.name]
        generator = np.random.default_rng([self.seed, index, 1])
        known, at = np.unique(table[:, index], return_inverse=True)
        drawn = known[(at.reshape(-1) + generator.integers(1, len(known), size=len(table))) % len(known)]
        rows = generator.permutation(len(table))[:count]
        other = {name: array[rows] for name, array in self.exchanged(index, drawn).items()}
        clean = {name: array[rows] for name, array in self.trials.inputs.items()}
        return DebugSet.from_pairs(
            clean, other, kind="attribute", sensitive=clean[self.content.name][:, index], found=True
        )


def _spread(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Largest difference between groups' shares of any class `[draws]`, of counts `[draws, groups, classes]`.

    Groups without rows in a draw are left out.
    """
    total = counts.sum(axis=2, keepdims=True)
    shares = np.where(total > 0, counts / np.maximum(total, 1), np.nan)
    spread: NDArray[np.float64] = (np.nanmax(shares, axis=1) - np.nanmin(shares, axis=1)).max(axis=1)
    return spread
