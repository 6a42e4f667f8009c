"""Executors for tests: one that does pieces in another order, and work that goes wrong on purpose."""

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atpatch_onnx.running.executors import BATCHES, Job, Kept, Team
from atpatch_onnx.running.sessions import Session
from atpatch_onnx.running.shards import Groups

ON_RAY = [
    pytest.mark.slow,
    pytest.mark.xdist_group("ray"),
    pytest.mark.filterwarnings("default:::ray"),
    pytest.mark.filterwarnings(
        "ignore::pytest.PytestUnraisableExceptionWarning"
    ),  # Ray's pipes, closed by the collector
]
"""Marks of tests that start a cluster: one after the other, and without warnings of Ray's own."""


@dataclass(eq=False)
class Shuffling:
    """All pieces are done before any is answered, in an order that is drawn; answers are in order again."""

    seed: int = 0
    done: int = 0

    def team(self, job: Job[Any]) -> Team:
        return _Shuffled(self, job.open())


@dataclass(eq=False)
class _Shuffled:
    of: Shuffling
    opened: Any

    @property
    def at_once(self) -> int:
        return BATCHES

    def map(self, items: Iterable[Any]) -> Iterator[list[Kept]]:
        items = list(items)
        order = np.random.default_rng(self.of.seed).permutation(len(items))
        found = {int(number): list(items[number].run(self.opened)) for number in order}
        self.of.done += len(items)
        yield from (found[number] for number in range(len(items)))


@dataclass(frozen=True)
class Dying:
    """The worker that has the row `at` dies, as often as there is a file fewer in `folder` than `times`."""

    folder: str
    at: int
    times: int

    def __call__(self, sessions: Sequence[Session], batch: Groups) -> Kept:
        rows = batch["marks"]["row"]
        if self.at in rows and len(list(Path(self.folder).iterdir())) < self.times:
            (Path(self.folder) / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"logits": sessions[0].batch(batch["inputs"], ["logits"])["logits"], "row": rows}


@dataclass(frozen=True)
class Failing:
    """An exception of another kind than ours at a row."""

    at: int

    def __call__(self, sessions: Sequence[Session], batch: Groups) -> Kept:
        if self.at in batch["marks"]["row"]:
            raise ZeroDivisionError("at this row")
        return {"row": batch["marks"]["row"]}
