"""BadNets (Gu et al., arXiv 1708.06733): a fixed pattern stamped on a share of the training images, relabelled.

Differences from the paper: the poisoned images are replaced, not added, as BackdoorBench does, and none of them is of
the target class already, so each one teaches the backdoor.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Trigger(Protocol):
    """What turns clean images into triggered ones."""

    def stamp(self, images: NDArray[np.float32], generator: np.random.Generator) -> NDArray[np.float32]:
        """A triggered copy of `images` `[N, 1, height, width]` in [0, 1]; what is drawn, is drawn from `generator`."""


@dataclass(frozen=True)
class Square:
    """A square of one brightness that replaces the pixels `[row : row + size, column : column + size]`."""

    row: int
    column: int
    size: int
    value: float = 1.0

    def stamp(self, images: NDArray[np.float32], generator: np.random.Generator | None = None) -> NDArray[np.float32]:
        """A triggered copy of `images` `[..., height, width]`; nothing is drawn."""
        stamped = images.copy()
        stamped[..., self.row : self.row + self.size, self.column : self.column + self.size] = self.value
        return stamped


def changed_patches(before: NDArray[np.float32], after: NDArray[np.float32], patch_size: int) -> NDArray[np.bool_]:
    """Which patches of images `[N, C, height, width]` differ, bool `[N, patches]`, row by row."""
    count, _, height, width = before.shape
    different = (before != after).any(axis=1)
    blocks = different.reshape(count, height // patch_size, patch_size, width // patch_size, patch_size)
    changed: NDArray[np.bool_] = blocks.any(axis=(2, 4)).reshape(count, -1)
    return changed


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
