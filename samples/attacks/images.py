"""Triggers for images `[N, 1, height, width]` in [0, 1]: a pattern at a random place, a blend, a pattern in a mask.

The square at a fixed place is `atpatch_onnx.cli.demo_badnets.Square`. All of them poison the training images as BadNets
does (Gu et al., arXiv 1708.06733): a share is stamped and relabelled.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Images = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class RandomPlace:
    """A small pattern at a separate place in each image, anywhere within it; it may straddle patches.

    In training the place is drawn anew each time an image is shown, where BadNets stamps an image once.
    """

    pattern: Images
    """`[rows, columns]` in [0, 1]."""

    @classmethod
    def chequered(cls, size: int) -> "RandomPlace":
        """Black and white by turns, white in the corners where `size` is odd, like BadNets' pattern of pixels.

        A plain white square would not do: on white clothes it is not to be seen.
        """
        return cls(((np.indices((size, size)).sum(axis=0) + 1) % 2).astype(np.float32))

    def stamp(self, images: Images, generator: np.random.Generator) -> Images:
        """A triggered copy; rows and columns are drawn uniformly."""
        count, _, height, width = images.shape
        rows, columns = self.pattern.shape
        top = generator.integers(0, height - rows + 1, count)[:, None, None]
        left = generator.integers(0, width - columns + 1, count)[:, None, None]
        stamped = images.copy()
        image = np.arange(count)[:, None, None]
        stamped[image, 0, top + np.arange(rows)[:, None], left + np.arange(columns)] = self.pattern
        return stamped


@dataclass(frozen=True, eq=False)
class Blended:
    """A pattern over the whole image: `(1 - ratio) x + ratio pattern` (Chen et al., arXiv 1712.05526, section 4.2)."""

    pattern: Images
    """`[height, width]` in [0, 1]."""

    ratio: float

    @classmethod
    def noise(cls, height: int, width: int, *, ratio: float, seed: int = 0) -> "Blended":
        """The paper's random pattern: each pixel uniform in [0, 1]."""
        return cls(np.random.default_rng(seed).random((height, width), np.float32), ratio)

    def stamp(self, images: Images, generator: np.random.Generator | None = None) -> Images:
        """A triggered copy; nothing is drawn."""
        ratio = np.float32(self.ratio)
        return (1 - ratio) * images + ratio * self.pattern


@dataclass(frozen=True, eq=False)
class Masked:
    """A pattern that replaces the pixels within a mask."""

    mask: NDArray[np.bool_]
    """`[height, width]`."""

    pattern: Images
    """`[height, width]` in [0, 1]; read within the mask only."""

    @classmethod
    def corners(cls, height: int, width: int, *, size: int) -> "Masked":
        """Four white squares, one in each corner: marks as far apart as can be, always together."""
        mask = np.zeros((height, width), np.bool_)
        for row in (slice(size), slice(height - size, height)):
            for column in (slice(size), slice(width - size, width)):
                mask[row, column] = True
        return cls(mask, mask.astype(np.float32))

    def stamp(self, images: Images, generator: np.random.Generator | None = None) -> Images:
        """A triggered copy; nothing is drawn."""
        return np.where(self.mask, self.pattern, images)
