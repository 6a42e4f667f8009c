"""Would a patch be exact on this model? Found out with a random one, before anyone fits one.

    inputs drawn  ->  the base runs  ->  a patch drawn for all sites  ->  thresholds in gaps of the observed scores
      ->  baked with thresholds that nothing exceeds: every output keeps its bits
      ->  baked with those: every site as the numpy reference, samples without a flag keep their bits,
         but for outputs that mix samples in the base already
      ->  unbaked: the base again

Thresholds are chosen such that one sample of the batch has flags and the others have none, as far as the drawn scores
allow it, and such that at least half of its columns stay benign.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.emission import Emission
from atpatch_onnx.errors import AtPatchError
from atpatch_onnx.matching import find_sites
from atpatch_onnx.measuring.rehearse_aiming import aimed, draw_entries
from atpatch_onnx.measuring.rehearse_base import look_inside, run_base, seeded
from atpatch_onnx.measuring.rehearse_checks import fired, silenced, unbaked, unfired
from atpatch_onnx.measuring.rehearse_mixing import mixing_outputs
from atpatch_onnx.measuring.rehearse_result import Rehearsal, SiteNumbers
from atpatch_onnx.measuring.verify import Check
from atpatch_onnx.patches.patch import Patch
from atpatch_onnx.running.sessions import Array, Progress, silent

__all__ = ["Rehearsal", "SiteNumbers", "rehearse"]


def rehearse(
    model: graphs.ModelOrPath,
    inputs: Mapping[str, Array] | None = None,
    *,
    seed: int = 0,
    samples: int = 2,
    optimize: Sequence[bool] = (False, True),
    emissions: Sequence[Emission] | None = None,
    threads: int | None = None,
    progress: Progress = silent,
) -> Rehearsal:
    """Find out whether a patch would be exact on a model, before one is fitted.

    Args:
        model: The base, or its path.
        inputs: One batch of inputs, `[samples, ...]` by name; drawn if there are none.
        seed: What is drawn depends on it alone.
        samples: Samples to draw, where the model leaves their number free.
        optimize: Whether onnxruntime optimizes the graphs; both by default.
        emissions: Those to try; both by default, only `branchless` for models in half precision, as `bake` does.
        threads: Threads within an operator; None: onnxruntime's choice.
        progress: Told after every step.

    Returns:
        The verdict. That the base does not run, or that a patch cannot be baked, is part of it.

    Raises:
        ModelFileError: There is no such file, or it is no model.
    """
    base = seeded(graphs.as_model(model))
    rng = np.random.default_rng(seed)
    sites = find_sites(base)
    if emissions is None:
        halves = any(site.dtype != ir.DataType.FLOAT.name for site in sites)
        emissions = (Emission.BRANCHLESS,) if halves else tuple(Emission)
    steps = _Steps(progress, 2 + 3 * len(emissions))
    runs = run_base(base, inputs, rng, samples, optimize, threads)
    steps.done("running the base")
    if not runs.levels:
        return Rehearsal(False, runs.reason, len(sites), runs.shapes, (), (), (), ())
    nonfinite = tuple(name for name, array in runs.levels[0].outputs.items() if not _finite(array))
    if not sites:
        return Rehearsal(True, runs.reason, 0, runs.shapes, nonfinite, (), (), ())
    mixing: tuple[str, ...] = ()
    checks: list[Check] = []
    numbers: list[SiteNumbers] = []
    try:
        inside = [look_inside(base, sites, level, runs.inputs, threads) for level in runs.levels]
        entries = draw_entries(sites, inside[0], rng)
        entries, flagged = aimed(base, sites, entries, runs, emissions[0], rng, threads)
        patch = Patch(graphs.fingerprint(base), entries)
        mixing = mixing_outputs(base, runs, flagged, threads)
        steps.done("choosing thresholds")
        for emission in emissions:
            patched = bake(base, patch, emission=emission)
            quiet = silenced(patched)
            for level in runs.levels:
                checks += unfired(quiet, emission, level, runs.inputs, threads)
            steps.done(f"{emission}: nothing fires")
            for level, own in zip(runs.levels, inside, strict=True):
                found, of_sites = fired(patched, sites, emission, level, own, runs.inputs, mixing, threads)
                checks += found
                numbers += of_sites
            steps.done(f"{emission}: some columns fire")
            checks.append(unbaked(patched, emission))
            steps.done(f"{emission}: unbaking")
    except AtPatchError as error:
        checks.append(Check("a patch", False, str(error)))
    return Rehearsal(True, runs.reason, len(sites), runs.shapes, nonfinite, mixing, tuple(checks), tuple(numbers))


class _Steps:
    """Counts what is done."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress, self._count, self._total = progress, 0, total

    def done(self, stage: str) -> None:
        self._count += 1
        self._progress(stage, self._count, self._total)


def _finite(array: Array) -> bool:
    return array.dtype.kind not in "fc" or bool(np.isfinite(array).all())
