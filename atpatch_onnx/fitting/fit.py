"""From a model and a debug set to a patch.

suspects -> split -> collect (fit part) -> train detectors -> switchboard
-> thresholds (calibration part) -> sites (validation part) -> patch

From the training on once more where the goal is missed: with a hidden layer in the detectors. Of a fix that is always
on (`FitOptions.always`) nothing is trained: its detectors name tokens by where they stand.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from atpatch_onnx.baking.edits import edited
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.errors import FitError, PatchMismatchError, TargetMissedError, require
from atpatch_onnx.fitting.at_best import at_best
from atpatch_onnx.fitting.calibrate import Calibration
from atpatch_onnx.fitting.collect import Tokens, collect
from atpatch_onnx.fitting.cost import Cost
from atpatch_onnx.fitting.forced import OUTPUT, forced
from atpatch_onnx.fitting.goal import PROMPTS, Outcome
from atpatch_onnx.fitting.options import PLACE, FitOptions, Kind
from atpatch_onnx.fitting.preparation import Prepared, prepare
from atpatch_onnx.fitting.scored import ScoredPart
from atpatch_onnx.fitting.search import Found, Search
from atpatch_onnx.fitting.switchboard import Setting, Switchboard
from atpatch_onnx.graph import ModelOrPath, beginning, fingerprint
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.patches.compose import compose
from atpatch_onnx.patches.patch import Patch, Places, SitePatch
from atpatch_onnx.running.executors import LOCAL, Executor, executing
from atpatch_onnx.running.opening import Libraries, as_model
from atpatch_onnx.running.sessions import Progress, silent


def fit(
    model: ModelOrPath,
    debug: DebugSet,
    options: FitOptions | None = None,
    *,
    after: Sequence[Patch] = (),
    custom_ops: Libraries = (),
    executor: Executor | str = LOCAL,
    progress: Progress = silent,
) -> Patch:
    """Fit a patch. The same model, debug set and options give the same patch, byte for byte, whoever runs the model.

    Args:
        model: The base, or its path.
        debug: Pairs for it, or prompts of a language model; split here into fit, calibration and validation parts.
        options: How; the defaults suit most models.
        after: Patches of hidden units that are in the model already while this one is fitted, and are to be baked
            before it.
        custom_ops: Libraries that operators of the model come from, as in `load`.
        executor: Who runs the model: `local`, `ray`, `ray://HOST:PORT`, or an executor (see `running.executors`).
        progress: Told of what is done.

    Raises:
        NoSiteError: The model has no attention site that can be patched.
        DebugSetError: The debug set does not fit the model, is too small, or shows no effect.
        FitError: A detector cannot be trained, a backdoor's target class cannot be inferred, a fix is to be always on
            where inputs differ in length, or a patch of `after` is one of attention.
        PatchMismatchError: The patches of `after` are of another model.
        RunError: There are prompts, and the model is no decoder.
        MissingExtraError: scikit-learn is not installed, or torch, which a fix that is always on does without.
        TargetMissedError: The goal is not reached on the validation part; says by how much. With `force` there is a
            patch all the same.
    """
    options = options or FitOptions()
    if not options.always:
        require("torch", "fit", "fitting a patch")
    require("sklearn", "fit", "fitting a patch")
    base = as_model(model, custom_ops)
    model = beginning(_with(base, after))
    kind = debug.kind
    if kind == "generation":
        run: dict[str, Any] = {"batch_size": options.batch_size, "progress": progress}
        model, debug = forced(model, debug, steps=options.steps, **run)
        goal = options.goal
        flags = PROMPTS if goal.flags_per_million is None else goal.flags_per_million
        options = replace(options, output=OUTPUT, goal=replace(goal, flags_per_million=flags))
    attempts: list[_Attempt] = []
    with executing(executor) as runs:
        prepared = prepare(model, debug, options, progress, runs)
        for attempt in _attempts(model, prepared, options, progress, runs):
            attempts.append(attempt)
            if not attempt.found.outcome.shortfalls(options.goal):
                break
    best = min(attempts, key=lambda attempt: attempt.found.outcome.nearness(options.goal))
    possible = None
    if kind != "generation" and best.found.outcome.shortfalls(options.goal):
        neutral = {site.name: entry.neutral for site, entry in best.entries if entry.neutral is not None}
        possible = at_best(model, prepared, neutral, options, progress)
        if possible is not None and possible.excess(options.goal) > best.found.outcome.excess(options.goal):
            possible = None  # detectors do better than the suspects say: these are not what makes the difference
    patch = _patch(base, prepared, best, attempts, options, possible)
    if kind == "generation":
        patch = replace(patch, figures={**patch.figures, "kind": kind, "target": None})
    return replace(patch, after=tuple(other.id for other in after))


def _with(base: ir.Model, after: Sequence[Patch]) -> ir.Model:
    """The model with these patches of hidden units in it."""
    if not after:
        return base
    patch = compose(after)
    if patch.sites:
        raise FitError(
            "the patches before the fit",
            expected="patches of hidden units",
            found="one of attention",
            advice="Fit all sites in one patch.",
        )
    if patch.base != fingerprint(base):
        raise PatchMismatchError(
            "the patches before the fit",
            expected=f"patches of this model, {fingerprint(base)}",
            found=f"patches of {patch.base}",
            advice="Use the patches that were made for this model.",
        )
    return edited(base, patch.edits)


WITHOUT_A_FAULT = "with flags without a fault, on the tokens that make the difference, at every site"
"""What `fitting.at_best` looks at, in words."""

Entries = Sequence[tuple[AttentionSite, SitePatch]]
"""Every candidate site with its detector and neutral token."""


@dataclass(frozen=True, eq=False)
class _Attempt:
    """What came of one kind of detectors."""

    detectors: str
    entries: Entries
    calibration: Calibration
    found: Found
    settings_tried: int
    cost: Cost
    unpatched: Outcome
    """Of the base as it is."""


def _attempts(
    model: ir.Model, prepared: Prepared, options: FitOptions, progress: Progress, executor: Executor
) -> Iterator[_Attempt]:
    """One after the other, as they are asked for."""
    run: dict[str, Any] = {"batch_size": options.batch_size, "progress": progress}
    tokens = collect(model, prepared.sites, prepared.parts.fit, seed=options.seed, executor=executor, **run)
    for kind, entries in _candidates(tokens, prepared.debug, options, progress):
        board = Switchboard(model, entries, prepared.output, executor=executor)
        calibration_part = ScoredPart(board, prepared.parts.calibration, stage=f"calibrating, {kind}", **run)
        calibration = Calibration.of(calibration_part, options)
        validation_part = ScoredPart(board, prepared.parts.validation, stage=f"validating, {kind}", **run)
        unpatched = validation_part.outcome(Setting())
        cost = Cost.of(model, entries)
        search = Search(validation_part, calibration, options, progress, cost)
        found = search.run()
        yield _Attempt(kind, entries, calibration, found, search.attempts, cost, unpatched)


def _candidates(
    tokens: Sequence[Tokens], debug: DebugSet, options: FitOptions, progress: Progress
) -> Iterator[tuple[str, Entries]]:
    """What there is to try, by what its detectors go by, one after the other, as it is asked for."""
    if not options.always:
        yield from ((kind, train(tokens, kind, options, progress)) for kind in options.detectors)
        return
    assert debug.suspects is not None, "the suspects were found before, the same in every pair"
    marks = Places(debug.suspects[0].astype(np.float32))
    yield PLACE, [(one.site, SitePatch(one.site.name, marks, one.neutral)) for one in tokens]


def train(tokens: Sequence[Tokens], kind: Kind, options: FitOptions, progress: Progress = silent) -> Entries:
    """Every site with a detector of this kind, and its neutral token."""
    from atpatch_onnx.fitting.detector import train_detector  # the only place that needs torch

    entries = []
    for number, of_site in enumerate(tokens, 1):
        detector = train_detector(of_site, options.training, hidden=kind == "hidden", seed=options.seed)
        entries.append((of_site.site, SitePatch(of_site.site.name, detector, of_site.neutral)))
        progress(f"training detectors, {kind}", number, len(tokens))
    return entries


def _patch(
    model: ir.Model,
    prepared: Prepared,
    best: _Attempt,
    attempts: Sequence[_Attempt],
    options: FitOptions,
    possible: Outcome | None,
) -> Patch:
    found = best.found
    shortfalls = found.outcome.shortfalls(options.goal)
    beyond = () if possible is None else possible.shortfalls(options.goal)
    if shortfalls and not options.force:
        raise _missed(shortfalls, beyond)
    chosen = []
    for site, entry in best.entries:
        detector = neutral = None
        if site.name in found.setting.thresholds:
            assert entry.detector is not None
            detector = replace(entry.detector, threshold=found.setting.thresholds[site.name])
        if site.name in found.setting.redistributing:
            neutral = entry.neutral
        if detector or neutral:
            chosen.append(SitePatch(site.name, detector, neutral))
    debug, parts = prepared.debug, prepared.parts
    figures: dict[str, Any] = {
        "kind": debug.kind,
        "target": debug.target,
        "meets_target": not shortfalls,
        "shortfalls": list(shortfalls),
        "at_best": None if possible is None else {"shortfalls": list(beyond), "outcome": possible.to_json()},
        "goal": asdict(options.goal),
        "reading": "keys",
        "detectors": best.detectors,
        "tried": [
            {"detectors": one.detectors, "shortfalls": list(one.found.outcome.shortfalls(options.goal))}
            for one in attempts
        ],
        "pairs": {"fit": len(parts.fit), "calibration": len(parts.calibration), "validation": len(parts.validation)},
        "outcome": found.outcome.to_json(),
        "unpatched": best.unpatched.to_json(),
        "needless": None if options.always or best.unpatched.shortfalls(options.goal) else best.unpatched.said(),
        "cost": best.cost.to_json(found.elements),
        "settings_tried": sum(one.settings_tried for one in attempts),
        "sites": [_site_figures(site, best.calibration, found) for site, _ in best.entries],
        "left_out": [{"site": site.name, "token_axis": site.token_axis} for site in prepared.left_out],
    }
    return Patch(base=fingerprint(model), sites=tuple(chosen), figures=figures)


def _missed(shortfalls: Sequence[str], beyond: Sequence[str]) -> TargetMissedError:
    advice = "Give more pairs or other candidate sites, relax the goal, or write it anyway (option --force)."
    found = "; ".join(shortfalls)
    if beyond:
        found += f"; not fixable this way: {WITHOUT_A_FAULT}, {'; '.join(beyond)}"
        advice = (
            "What is wrong is not handed over by these tokens alone, or inputs cannot do without them: train the model"
            " again, compare edits of hidden units (atpatch compare), relax the goal, or write it anyway (--force)."
        )
    return TargetMissedError(
        "the validation part", expected="the goal of the fit to be met", found=found, advice=advice
    )


def _site_figures(site: AttentionSite, calibration: Calibration, found: Found) -> dict[str, Any]:
    """What was found of one candidate site, on the calibration part; alone, it would have the whole budget."""
    name = site.name
    threshold = found.setting.thresholds.get(name, calibration.thresholds([name])[name])
    anomalous, benign = calibration.anomalous[name] > threshold, calibration.benign[name] > threshold
    roles = [role for role, element in found.elements if element == name]
    return {
        "site": name,
        "separation": calibration.separation(name),
        "gap": calibration.gap(name),
        "recall": float(anomalous.mean()),
        "precision": float(anomalous.sum() / max(anomalous.sum() + benign.sum(), 1)),
        "column_flag_rate": float(benign.mean()) if benign.size else 0.0,
        "clean_flag_rate": float((calibration.clean[name] > threshold).mean()),
        "threshold": threshold,
        "detects": name in found.setting.thresholds,
        "redistributes": name in found.setting.redistributing,
        "without": {role: found.without[role, name].to_json() for role in roles if (role, name) in found.without},
    }
