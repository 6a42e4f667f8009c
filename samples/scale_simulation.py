"""Workers from 1 to 64, simulated from what pieces were measured to take, and the same on paper.

A worker takes the next piece when it is free. The driver has one piece after the other, in their order: it hands one
out and takes what is kept of it (`trip`), which comes over the network, and adds it up (`fold`). No worker may be more
than `AHEAD` pieces a worker before the piece whose turn it is (`atpatch_onnx.running.executors`).
"""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from atpatch_onnx.running.executors import AHEAD

WORKERS = (1, 2, 4, 8, 16, 32, 64)
NETWORK = 1.25e9
"""Bytes a second between machines: 10 Gbit/s, which is assumed, not measured."""

PIECES = 2000
"""Pieces that are simulated, drawn from those measured."""


@dataclass(frozen=True)
class Arithmetic:
    """The same on paper, of mean times."""

    inputs: int
    """Of a piece."""

    map_seconds: float
    """A piece, with one thread."""

    driver_seconds: float
    """What the driver has with a piece: the way there and back, the network, adding it up."""

    bytes: float
    """Kept of a piece."""

    fold_seconds: float
    network_seconds: float

    @property
    def most_workers(self) -> float:
        """Beyond so many the driver is what takes the time."""
        return self.map_seconds / self.driver_seconds

    def rate(self, workers: int) -> float:
        """Inputs a second: of the workers together, or what the driver can take."""
        return self.inputs * min(workers / self.map_seconds, 1 / self.driver_seconds)


def arithmetic(pieces: Mapping[str, Any], trip: float) -> Arithmetic:
    """Of measured pieces, and the measured way there and back."""
    size, fold = float(np.mean(pieces["bytes"])), float(np.mean(pieces["fold_seconds"]))
    whole = list(pieces["map_seconds"][:-1]) or pieces["map_seconds"]  # the last one may be short
    driver = trip + size / NETWORK + fold
    return Arithmetic(pieces["inputs_a_piece"], float(np.mean(whole)), driver, size, fold, size / NETWORK)


def simulate(pieces: Mapping[str, Any], trip: float, workers: int, seed: int = 0) -> tuple[float, float]:
    """Inputs a second, and their share of what the workers could do alone."""
    rng = np.random.default_rng(seed)
    chosen = rng.integers(len(pieces["map_seconds"]), size=PIECES)
    maps = np.array(pieces["map_seconds"])[chosen]
    sizes, folds = (
        np.array(pieces["bytes"])[chosen],
        np.array(pieces["fold_seconds"])[chosen % len(pieces["fold_seconds"])],
    )
    driver = trip + sizes / NETWORK + folds
    free = [0.0] * workers
    taken = np.zeros(PIECES)
    """When the driver had added up each piece."""

    last = 0.0
    for number in range(PIECES):
        begin = heapq.heappop(free)
        if number >= AHEAD * workers:
            begin = max(begin, taken[number - AHEAD * workers])
        end = begin + maps[number]
        heapq.heappush(free, end)
        last = taken[number] = max(last, end) + driver[number]
    rate = pieces["inputs_a_piece"] * PIECES / last
    return float(rate), float(maps.sum() / workers / last)
