"""What a patch costs: base and patched model in turns, in one process, on clean and on flagged inputs.

A figure is a ratio of medians over rounds. In a round each form runs once, in an order that is drawn anew, so that
whatever else the machine does meets all of them. Its interval is a bootstrap over rounds. Whether inputs are flagged is
decided by thresholds that nothing, or everything, exceeds, which stand in for the patch's own (`FileSession`): every
column is scored as in service. What a flagged input costs does not depend on how many of its columns are flagged.
"""

import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx import graph as graphs
from atpatch_onnx.bake import bake
from atpatch_onnx.errors import BenchmarkError
from atpatch_onnx.features import choose_features, feature_count
from atpatch_onnx.matching import find_sites
from atpatch_onnx.metadata import read_record
from atpatch_onnx.options import Decision
from atpatch_onnx.patch import Features, Joint, Patch, SitePatch
from atpatch_onnx.rehearsal.drawing import NEVER, draw_detector, draw_inputs, draw_redistribution
from atpatch_onnx.runtime import Array, FileSession, Progress, SessionOptions, silent
from atpatch_onnx.training import Training

DRAWS = 2_000
"""Of the bootstrap."""

WARM = 3
"""Runs of each form before anything is timed."""


@dataclass(frozen=True)
class Ratio:
    """Patched over base, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Timing:
    """One batch size and number of threads."""

    batch: int
    threads: int
    rounds: int
    base_ms: float
    """Median of the base, milliseconds a batch."""

    clean: Ratio
    flagged: Ratio


@dataclass(frozen=True)
class Benchmark:
    """What a patch costs."""

    patch: str
    """Its id, or `synthetic`."""

    emission: str
    sites: int
    detecting: int
    timings: tuple[Timing, ...]
    memory: float | None
    """Peak memory of clean inputs at the largest batch, patched over base: what loading and running adds to the
    process. None where the system does not tell."""

    def to_json(self) -> dict[str, Any]:
        """JSON types only; one entry of `timings` for each batch size and number of threads."""
        timings = [
            {
                **{name: value for name, value in asdict(one).items() if name not in ("clean", "flagged")},
                "clean_ratio": one.clean.value,
                "clean_interval": [one.clean.low, one.clean.high],
                "flagged_ratio": one.flagged.value,
                "flagged_interval": [one.flagged.low, one.flagged.high],
            }
            for one in self.timings
        ]
        return {
            "patch": self.patch,
            "emission": self.emission,
            "sites": self.sites,
            "detecting": self.detecting,
            "timings": timings,
            "memory_ratio": self.memory,
        }


def benchmark(
    base: str | os.PathLike[str],
    patched: str | os.PathLike[str] | None = None,
    *,
    target: str = "cpu",
    features: Features | None = None,
    decision: Decision = "alone",
    batches: Sequence[int] = (1, 8),
    threads: Sequence[int] = (2,),
    length: int = 128,
    rounds: int = 40,
    memory: bool = True,
    seed: int = 0,
    progress: Progress = silent,
) -> Benchmark:
    """Time a patched file against its base, or a drawn patch at every site of the base.

    Args:
        base: The fastest unpatched form of the model: the file itself, its fused form if there is one.
        patched: The patched file; None: a patch is drawn that detects and redistributes at every site.
        target: How a drawn patch is written, a key of `TARGETS`.
        features: What the detectors of a drawn patch read, where a site has it; None: what `fit` would choose.
        decision: How the sites of a drawn patch decide; those of the first token axis, where they do jointly.
        batches: Sizes to time; those that the model does not leave free are timed once.
        threads: Numbers of threads to time.
        length: Of every axis that is free, but for the batch: tokens.
        rounds: How often each form is timed.
        memory: Whether to measure that as well, in processes of their own.
        seed: Of inputs, order and bootstrap.
        progress: Told after every round.

    Raises:
        BenchmarkError: A number is not positive, or the sizes of the base's maps are not known, so that no patch can be
            drawn.
        ModelFileError, RunError, StripError: A file cannot be read, is refused, or is not patched.
    """
    for name, numbers in (("batches", batches), ("threads", threads), ("rounds", [rounds]), ("length", [length])):
        if not numbers or min(numbers) < 1:
            raise BenchmarkError(name, expected="numbers from 1 on", found=str(list(numbers)), advice="Give others.")
    with tempfile.TemporaryDirectory() as folder:
        files = _Files(
            Path(base),
            Path(patched) if patched is not None else _synthetic(base, target, features, decision, Path(folder), seed),
        )
        model, record = graphs.load(base), read_record(graphs.load(files.patched))
        known = {tuple(array.shape for array in of.values()): of for of in _inputs(model, batches, length, seed)}
        timings = [_timed(files, of, count, rounds, seed, progress) for of in known.values() for count in threads]
        peaks = _peaks(files, list(known.values())[-1], max(threads)) if memory else None
    return Benchmark(
        patch=record.patch if patched is not None else "synthetic",
        emission=record.emission,
        sites=len(record.sites),
        detecting=sum(site.margin is not None for site in record.sites),
        timings=tuple(timings),
        memory=None if peaks is None else peaks[1] / peaks[0],
    )


@dataclass(frozen=True)
class _Files:
    base: Path
    patched: Path

    def forms(self) -> dict[str, tuple[Path, dict[str, Array]]]:
        """File and weights of each form."""
        return {
            "base": (self.base, {}),
            "clean": (self.patched, self._thresholds(NEVER)),
            "flagged": (self.patched, self._thresholds(-NEVER)),
        }

    def _thresholds(self, value: float) -> dict[str, Array]:
        record = read_record(graphs.load(self.patched))
        return {name: np.array([value], np.float32) for name in record.thresholds}


def _synthetic(
    base: str | os.PathLike[str], target: str, features: Features | None, decision: Decision, folder: Path, seed: int
) -> Path:
    """A file with a drawn patch at every site, its detectors as large as those of a fit."""
    model = graphs.load(base)
    path = folder / "patched.onnx"
    graphs.save(
        bake(model, synthetic_patch(model, features, decision, seed=seed), target=target), path, external="link"
    )
    return path


def synthetic_patch(
    model: ir.Model, wanted: Features | None = None, decision: Decision = "alone", *, seed: int = 0
) -> Patch:
    """A patch that detects and redistributes at every site, drawn at random, of the sizes that a fit gives it.

    Raises:
        BenchmarkError: The model has no site, or the sizes of one are not known.
    """
    rng, sizes, sites = np.random.default_rng(seed), Training(), []
    found = find_sites(model)
    for site in (site for site in found if decision == "alone" or site.token_axis == found[0].token_axis):
        features = choose_features(site, wanted)
        count = feature_count(site, features)
        if count is None or not isinstance(site.kv_heads, int) or not isinstance(site.depth, int):
            raise BenchmarkError(
                f"site {site.name}",
                expected="a known number of heads and depth",
                found=f"{site.heads} heads of depth {site.depth}",
                advice="Fit a patch, and give the patched file.",
            )
        detector = draw_detector(rng, features, count, NEVER, hidden=sizes.hidden, embedding=sizes.embedding)
        sites.append(SitePatch(site.name, detector, draw_redistribution(rng, site.kv_heads, site.depth)))
    if not sites:
        raise BenchmarkError(
            "the model", expected="an attention site", found="none", advice="See `atpatch sites` for the reasons."
        )
    joint = None if decision == "alone" else Joint(np.full(len(sites), 1 / len(sites), np.float32), NEVER)
    return Patch(base=graphs.fingerprint(model), sites=tuple(sites), joint=joint)


def _inputs(model: ir.Model, batches: Iterable[int], length: int, seed: int) -> Iterator[dict[str, Array]]:
    for batch in sorted(batches):
        yield draw_inputs(model, np.random.default_rng(seed), samples=batch, length=length)


def _options(threads: int) -> SessionOptions:
    options = SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    return options


def _timed(
    files: _Files, inputs: Mapping[str, Array], threads: int, rounds: int, seed: int, progress: Progress
) -> Timing:
    """Each form once a round, in an order of its own."""
    sessions = {
        form: FileSession(path, weights, options=_options(threads)) for form, (path, weights) in files.forms().items()
    }
    batch = next(len(array) for array in inputs.values() if array.ndim)
    stage, feed = f"timing batches of {batch}, {threads} threads", dict(inputs)
    seconds: dict[str, list[float]] = {form: [] for form in sessions}
    rng = np.random.default_rng(seed)
    for session in sessions.values():
        for _ in range(WARM):
            session.session.run(None, feed)
    for done in range(1, rounds + 1):
        for form in rng.permutation(list(sessions)):
            started = time.perf_counter()
            sessions[form].session.run(None, feed)
            seconds[form].append(time.perf_counter() - started)
        progress(stage, done, rounds)
    taken = {form: np.array(one) for form, one in seconds.items()}
    return Timing(
        batch=batch,
        threads=threads,
        rounds=rounds,
        base_ms=float(1000 * np.median(taken["base"])),
        clean=ratio(taken["clean"], taken["base"], seed=seed),
        flagged=ratio(taken["flagged"], taken["base"], seed=seed),
    )


def ratio(ours: NDArray[np.float64], base: NDArray[np.float64], *, seed: int = 0) -> Ratio:
    """Ratio of the medians of two series `[rounds]` that were taken in turns, with its 95 % bootstrap interval.

    Rounds are drawn, not runs, so that what disturbed a round disturbs both sides of a draw.
    """
    drawn = np.random.default_rng(seed).integers(len(ours), size=(DRAWS, len(ours)))
    ratios = np.median(ours[drawn], axis=1) / np.median(base[drawn], axis=1)
    low, high = np.percentile(ratios, (2.5, 97.5))
    return Ratio(float(np.median(ours) / np.median(base)), float(low), float(high))


def _peaks(files: _Files, inputs: Mapping[str, Array], threads: int) -> tuple[int, int] | None:
    """Bytes that loading and running adds at most, of the base and of the patched file on clean inputs."""
    if sys.platform == "win32":
        return None
    forms, found = files.forms(), []
    for form in ("base", "clean"):
        path, weights = forms[form]
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            found.append(fresh.submit(_peak, path, weights, dict(inputs), threads).result())
    return found[0], found[1]


def _peak(path: Path, weights: Mapping[str, Array], inputs: Mapping[str, Array], threads: int) -> int:
    """In a process of its own: the peak of resident memory over what it was before."""
    before = _peak_so_far()
    session = FileSession(path, weights, options=_options(threads))
    for _ in range(WARM):
        session.session.run(None, dict(inputs))
    return max(_peak_so_far() - before, 1)


def _peak_so_far() -> int:
    """Bytes. On Linux from the process's own status: `getrusage` begins with what the parent process held."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
