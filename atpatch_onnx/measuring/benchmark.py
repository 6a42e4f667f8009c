"""What a patch costs: base and patched model in turns, in one process, on clean and on flagged inputs.

A figure is a ratio of medians of runs taken in turns (`timing`). Beside it stands what another session of the base
comes to: that much two equal things differ. Whether inputs are flagged is decided by thresholds that nothing, or
everything, exceeds, which stand in for the patch's own (`FileSession`): every token is scored as in service. What a
flagged input costs does not depend on how many of its tokens are flagged.
"""

import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.errors import BenchmarkError
from atpatch_onnx.fitting.options import Kind
from atpatch_onnx.matching import batching, find_sites
from atpatch_onnx.measuring.drawn import NEVER, draw_patch
from atpatch_onnx.patches.patch import Patch
from atpatch_onnx.running.batching import Batching
from atpatch_onnx.running.bound import BoundRun
from atpatch_onnx.running.drawing import draw_inputs
from atpatch_onnx.running.opening import Libraries, load
from atpatch_onnx.running.placement import placement
from atpatch_onnx.running.providers import Providers, first, on_cpu
from atpatch_onnx.running.sessions import Array, FileSession, Progress, SessionOptions, silent
from atpatch_onnx.running.timing import Ratio, Run, in_turns, ratio


@dataclass(frozen=True)
class Timing:
    """One batch size and number of threads."""

    batch: int
    threads: int
    rounds: int
    base_ms: float
    """Median of the base, milliseconds a batch."""

    clean: Ratio
    """Patched over base, inputs of which nothing is flagged."""

    flagged: Ratio
    """Patched over base, every input flagged."""

    itself: Ratio
    """Another session of the base over the base."""


RATIOS = ("clean", "flagged", "itself")
"""Of a timing."""

RUNS = 3
"""Of which the peak of memory is taken: onnxruntime's settles after the second."""


@dataclass(frozen=True)
class Benchmark:
    """What a patch costs."""

    patch: str
    """Its id, or `synthetic`."""

    conditional: bool
    sites: int
    detecting: int
    timings: tuple[Timing, ...]
    memory: float | None
    """Peak memory of clean inputs at the largest batch, patched over base: what loading and running adds to the
    process. None where the system does not tell, and of other devices."""

    provider: str
    """onnxruntime's name of what was asked to run both."""

    cuda_graph: bool
    ran: Mapping[str, Any] | None
    """How many nodes ran on which provider, of the patched file and of the patch; None where all did on the CPU."""

    def to_json(self) -> dict[str, Any]:
        """JSON types only; one entry of `timings` for each batch size and number of threads."""
        timings = [
            {
                **{name: value for name, value in asdict(one).items() if name not in RATIOS},
                **{f"{name}_ratio": getattr(one, name).value for name in RATIOS},
                **{f"{name}_interval": [getattr(one, name).low, getattr(one, name).high] for name in RATIOS},
            }
            for one in self.timings
        ]
        return {
            "patch": self.patch,
            "conditional": self.conditional,
            "sites": self.sites,
            "detecting": self.detecting,
            "timings": timings,
            "memory_ratio": self.memory,
            "provider": self.provider,
            "cuda_graph": self.cuda_graph,
            "ran": self.ran,
        }


def benchmark(
    base: str | os.PathLike[str],
    patched: str | os.PathLike[str] | None = None,
    *,
    target: str = "cpu",
    detectors: Kind = "linear",
    batches: Sequence[int] = (1, 8),
    threads: Sequence[int] = (2,),
    length: int = 128,
    past: int | None = None,
    rounds: int = 40,
    sessions: int = 4,
    memory: bool = True,
    providers: Providers = ("cpu",),
    cuda_graph: bool = False,
    custom_ops: Libraries = (),
    seed: int = 0,
    progress: Progress = silent,
) -> Benchmark:
    """Time a patched file against its base, or a drawn patch at every site of the base.

    Args:
        base: The fastest unpatched form of the model: the file itself, its fused form if there is one.
        patched: The patched file; None: a patch is drawn that detects and redistributes at every site.
        target: How a drawn patch is written, a key of `TARGETS`.
        detectors: Of a drawn patch.
        batches: Sizes to time; those that the model does not leave free are timed once.
        threads: Numbers of threads to time.
        length: Of every axis that is free, but for the batch: tokens.
        past: Tokens in caches whose size is free: with a length of 1, what a step of decoding costs.
        rounds: How often each form is timed, at least.
        sessions: How often each form is opened for that.
        memory: Whether to measure that as well, in separate processes; of the CPU only.
        providers: What is to run both, names of `running.providers.PROVIDERS`. On others than the CPU inputs and
            outputs stay on the device (IO binding).
        cuda_graph: Whether runs are recorded and played again, where the provider can.
        custom_ops: Libraries that operators of the model come from, as in `load`.
        seed: Of inputs, order and bootstrap.
        progress: Told after every round.

    Raises:
        BenchmarkError: A number is not positive, or the sizes of the base's maps are not known, so that no patch can be
            drawn.
        ModelFileError, RunError, UnbakeError: A file cannot be read, is refused, or is not patched.
        RunError: onnxruntime has no such provider, it does not start, or cannot record runs.
    """
    place = _On(providers, cuda_graph)
    given = {"batches": batches, "threads": threads, "rounds": [rounds], "sessions": [sessions], "length": [length]}
    if past is not None and past < 0:
        raise BenchmarkError("past", expected="a number from 0 on", found=str(past), advice="Give another.")
    for name, numbers in given.items():
        if not numbers or min(numbers) < 1:
            raise BenchmarkError(name, expected="numbers from 1 on", found=str(list(numbers)), advice="Give others.")
    model = load(base, custom_ops=custom_ops)
    with tempfile.TemporaryDirectory() as folder:
        files = _Files(
            Path(base),
            Path(patched) if patched is not None else _synthetic(model, target, detectors, Path(folder), seed),
            custom_ops,
        )
        record = read_record(graphs.load(files.patched))
        where = batching(model)
        rngs = ((batch, np.random.default_rng(seed)) for batch in sorted(batches))
        drawn = [
            draw_inputs(model, rng, samples=batch, length=length, past=past, batching=where) for batch, rng in rngs
        ]
        known = {tuple(array.shape for array in of.values()): of for of in drawn}
        turns: dict[str, Any] = {"rounds": rounds, "sessions": sessions, "seed": seed, "progress": progress}
        timings = [_timed(files, of, where, count, place, **turns) for of in known.values() for count in threads]
        most = list(known.values())[-1]
        peaks = _peaks(files, most, max(threads)) if memory and on_cpu(providers) else None
        ran = None if on_cpu(providers) else placement(files.patched, most, providers, custom_ops=custom_ops).to_json()
    return Benchmark(
        patch=record.patch if patched is not None else "synthetic",
        conditional=record.conditional,
        sites=len(record.sites),
        detecting=sum(site.own is not None for site in record.sites),
        timings=tuple(timings),
        memory=None if peaks is None else peaks[1] / peaks[0],
        provider=first(providers).name,
        cuda_graph=cuda_graph,
        ran=ran,
    )


