"""Scores counted by their value: as many as there are, in bounded memory, and the same in whatever order they come.

A float32 is counted under the whole number that orders like it. While there are at most `MOST` different ones, counts
are exact. Beyond that, all numbers lose their last bit, as often as it takes: a score is then known to the share
`error` of its size. How many bits are lost depends on all scores together, not on their order: what some of them lose
already, all of them lose as well.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST = 2**20
"""Different scores that are counted apart."""

_PENDING = 2**20
"""Scores that are gathered before they are counted."""


@dataclass(frozen=True, eq=False)
class Counts:
    """Scores, the largest last, and how many of either kind have each."""

    scores: NDArray[np.float32]
    wanted: NDArray[np.int64]
    others: NDArray[np.int64]
    error: float
    """What a score may be off, as a share of its size; 0 where all are exact."""


class ScoreCounter:
    """Counts scores of two kinds: of what is wanted, and of all else."""

    def __init__(self) -> None:
        self._keys = np.zeros(0, np.uint32)
        self._counts = np.zeros((0, 2), np.int64)
        self._pending: list[tuple[NDArray[np.uint32], NDArray[np.bool_]]] = []
        self._waiting = self._lost = 0

    def add(self, scores: NDArray[Any], wanted: NDArray[np.bool_]) -> None:
        """Some scores, and which of them are of what is wanted; both of one shape."""
        keys = _keys(np.asarray(scores, np.float32).reshape(-1)) >> np.uint32(self._lost)
        self._pending.append((keys, np.asarray(wanted, np.bool_).reshape(-1)))
        self._waiting += keys.size
        if self._waiting >= _PENDING:
            self._count()

    def counts(self) -> Counts:
        """What was counted so far."""
        self._count()
        error = 0.0 if not self._lost else 2.0 ** (self._lost - 23)  # of 23 bits behind the first
        wanted, others = self._counts.T
        return Counts(_scores(self._keys << np.uint32(self._lost)), wanted, others, error)

    def _count(self) -> None:
        keys = np.concatenate([self._keys, *(one for one, _ in self._pending)])
        counts = np.zeros((len(keys), 2), np.int64)
        counts[: len(self._keys)] = self._counts
        kinds = np.concatenate([np.zeros(0, np.bool_), *(wanted for _, wanted in self._pending)])
        counts[len(self._keys) :, 0], counts[len(self._keys) :, 1] = kinds, ~kinds
        self._pending, self._waiting = [], 0
        self._keys, self._counts = _summed(keys, counts)
        while len(self._keys) > MOST:
            self._lost += 1
            self._keys, self._counts = _summed(self._keys >> np.uint32(1), self._counts)


def _summed(keys: NDArray[np.uint32], counts: NDArray[np.int64]) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """Different keys, ascending, and the sums of their counts."""
    order = np.argsort(keys, kind="stable")
    keys, counts = keys[order], counts[order]
    starts = np.flatnonzero(np.r_[True, keys[1:] != keys[:-1]]) if len(keys) else np.zeros(0, np.int64)
    return keys[starts], np.add.reduceat(counts, starts, axis=0) if len(keys) else counts


_SIGN = np.uint32(2**31)


def _keys(scores: NDArray[np.float32]) -> NDArray[np.uint32]:
    """Whole numbers in the order of the scores; both zeros have one."""
    bits = (scores + np.float32(0)).view(np.uint32)
    return np.where(bits & _SIGN, ~bits, bits | _SIGN)


def _scores(keys: NDArray[np.uint32]) -> NDArray[np.float32]:
    found = np.where(keys & _SIGN, keys ^ _SIGN, ~keys).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(found), np.float32(-np.inf), found)  # which has lost its last bits
