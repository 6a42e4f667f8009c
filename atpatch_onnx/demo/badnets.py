"""BadNets (Gu et al., arXiv 1708.06733): a fixed pattern stamped on a share of the training images, relabelled.

Differences from the paper: the poisoned images are replaced, not added, as BackdoorBench does, and none of them is of
the target class already, so each one teaches the backdoor.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Trigger:
    """A square of one brightness that replaces the pixels `[row : row + size, column : column + size]`."""

    row: int
    column: int
    size: int
    value: float = 1.0

    def stamp(self, images: NDArray[np.float32]) -> NDArray[np.float32]:
        """A triggered copy of `images` `[..., height, width]`."""
        stamped = images.copy()
        stamped[..., self.row : self.row + self.size, self.column : self.column + self.size] = self.value
        return stamped

    def tokens(self, image_size: int, patch_size: int) -> tuple[int, ...]:
        """Positions on the token axis that the trigger touches: token 0 is the class token, then patches row by row."""
        across = image_size // patch_size
        rows = range(self.row // patch_size, (self.row + self.size - 1) // patch_size + 1)
        columns = range(self.column // patch_size, (self.column + self.size - 1) // patch_size + 1)
        return tuple(1 + row * across + column for row in rows for column in columns)


@dataclass(frozen=True)
class Poison:
    """Which training images are stamped with `trigger` and relabelled `target`: fixed `indices` `[n]` int64."""

    trigger: Trigger
    target: int
    indices: NDArray[np.int64]


def poison(labels: NDArray[np.int64], trigger: Trigger, *, target: int, share: float, seed: int = 0) -> Poison:
    """Draw the images to poison: a share of all `labels` `[N]`, taken from those that are not of the target class."""
    candidates = np.flatnonzero(labels != target)
    count = min(round(len(labels) * share), len(candidates))
    chosen = np.random.default_rng(seed).choice(candidates, count, replace=False)
    return Poison(trigger, target, np.sort(chosen))
