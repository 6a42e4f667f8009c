"""From a model and a debug set to a patch.

suspects -> split -> collect (fit part) -> train detectors -> trial graph
-> thresholds (calibration part) -> benign attention, sites (validation part) -> patch

From the collecting on once more where the goal is missed: with other column features, with another loss. At last the
sites decide jointly, with the detectors that are there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir

from atpatch_onnx.baking.edits import edited
from atpatch_onnx.baking.features import choose_features, suitable_features
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.errors import FitError, PatchMismatchError, TargetMissedError, require
from atpatch_onnx.fitting.calibrate import Calibration, JointCalibration
from atpatch_onnx.fitting.collect import Columns, collect
from atpatch_onnx.fitting.options import Decision, FitOptions
from atpatch_onnx.fitting.preparation import Prepared, prepare
from atpatch_onnx.fitting.scored import ScoredPart
from atpatch_onnx.fitting.search import Found, Search
from atpatch_onnx.fitting.switchboard import Trial
from atpatch_onnx.fitting.training import Loss
from atpatch_onnx.graph import ModelOrPath, as_model, fingerprint
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.patches.compose import compose
from atpatch_onnx.patches.patch import Detector, Features, Joint, Patch, Redistribution, SitePatch
from atpatch_onnx.running.sessions import Progress, silent


def fit(
    model: ModelOrPath,
    debug: DebugSet,
    options: FitOptions | None = None,
    *,
    after: Sequence[Patch] = (),
    progress: Progress = silent,
) -> Patch:
    """Fit a patch. The same model, debug set and options give the same patch, byte for byte.

    Args:
        model: The base, or its path.
        debug: Pairs for it; split here into fit, calibration and validation parts.
        options: How; the defaults suit most models.
        after: Patches of hidden units that are in the model already while this one is fitted, and are to be baked
            before it.
        progress: Told of what is done.

    Raises:
        NoSiteError: The model has no attention site that can be patched.
        DebugSetError: The debug set does not fit the model, is too small, or shows no effect.
        FitError: A detector cannot be trained, a backdoor's target class cannot be inferred, or a patch of `after` is
            one of attention.
        PatchMismatchError: The patches of `after` are of another model.
        MissingExtraError: torch or scikit-learn is not installed.
        TargetMissedError: The goal is not reached on the validation part; says by how much. With `force` there is a
            patch all the same.
    """
    require("torch", "fit", "fitting a patch")
    require("sklearn", "fit", "fitting a patch")
    base = as_model(model)
    model = _with(base, after)
    options = options or FitOptions()
    prepared = prepare(model, debug, options, progress)
    attempts: list[_Attempt] = []
    for attempt in _attempts(model, prepared, options, progress):
        attempts.append(attempt)
        if not attempt.found.outcome.shortfalls(options.goal):
            break
    best = min(attempts, key=lambda attempt: attempt.found.outcome.nearness(options.goal))
    patch = _patch(base, prepared, best, sum(attempt.settings_tried for attempt in attempts), options)
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


def _attempts(model: ir.Model, prepared: Prepared, options: FitOptions, progress: Progress) -> Iterator["_Attempt"]:
    """One after the other, as they are asked for: every way to decide, with all detectors."""
    first, *others = options.decisions
    trained = []
    for loss, entries in _detectors(model, prepared, options, progress):
        trained.append(_Trained(model, prepared, entries, loss, options, progress))
        yield trained[-1].attempt(first)
    for decision in others:
        for one in trained:
            yield one.attempt(decision)


Entries = Sequence[tuple[AttentionSite, SitePatch]]
"""Every candidate site with its detector and redistribution."""


def _detectors(
    model: ir.Model, prepared: Prepared, options: FitOptions, progress: Progress
) -> Iterator[tuple[Loss, Entries]]:
    """As they are asked for: of cheap column features with the first loss, of the last with each."""
    *cheaper, last = _features_to_try(prepared.sites, options.features)
    for kinds, losses in [(kinds, options.losses[:1]) for kinds in cheaper] + [(last, options.losses)]:
        run = {"batch_size": options.batch_size, "progress": progress}
        columns = collect(model, kinds, prepared.parts.fit, seed=options.seed, **run)  # type: ignore[arg-type]
        for loss in losses:
            yield loss, _trained(columns, loss, options, progress)


def _features_to_try(sites: Sequence[AttentionSite], wanted: Features | None) -> list[dict[AttentionSite, Features]]:
    """What detectors read at each site, round by round; a site for which less is suitable stays with its last."""
    suitable = {site: (choose_features(site, wanted),) if wanted else suitable_features(site) for site in sites}
    rounds = max(map(len, suitable.values()))
    return [
        {site: features[min(number, len(features) - 1)] for site, features in suitable.items()}
        for number in range(rounds)
    ]


@dataclass(frozen=True, eq=False)
class _Attempt:
    """What came of one kind of column features, one loss and one way to decide."""

    loss: Loss
    decision: Decision
    entries: Entries
    calibration: Calibration
    found: Found
    settings_tried: int


def _trained(columns: Sequence[Columns], loss: Loss, options: FitOptions, progress: Progress) -> Entries:
    """Detectors of these columns."""
    from atpatch_onnx.fitting.detector import train_detector  # the only place that needs torch

    entries = []
    for number, column in enumerate(columns, 1):
        detector = train_detector(column, options.training, loss, seed=options.seed)
        entries.append((column.site, _site_patch(column, detector, options)))
        progress(f"training detectors, {loss}", number, len(columns))
    return entries


@dataclass(frozen=True, eq=False)
class _Trained:
    """Trained detectors; each part is scored by them once, however many ways to decide are tried."""

    model: ir.Model
    prepared: Prepared
    entries: Entries
    loss: Loss
    options: FitOptions
    progress: Progress

    def attempt(self, decision: Decision) -> _Attempt:
        """Calibrate, search."""
        alone = Calibration.of(self._calibration_part, self.options)
        calibration: Calibration | JointCalibration = alone
        if decision == "joint":
            fitted = self._scored(self.prepared.parts.fit, "weighing")
            calibration = JointCalibration(alone, fitted, self._calibration_part, seed=self.options.seed)
        search = Search(self._validation_part, calibration, self.options, self.progress)
        found = search.run()
        return _Attempt(self.loss, decision, self.entries, alone, found, search.attempts)

    @cached_property
    def _calibration_part(self) -> ScoredPart:
        return self._scored(self.prepared.parts.calibration, "calibrating")

    @cached_property
    def _validation_part(self) -> ScoredPart:
        return self._scored(self.prepared.parts.validation, "validating")

    def _scored(self, part: DebugSet, stage: str) -> ScoredPart:
        run = {"batch_size": self.options.batch_size, "progress": self.progress}
        return ScoredPart(self._trial, part, stage=f"{stage}, {self.loss}", **run)  # type: ignore[arg-type]

    @cached_property
    def _trial(self) -> Trial:
        return Trial(self.model, self.entries, self.prepared.output)


def _site_patch(columns: Columns, detector: Detector, options: FitOptions) -> SitePatch:
    neutral = columns.neutral if options.value == "neutral" else None
    return SitePatch(columns.site.name, detector, Redistribution(np.ones((1, 1, 1), np.float32), neutral))


def _patch(
    model: ir.Model,
    prepared: Prepared,
    best: _Attempt,
    settings_tried: int,
    options: FitOptions,
) -> Patch:
    found = best.found
    shortfalls = found.outcome.shortfalls(options.goal)
    if shortfalls and not options.force:
        raise TargetMissedError(
            "the validation part",
            expected="the goal of the fit to be met",
            found="; ".join(shortfalls),
            advice="Give more pairs or other candidate sites, relax the goal, or write it anyway (option --force).",
        )
    setting, together, weights = found.setting, found.setting.joint, []
    chosen = []
    for site, entry in best.entries:
        detector = redistribution = None
        if together is not None and site.name in together.weights:
            detector = entry.detector
            weights.append(together.weights[site.name])
        if site.name in setting.thresholds:
            assert entry.detector is not None
            detector = replace(
                entry.detector, threshold=setting.thresholds[site.name], reach=setting.reaches.get(site.name, 0.0)
            )
        if site.name in found.setting.betas:
            assert entry.redistribution is not None
            beta = np.full((1, 1, 1), found.setting.betas[site.name], np.float32)
            redistribution = replace(entry.redistribution, beta=beta)
        if detector or redistribution:
            chosen.append(SitePatch(site.name, detector, redistribution))
    debug, parts = prepared.debug, prepared.parts
    figures: dict[str, Any] = {
        "kind": debug.kind,
        "target": debug.target,
        "meets_target": not shortfalls,
        "shortfalls": list(shortfalls),
        "goal": asdict(options.goal),
        "loss": best.loss,
        "decision": best.decision,
        "value": options.value,
        "pairs": {"fit": len(parts.fit), "calibration": len(parts.calibration), "validation": len(parts.validation)},
        "joint": None if together is None else {"threshold": together.threshold, "reach": together.reach},
        "outcome": found.outcome.to_json(),
        "settings_tried": settings_tried,
        "sites": [_site_figures(site, best.calibration, found) for site, _ in best.entries],
    }
    joint = None
    if together is not None:
        threshold, reach = (float(np.float32(number)) for number in (together.threshold, together.reach))
        joint = Joint(np.array(weights, np.float32), threshold, reach)
    return Patch(base=fingerprint(model), sites=tuple(chosen), figures=figures, joint=joint)


def _site_figures(site: AttentionSite, calibration: Calibration, found: Found) -> dict[str, Any]:
    """What was found of one candidate site, on the calibration part; alone, it would have the whole budget.

    Recall and precision are of the threshold as it is, not of the lower one that flagged inputs may have.
    """
    name = site.name
    threshold = found.setting.thresholds.get(name, calibration.thresholds([name])[name])
    anomalous, benign = calibration.anomalous[name] > threshold, calibration.benign[name] > threshold
    false = float(benign.mean()) if benign.size else 0.0
    roles = [role for role, element in found.elements if element == name]
    together = found.setting.joint
    return {
        "site": name,
        "separation": calibration.separation(name),
        "gap": calibration.gap(name),
        "recall": float(anomalous.mean()),
        "precision": float(anomalous.sum() / max(anomalous.sum() + benign.sum(), 1)),
        "column_flag_rate": false,
        "clean_flag_rate": float((calibration.clean[name] > threshold).mean()),
        "threshold": threshold,
        "reach": found.setting.reaches.get(name, 0.0),
        "weight": together.weights.get(name, 0.0) if together else None,
        "detects": name in found.setting.thresholds or (together is not None and name in together.weights),
        "redistributes": "redistribute" in roles,
        "beta": found.setting.betas.get(name),
        "without": {role: found.without[role, name].to_json() for role in roles if (role, name) in found.without},
    }
