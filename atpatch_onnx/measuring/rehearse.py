"""Would a patch be exact on this model? Found out with a random one, before anyone fits one.

inputs drawn  ->  the base runs  ->  a patch drawn for all sites  ->  a threshold at the first site of every axis
  ->  baked with thresholds that nothing exceeds: every output keeps its bits
  ->  baked with those: flagged tokens are neutral, the rest is the base's, bit for bit; so are the outputs of the
     base that is given these keys and values, and samples without a flag, but for outputs that mix samples
  ->  unbaked: the base again
"""

from collections.abc import Mapping, Sequence
from itertools import count
from typing import Any

import numpy as np
import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.errors import AtPatchError
from atpatch_onnx.fitting.options import Kind
from atpatch_onnx.matching import find_sites
from atpatch_onnx.measuring.drawn import draw_patch
from atpatch_onnx.measuring.rehearse_aiming import aimed
from atpatch_onnx.measuring.rehearse_base import mixing_outputs, run_base, seeded
from atpatch_onnx.measuring.rehearse_checks import fired, unbaked, unfired
from atpatch_onnx.measuring.rehearse_result import Rehearsal, SiteResult, together
from atpatch_onnx.measuring.verify import Check
from atpatch_onnx.running.bits import finite
from atpatch_onnx.running.opening import Libraries, as_model
from atpatch_onnx.running.sessions import Array, Progress, silent

FORMS = {True: "with If", False: "without If"}
"""The forms of a patch, by whether replacements stand in an `If`."""


def rehearse(
    model: graphs.ModelOrPath,
    inputs: Mapping[str, Array] | None = None,
    *,
    seed: int = 0,
    samples: int = 2,
    kind: Kind = "linear",
    optimize: Sequence[bool] = (False, True),
    conditional: Sequence[bool] = (True, False),
    threads: int | None = None,
    custom_ops: Libraries = (),
    progress: Progress = silent,
) -> Rehearsal:
    """Find out whether a patch would be exact on a model, before one is fitted.

    Args:
        model: The base, or its path.
        inputs: One batch of inputs by name, as the model takes them; drawn if there are none.
        seed: What is drawn depends on it alone.
        samples: Samples to draw, where the model leaves their number free.
        kind: Of the detectors.
        optimize: Whether onnxruntime optimizes the graphs; both by default.
        conditional: Whether replacements stand in an `If`; both by default.
        threads: Threads within an operator; None: onnxruntime's choice.
        custom_ops: Libraries that operators of the model come from, as in `load`.
        progress: Told after every step.

    Returns:
        The verdict, of both graphs where a file holds two. That the base does not run, or that a patch cannot be
        baked, is part of it.

    Raises:
        ModelFileError: There is no such file, or it is no model.
    """
    base = seeded(as_model(model, custom_ops))
    inputs = None if inputs is None else {name: np.asarray(array) for name, array in inputs.items()}
    two = graphs.branches(base)
    if two is not None:
        how: dict[str, Any] = {"seed": seed, "samples": samples, "kind": kind, "optimize": optimize}
        how |= {"conditional": conditional, "threads": threads, "progress": progress}
        parts = {name: graphs.branch(base, name) for name in two}
        return together({name: rehearse(part, _of(part, inputs), **how) for name, part in parts.items()})
    rng = np.random.default_rng(seed)
    sites = find_sites(base)
    steps, total = count(1), 2 + 3 * len(conditional)

    def done(stage: str) -> None:
        progress(stage, next(steps), total)

    lengths = sorted({site.keys for site in sites if isinstance(site.keys, int)})  # exporters declare some free
    runs = run_base(base, inputs, rng, samples, optimize, threads, lengths)
    done("running the base")
    if not runs.levels:
        return Rehearsal(False, runs.reason, len(sites), runs.shapes, (), (), (), ())
    nonfinite = tuple(name for name, array in runs.levels[0].outputs.items() if not finite(array))
    if not sites:
        return Rehearsal(True, runs.reason, 0, runs.shapes, nonfinite, (), (), ())
    mixing: tuple[str, ...] = ()
    checks: list[Check] = []
    results: list[SiteResult] = []
    try:
        silent_one = draw_patch(base, sites, rng, kind=kind)
        patch, flagged = aimed(base, sites, silent_one, runs, threads)
        mixing = mixing_outputs(base, runs, flagged, threads)
        done("choosing thresholds")
        for form in conditional:
            quiet, patched = (bake(base, one, conditional=form) for one in (silent_one, patch))
            checks += [unfired(quiet, FORMS[form], level, runs, threads) for level in runs.levels]
            done(f"{FORMS[form]}: nothing fires")
            for level in runs.levels:
                found, of_sites = fired(base, patched, sites, FORMS[form], level, runs, flagged, mixing, threads)
                checks += found
                results += of_sites
            done(f"{FORMS[form]}: some tokens fire")
            checks.append(unbaked(patched, FORMS[form]))
            done(f"{FORMS[form]}: unbaking")
    except AtPatchError as error:
        checks.append(Check("a patch", False, str(error)))
    return Rehearsal(True, runs.reason, len(sites), runs.shapes, nonfinite, mixing, tuple(checks), tuple(results))


def _of(model: ir.Model, inputs: Mapping[str, Array] | None) -> Mapping[str, Array] | None:
    """The inputs that one graph of two takes."""
    taken = {value.name for value in model.graph.inputs}
    return None if inputs is None else {name: array for name, array in inputs.items() if name in taken}
