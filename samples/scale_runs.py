"""One measurement of `samples.scale`, in its own process: `python -m samples.scale_runs WHAT FOLDER ...`, JSON out.

`local` and `ray` collect readings of a stored debug set (`atpatch_onnx.fitting.collect`), `pieces` times every piece of
it and weighs what is kept of it, `memory` fits and evaluates a set that is larger than the memory it may use.
"""

import argparse
import hashlib
import json
import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import atpatch_onnx as atp
from atpatch_onnx.fitting.collect import Tokens, collect
from atpatch_onnx.fitting.options import Training
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.running.executors import BATCHES, LOCAL, Executor, Job, Kept, Team

BATCH = 32
EMPTY = 2000
"""Pieces without work, of which the way to a worker and back is timed."""


def first_axis(model: Any) -> tuple[AttentionSite, ...]:
    """The sites that a fit would have as candidates."""
    found = atp.find_sites(model)
    return tuple(site for site in found if site.token_axis == found[0].token_axis)


def digest(tokens: tuple[Tokens, ...]) -> str:
    """Tells whether two runs collected the same bytes."""
    content = hashlib.sha256()
    for one in tokens:
        for array in (one.anomalous, one.hard, one.benign, one.neutral.key, one.neutral.value):
            content.update(np.ascontiguousarray(array).tobytes())
    return content.hexdigest()[:16]


BURST = 0.01
"""Seconds between reports of one piece, at the most."""


class Clock:
    """When inputs were done: the rate of all behind the first tenth, which waits for sessions to open."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._seen: list[tuple[float, int]] = []
        self._before = 0
        self._stage = ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Progress, as in `collect`."""
        if stage != self._stage and self._seen:
            self._before = self._seen[-1][1]
        self._stage = stage
        self._seen.append((time.perf_counter(), self._before + done))

    def rate(self) -> dict[str, float]:
        """Inputs a second, and seconds until the first were done."""
        last, every = self._seen[-1]
        at = first = next(number for number, (_, done) in enumerate(self._seen) if done >= every / 10)
        while at < min(first + BATCHES, len(self._seen)) - 1 and self._seen[at + 1][0] - self._seen[at][0] < BURST:
            at += 1  # what a worker hands in at once
        begin, some = self._seen[at]
        return {
            "rate": (every - some) / max(last - begin, 1e-9),
            "start": self._seen[0][0] - self._begun,
            "inputs": every,
        }


def run(folder: Path, executor: AbstractContextManager[Executor]) -> dict[str, Any]:
    """Collect with an executor."""
    model, debug = atp.load(folder / "model.onnx"), atp.DebugSet.load(folder / "set.parquet")
    clock = Clock()
    with executor as runs:
        found = collect(model, first_axis(model), debug, batch_size=BATCH, executor=runs, progress=clock)
    return clock.rate() | {"digest": digest(found)}


@dataclass(eq=False)
class Weighing:
    """Notes how long each piece takes in this process, what is kept of it, and how long that is added up."""

    map_seconds: list[float] = field(default_factory=list)
    fold_seconds: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)

    def team(self, job: Job[Any]) -> Team:
        """One that does as workers do."""
        return _Weighed(self, job.open())


@dataclass(eq=False)
class _Weighed:
    of: Weighing
    opened: Any

    @property
    def at_once(self) -> int:
        return BATCHES

    def map(self, items: Iterable[Any]) -> Iterator[list[Kept]]:
        """Each item, timed."""
        for item in items:
            begun = time.perf_counter()
            kept = list(item.run(self.opened))
            done = time.perf_counter()
            self.of.map_seconds.append(done - begun)
            self.of.sizes.append(sum(array.nbytes for one in kept for array in one.values()))
            yield kept
            self.of.fold_seconds.append(time.perf_counter() - done)


def pieces(folder: Path) -> dict[str, Any]:
    """What a piece takes and leaves, with one thread: as a worker has it."""
    weighing = Weighing()
    found = run(folder, nullcontext(weighing))
    return {
        "map_seconds": weighing.map_seconds,
        "fold_seconds": weighing.fold_seconds,
        "bytes": weighing.sizes,
        "inputs_a_piece": BATCH * BATCHES,
        "digest": found["digest"],
    }


@dataclass(frozen=True)
class Nothing:
    """A job, and its pieces, without work."""

    where = "nothing"

    def open(self) -> None:
        """Nothing."""

    def shipped(self) -> "Nothing":
        """Itself."""
        return self

    def key(self) -> bytes:
        """One for all."""
        return b"nothing"

    def run(self, opened: None) -> list[Kept]:
        """Nothing is done."""
        return [{"nothing": np.zeros(1)}]

    def instead(self, error: Exception) -> list[Kept]:
        """It cannot fail."""
        raise error


def round_trip(workers: int, count: int) -> dict[str, float]:
    """Seconds of the driver for a piece, where workers have nothing to do."""
    from atpatch_onnx.running.on_ray import Ray

    with Ray(workers=workers) as executor:
        team = executor.team(Nothing())
        list(team.map(Nothing() for _ in range(20)))
        begun = time.perf_counter()
        list(team.map(Nothing() for _ in range(count)))
        return {"seconds": (time.perf_counter() - begun) / count}


def memory(folder: Path) -> dict[str, Any]:
    """Fit and evaluate, and say what this process held at most, MiB, after each step."""
    model, debug = atp.load(folder / "model.onnx"), atp.DebugSet.load(folder / "set.parquet")
    found: dict[str, Any] = {"pairs": len(debug), "bytes": sum(array.nbytes for array in debug.clean.values()) * 2}
    found["loaded"] = peak()
    options = atp.FitOptions(training=Training(steps=50), detectors=("linear",), force=True)
    begun = time.perf_counter()
    patch = atp.fit(model, debug, options)
    found |= {"fitted": peak(), "fit_seconds": time.perf_counter() - begun}
    begun = time.perf_counter()
    evaluation = atp.evaluate(model, atp.bake(model, patch), replace(debug, suspects=None))
    found |= {"evaluated": peak(), "evaluate_seconds": time.perf_counter() - begun, "said": str(evaluation)}
    return found


def peak() -> float:
    """What this process held at most until now, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(arguments: list[str] | None = None) -> int:
    """Measure one thing and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("local", "ray", "pieces", "round_trip", "memory"))
    parser.add_argument("folder", type=Path, help="with model.onnx and set.parquet")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--count", type=int, default=EMPTY)
    options = parser.parse_args(arguments)
    if options.what == "ray":
        from atpatch_onnx.running.on_ray import Ray

        found = run(options.folder, Ray(workers=options.workers))
    elif options.what == "round_trip":
        found = round_trip(options.workers, options.count)
    elif options.what == "local":
        found = run(options.folder, nullcontext(LOCAL))
    else:
        found = {"pieces": pieces, "memory": memory}[options.what](options.folder)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
