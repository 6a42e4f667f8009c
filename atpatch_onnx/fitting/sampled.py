"""Which tokens are kept to train on: a bounded sample, drawn for the seed and the number of a row, in whatever order.

What is drawn for a row is where it would be in one long sequence of random numbers (`PCG64.advance`). So it is the same
wherever and whenever a row is read. How many tokens there are of each kind is known before any model runs, from the
suspects alone: where they are more than may be kept, each row's tokens get a number between 0 and 1, tokens below a
share are handed in, and of these, those with the smallest numbers are kept.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

KINDS = ("anomalous", "hard", "benign")

MAX_BENIGN = 8
"""Benign tokens kept of one input, besides the suspects' own positions."""

_SPARE = 4.0
"""Standard deviations above the mean that are handed in, so that enough are there."""


_BELOW_ONE = math.nextafter(1.0, 0.0)
"""What no number exceeds: all tokens are handed in, with their numbers."""


@dataclass(frozen=True)
class Shares:
    """Of each kind, the share of tokens that are handed in; 1: all, in the order of rows."""

    anomalous: float = 1.0
    hard: float = 1.0
    benign: float = 1.0


class Draw:
    """Random numbers of some rows.

    Args:
        seed: Of all rows.
        rows: Their numbers, ascending; rows of a batch follow each other, those of the counterfactual side come after
            all of the clean side.
        tokens: Of a row.
        sites: How many there are.
    """

    def __init__(self, seed: int, rows: NDArray[np.int64], tokens: int, sites: int) -> None:
        self._shape = (len(rows), tokens)
        start = int(rows[0]) * tokens * sites
        self._ranks = np.random.Generator(np.random.PCG64(seed).advance(start))
        self._numbers = np.random.Generator(np.random.PCG64([seed, 1]).advance(int(rows[0]) * tokens))
        self._number: Array | None = None

    def kept(
        self, keys: Array, suspects: NDArray[np.bool_], anomalous: NDArray[np.bool_], shares: Shares, site: int
    ) -> Iterator[tuple[str, Array]]:
        """Keys `[tokens, features]` by kind, and under `KIND/drawn` their numbers where not all may be kept.

        Args:
            keys: `[batch, tokens, features]`.
            suspects: `[batch, tokens]`.
            anomalous: `[batch, tokens]`: those that a detector should name.
            shares: Of each kind.
            site: Its number; sites are asked for in their order, each once.
        """
        usual = ~(anomalous | suspects)
        rank = np.where(usual, self._ranks.random(self._shape), np.inf).argsort(axis=1).argsort(axis=1)
        masks = {"anomalous": anomalous, "hard": suspects & ~anomalous, "benign": usual & (rank < MAX_BENIGN)}
        for kind, mask in masks.items():
            share = getattr(shares, kind)
            if share < 1:
                if self._number is None:
                    self._number = self._numbers.random(self._shape)
                mask = mask & (self._number <= share)
                yield f"{kind}/drawn", self._number[mask]
            yield kind, keys[mask]


class Bounded:
    """What is kept of one site, up to a bound.

    Args:
        features: Of a key.
    """

    def __init__(self, features: int) -> None:
        self._empty = np.zeros((0, features), np.float32)
        self._most: dict[tuple[str, str], int] = {}
        self._rows: dict[str, list[Array]] = {kind: [] for kind in KINDS}
        self._side: dict[str, list[dict[str, Array]]] = {kind: [] for kind in KINDS}

    def shares(self, most: int, side: str, suspects: NDArray[np.bool_], anomalous: NDArray[np.bool_]) -> Shares:
        """The shares of a side; the clean side comes first, and leaves room for the other.

        Args:
            most: Bytes for one site, all kinds together.
            side: `clean` or `counterfactual`.
            suspects: Of all rows of the side, `[rows, tokens]`.
            anomalous: The same.
        """
        self._close()
        counts = {
            "anomalous": int(anomalous.sum()),
            "hard": int((suspects & ~anomalous).sum()),
            "benign": int(np.minimum((~(suspects | anomalous)).sum(axis=1), MAX_BENIGN).sum()),
        }
        row = self._empty.shape[1] * self._empty.itemsize
        found: dict[str, float] = {}
        for kind, count in counts.items():
            half = side == "clean" and kind != "hard"  # which is of the clean side only
            room = int((0.5 if half else 1.0) * most / len(KINDS)) - sum(rows.nbytes for rows in self._rows[kind])
            self._most[kind, side] = left = max(room, 0) // row
            wanted = (left + _SPARE * math.sqrt(left + 1)) / max(count, 1)
            found[kind] = 1.0 if count <= left else min(wanted, _BELOW_ONE)
        return Shares(**found)

    def add(self, side: str, kept: Mapping[str, Array]) -> None:
        """Add what a batch of a side hands in; batches in their order."""
        for kind in KINDS:
            if kind in kept and len(kept[kind]):
                one = {"rows": kept[kind], "drawn": kept.get(f"{kind}/drawn", np.zeros(len(kept[kind])))}
                self._side[kind].append(one)
        self._last = side

    def rows(self) -> dict[str, Array]:
        """The keys of each kind, `[tokens, features]`."""
        self._close()
        return {kind: np.concatenate([self._empty, *rows]) for kind, rows in self._rows.items()}

    def _close(self) -> None:
        """Keep those with the smallest numbers of a side that is read."""
        for kind, parts in self._side.items():
            if parts:
                rows, drawn = (np.concatenate([part[name] for part in parts]) for name in ("rows", "drawn"))
                chosen = np.sort(np.argsort(drawn, kind="stable")[: self._most[kind, self._last]])
                self._rows[kind].append(np.ascontiguousarray(rows[chosen]))
            parts.clear()