@dataclass(frozen=True)
class _On:
    """Where runs are timed."""

    providers: Providers = ("cpu",)
    recorded: bool = False


@dataclass(frozen=True)
class _Files:
    base: Path
    patched: Path
    custom_ops: Libraries = ()

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


def _synthetic(model: ir.Model, target: str, detectors: Kind, folder: Path, seed: int) -> Path:
    """A file with a drawn patch at every site, its detectors as large as those of a fit."""
    path = folder / "patched.onnx"
    graphs.save(bake(model, synthetic_patch(model, detectors, seed=seed), target=target), path, external="link")
    return path


def synthetic_patch(model: ir.Model, detectors: Kind = "linear", *, seed: int = 0) -> Patch:
    """A patch that detects and redistributes at every site, drawn at random, of the sizes that a fit gives it.

    Raises:
        BenchmarkError: The model has no site.
    """
    sites = find_sites(model)
    if not sites:
        raise BenchmarkError(
            "the model", expected="an attention site", found="none", advice="See `atpatch sites` for the reasons."
        )
    return draw_patch(model, sites, np.random.default_rng(seed), kind=detectors)


def _options(threads: int) -> SessionOptions:
    options = SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    return options


def _timed(
    files: _Files, inputs: Mapping[str, Array], where: Batching, threads: int, on: _On, *, seed: int, **turns: Any
) -> Timing:
    batch = next(len(array) for array in where.samples_first(inputs).values() if array.ndim)
    how: dict[str, Any] = {"threads": threads, "providers": on.providers, "cuda_graph": on.recorded}
    how["custom_ops"] = files.custom_ops
    opened = {form: opens(path, weights, inputs, **how) for form, (path, weights) in files.forms().items()}
    stage = f"timing batches of {batch}, {threads} threads"
    taken = in_turns({**opened, "itself": opened["base"]}, seed=seed, stage=stage, **turns)
    ratios = {name: ratio(taken[name], taken["base"], seed=seed) for name in RATIOS}
    return Timing(batch, threads, taken["base"].size, float(1000 * np.median(taken["base"])), **ratios)


def opens(
    path: Path,
    weights: Mapping[str, Array],
    inputs: Mapping[str, Array],
    threads: int,
    providers: Providers = ("cpu",),
    cuda_graph: bool = False,
    custom_ops: Libraries = (),
) -> Callable[[], Run]:
    """What opens a file with these weights, for runs on these inputs."""

    def opened(*, recorded: bool = False) -> FileSession:
        how: dict[str, Any] = {"options": _options(threads), "providers": providers, "custom_ops": custom_ops}
        return FileSession(path, weights, recorded=recorded, **how)

    if on_cpu(providers) and not cuda_graph:

        def open_file() -> Run:
            session = opened().session
            return lambda: session.run(None, dict(inputs))

        return open_file

    def open_bound() -> Run:
        once = opened().session
        names = [output.name for output in once.get_outputs()]
        like = dict(zip(names, once.run(None, dict(inputs)), strict=True))
        return BoundRun(opened(recorded=cuda_graph), inputs, like, providers)

    return open_bound


def _peaks(files: _Files, inputs: Mapping[str, Array], threads: int) -> tuple[int, int] | None:
    """Bytes that loading and running adds at most, of the base and of the patched file on clean inputs."""
    if sys.platform == "win32":
        return None
    forms, found = files.forms(), []
    for form in ("base", "clean"):
        path, weights = forms[form]
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
            found.append(fresh.submit(_peak, path, weights, dict(inputs), threads, files.custom_ops).result())
    return found[0], found[1]


def _peak(
    path: Path, weights: Mapping[str, Array], inputs: Mapping[str, Array], threads: int, custom_ops: Libraries
) -> int:
    """In a separate process: the peak of resident memory over what it was before."""
    before = _peak_so_far()
    session = FileSession(path, weights, options=_options(threads), custom_ops=custom_ops)
    for _ in range(RUNS):
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
