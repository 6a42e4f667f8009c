"""The demo's data: scikit-learn's bundled handwritten digits, 1,797 images of 8 x 8 pixels; nothing is downloaded."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_digits

CLASSES = 10
IMAGE_SIZE = 8


@dataclass(frozen=True)
class Digits:
    """Images `[N, 1, 8, 8]` float32 in [0, 1] and their labels `[N]` int64."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]

    def take(self, indices: NDArray[np.int64]) -> "Digits":
        """The images and labels at `indices`."""
        return Digits(self.images[indices], self.labels[indices])


@dataclass(frozen=True)
class Split:
    """Disjoint, sorted indices `[n]` int64: the evaluation images are never seen by training or by a fit."""

    train: NDArray[np.int64]
    evaluation: NDArray[np.int64]


def load() -> Digits:
    """All digits; no two images are equal, so disjoint indices mean disjoint images."""
    bunch = load_digits()
    images = (bunch.images / 16.0).astype(np.float32)[:, np.newaxis]
    return Digits(images, bunch.target.astype(np.int64))


def split(labels: NDArray[np.int64], *, evaluation: float = 0.3, seed: int = 0) -> Split:
    """Part the indices of `labels` `[N]`, class by class, with a share of `evaluation` held out of each."""
    generator = np.random.default_rng(seed)
    held_out = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        held_out[members[: round(len(members) * evaluation)]] = True
    return Split(np.flatnonzero(~held_out), np.flatnonzero(held_out))
