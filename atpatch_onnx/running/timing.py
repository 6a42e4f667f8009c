"""How long forms of one computation take, against each other: runs in turns, ratios with intervals.

Two sessions of one file differ by up to a few hundredths for as long as they live: by where their weights happen to lie
in memory. So forms are opened several times, and an interval is over these as well as over runs. In a round each form
runs once, in an order that is drawn anew, so that whatever else the machine does meets all of them.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.running.sessions import Progress, silent

DRAWS = 2_000
"""Of the bootstrap."""

WARM = 2
"""Runs of each form, each time it is opened, before anything is timed: onnxruntime plans its memory by the first."""

Run = Callable[[], object]
"""What is timed."""


@dataclass(frozen=True)
class Ratio:
    """One form's time over another's, with its 95 % interval."""

    value: float
    low: float
    high: float


def in_turns(
    forms: Mapping[str, Callable[[], Run]],
    *,
    sessions: int,
    rounds: int,
    seed: int = 0,
    pause: float = 0.0,
    progress: Progress = silent,
    stage: str = "timing",
) -> dict[str, NDArray[np.float64]]:
    """Seconds that runs of each form take, `[sessions, rounds a session]`.

    Args:
        forms: What opens each form; it is let go of before it is opened again.
        sessions: How often.
        rounds: How often each form runs in all, at least; the sessions share them evenly.
        seed: Of the order in which forms are opened and run.
        pause: Seconds before each run, for runtimes whose threads wait busily for a while.
        progress: Told after every round.
        stage: What it is told.
    """
    rng = np.random.default_rng(seed)
    sessions = min(sessions, rounds)
    each = -(-rounds // sessions)
    taken = {form: np.zeros((sessions, each)) for form in forms}
    for session in range(sessions):
        for number, seconds in enumerate(_rounds(forms, each, rng, pause)):
            for form in forms:
                taken[form][session, number] = seconds[form]
            progress(stage, session * each + number + 1, sessions * each)
    return taken


def _rounds(
    forms: Mapping[str, Callable[[], Run]], rounds: int, rng: np.random.Generator, pause: float
) -> Iterator[dict[str, float]]:
    """Seconds by form, round after round; what was opened lives as long as this does."""
    opened = {form: forms[form]() for form in rng.permutation(list(forms))}
    for form in opened:
        for _ in range(WARM):
            opened[form]()
    for _ in range(rounds):
        seconds = {}
        for form in rng.permutation(list(forms)):
            time.sleep(pause)
            started = time.perf_counter()
            opened[form]()
            seconds[form] = time.perf_counter() - started
        yield seconds


def ratio(ours: NDArray[np.float64], base: NDArray[np.float64], *, seed: int = 0) -> Ratio:
    """Ratio of two series `[sessions, rounds]` that were taken in turns, with its 95 % bootstrap interval.

    It is the geometric mean, over sessions, of the ratio of medians. The bootstrap draws sessions, and of each its
    rounds (not runs, so that what disturbed a round disturbs both sides of a draw).
    """
    rng = np.random.default_rng(seed)
    sessions, rounds = ours.shape
    of = rng.integers(sessions, size=(DRAWS, sessions, 1))
    drawn = rng.integers(rounds, size=(DRAWS, sessions, rounds))
    low, high = np.percentile(_geometric_mean(ours[of, drawn], base[of, drawn]), (2.5, 97.5))
    return Ratio(float(_geometric_mean(ours, base)), float(low), float(high))


def _geometric_mean(ours: NDArray[np.float64], base: NDArray[np.float64]) -> NDArray[np.float64]:
    ratios = np.median(ours, axis=-1) / np.median(base, axis=-1)
    return np.asarray(np.exp(np.log(ratios).mean(axis=-1)))
