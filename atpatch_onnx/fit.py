"""From a model and a debug set to a patch.

    suspects -> split -> collect (fit part) -> train detectors -> trial graph
             -> thresholds (calibration part) -> benign attention, sites (validation part) -> patch

Where the attack lives differs from model to model: early sites in a vision model, late ones in a text model. So
detecting and redistributing sites are searched for separately, by delta debugging in one session of the trial graph.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.collect import Columns, anomalous_columns, collect, find_suspects, input_specs
from atpatch_onnx.debugset import DebugSet, Split
from atpatch_onnx.deltadebug import ddmin
from atpatch_onnx.errors import FitError, NoSiteError, TargetMissedError, require
from atpatch_onnx.goal import Goal, Outcome, judge
from atpatch_onnx.graph import ModelOrPath, as_model, fingerprint
from atpatch_onnx.matching import find_sites
from atpatch_onnx.metrics import infer_target
from atpatch_onnx.patch import Detector, Features, Patch, Redistribution, SitePatch
from atpatch_onnx.predictions import classes, prediction_output
from atpatch_onnx.probe import choose_features
from atpatch_onnx.runtime import Array, Progress, Session, silent
from atpatch_onnx.sites import AttentionSite
from atpatch_onnx.thresholds import calibrate, gap
from atpatch_onnx.training import Training
from atpatch_onnx.trial import Setting, Trial, TrialResult

BETAS = (1.0, 0.7, 0.5, 0.3, 0.1, 0.03, 0.0)
"""Benign attention is the first of these, the largest, that meets the goal."""

Role = Literal["detect", "redistribute"]
Element = tuple[Role, str]
"""One thing a site may do; what delta debugging switches on and off."""


@dataclass(frozen=True)
class FitOptions:
    """How a patch is fitted."""

    goal: Goal = field(default_factory=Goal)
    training: Training = field(default_factory=Training)

    value: Literal["neutral", "own"] = "neutral"
    """What a flagged token hands over: the site's mean value, or its own as in the paper."""

    betas: tuple[float, ...] = BETAS
    """Benign attention to try, from the largest."""

    features: Features | None = None
    """What detectors read; None: whole columns where the map's size is fixed and unmasked, else summaries."""

    sites: tuple[str, ...] | None = None
    """Names of the candidate sites; None: all on the token axis of the first."""

    output: str | None = None
    """Output that predictions are read from; None: the first float output `[batch, classes]`."""

    batch_size: int = 32
    seed: int = 0

    force: bool = False
    """Write a patch that misses its goal, marked as such."""

    def __post_init__(self) -> None:
        checks = (
            ("value", self.value in ("neutral", "own"), "'neutral' or 'own'"),
            ("betas", bool(self.betas) and all(0 <= beta <= 1 for beta in self.betas), "numbers from 0 to 1"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
        )
        for name, holds, expected in checks:
            if not holds:
                found = repr(getattr(self, name))
                raise FitError(f"option {name}", expected=expected, found=found, advice="Choose an allowed value.")


def fit(
    model: ModelOrPath, debug: DebugSet, options: FitOptions | None = None, *, progress: Progress = silent
) -> Patch:
    """Fit a patch. The same model, debug set and options give the same patch, byte for byte.

    Args:
        model: The base, or its path.
        debug: Pairs for it; split here into fit, calibration and validation parts.
        options: How; the defaults suit most models.
        progress: Told of what is done.

    Raises:
        NoSiteError: The model has no attention site that can be patched.
        DebugSetError: The debug set does not fit the model, is too small, or shows no effect.
        FitError: A detector cannot be trained, or a backdoor's target class cannot be inferred.
        MissingExtraError: torch or scikit-learn is not installed.
        TargetMissedError: The goal is not reached on the validation part; says by how much. With `force` there is a
            patch all the same.
    """
    require("torch", "fit", "fitting a patch")
    require("sklearn", "fit", "fitting a patch")
    from atpatch_onnx.detector import train_detector  # the only place that needs torch

    model = as_model(model)
    options = options or FitOptions()
    found_sites = find_sites(model)
    sites = _candidates(found_sites, options)
    first = next(site for site in found_sites if site.token_axis == sites[0].token_axis)
    debug, parts, output = _prepare(model, first, debug, options, progress)
    kinds = {site: options.features or choose_features(site) for site in sites}
    columns = collect(model, kinds, parts.fit, batch_size=options.batch_size, seed=options.seed, progress=progress)
    training = replace(options.training, seed=options.seed)
    entries = []
    for number, column in enumerate(columns, 1):
        entries.append((column.site, _site_patch(column, train_detector(column, training), options)))
        progress("training detectors", number, len(columns))
    trial = Trial(model, entries, output)
    calibration = Calibration.of(trial, parts.calibration, options, progress)
    search = Search(trial, calibration, parts.validation, options, progress)
    found = search.run()
    return _patch(model, debug, entries, calibration, search, found, parts, options)


def _candidates(found: Sequence[AttentionSite], options: FitOptions) -> tuple[AttentionSite, ...]:
    """The sites that may be patched: those asked for, else all on the token axis of the first."""
    if not found:
        raise NoSiteError(
            "the model",
            expected="at least one attention site",
            found="none that can be patched",
            advice="See why with: atpatch sites MODEL --why",
        )
    if options.sites is None:
        return tuple(site for site in found if site.token_axis == found[0].token_axis)
    names = {site.name for site in found}
    unknown = [name for name in options.sites if name not in names]
    if unknown or not options.sites:
        raise NoSiteError(
            f"site {unknown[0]!r}" if unknown else "option sites",
            expected=f"one of {', '.join(sorted(names))}",
            found="no site of this name" if unknown else "none named",
            advice="List them with: atpatch sites MODEL",
        )
    sites = tuple(site for site in found if site.name in options.sites)
    if len({site.token_axis for site in sites}) > 1:
        raise FitError(
            "option sites",
            expected="sites of one token axis, since flags are carried along it",
            found=", ".join(f"{site.name} on {site.token_axis}" for site in sites),
            advice="Fit one patch for the sites of one axis.",
        )
    return sites


def _prepare(
    model: ir.Model,
    first: AttentionSite,
    debug: DebugSet,
    options: FitOptions,
    progress: Progress,
) -> tuple[DebugSet, Split, str]:
    """Check the debug set against the model, find its target and, at the axis's first site, its suspects; split it."""
    debug.check_inputs(input_specs(model))
    output = prediction_output(model, options.output)
    session = Session(model)
    sides = (("clean", debug.clean), ("counterfactual", debug.counterfactual))
    clean, counterfactual = (
        classes(
            session.collect(
                inputs,
                [output],
                batch_size=options.batch_size,
                progress=progress,
                stage=f"predicting, {side} inputs",
            )[output]
        )
        for side, inputs in sides
    )
    debug.check_effect(clean, counterfactual)
    if debug.kind == "backdoor" and debug.target is None:
        target = infer_target(clean, counterfactual)
        if target is None:
            raise FitError(
                "the debug set",
                expected="a backdoor that sends changed predictions to one class",
                found="changed predictions that go to several",
                advice="Name the target class, or use kind='attribute' for a protected attribute.",
            )
        debug = debug.with_target(target)
    debug = find_suspects(model, [first], debug, batch_size=options.batch_size, progress=progress)
    parts = debug.split(seed=options.seed)
    parts.check_size(options.goal.clean_flag_rate)
    return debug, parts, output


def _site_patch(columns: Columns, detector: Detector, options: FitOptions) -> SitePatch:
    neutral = columns.neutral if options.value == "neutral" else None
    return SitePatch(columns.site.name, detector, Redistribution(np.ones((1, 1, 1), np.float32), neutral))


@dataclass(frozen=True, eq=False)
class Calibration:
    """Scores of the calibration part at every site, from the base as it is."""

    clean: Mapping[str, Array]
    """Largest score over the benign columns of each clean input `[inputs]`, by site."""

    anomalous: Mapping[str, Array]
    """Scores of the anomalous columns `[columns]`, by site."""

    benign: Mapping[str, Array]
    """Scores of the benign columns of the clean inputs `[columns]`, by site."""

    rate: float

    @classmethod
    def of(cls, trial: Trial, part: DebugSet, options: FitOptions, progress: Progress) -> "Calibration":
        """Score the calibration part."""
        on_clean, on_other = anomalous_columns(part)
        run = {"batch_size": options.batch_size, "progress": progress}
        clean = trial.scores(part.clean, stage="calibrating, clean inputs", **run).margins  # type: ignore[arg-type]
        other = trial.scores(part.counterfactual, stage="calibrating, counterfactuals", **run).margins  # type: ignore[arg-type]
        return cls(
            clean={site: np.where(on_clean, -np.inf, scores).max(axis=1) for site, scores in clean.items()},
            anomalous={site: other[site][on_other] for site in other},
            benign={site: scores[~on_clean] for site, scores in clean.items()},
            rate=options.goal.clean_flag_rate,
        )

    def thresholds(self, sites: Sequence[str]) -> dict[str, float]:
        """Thresholds of the detecting `sites`, under one budget for all of them."""
        return calibrate({s: self.clean[s] for s in sites}, {s: self.anomalous[s] for s in sites}, self.rate)

    def separation(self, site: str) -> float:
        """Area under the ROC curve of the site's scores, anomalous against benign columns."""
        from sklearn.metrics import roc_auc_score

        anomalous, benign = self.anomalous[site], self.benign[site]
        labels = np.r_[np.ones(len(anomalous), int), np.zeros(len(benign), int)]
        return float(roc_auc_score(labels, np.r_[anomalous, benign]))

    def gap(self, site: str) -> float:
        """How far anomalous and clean scores of the site are apart."""
        return gap(self.clean[site], self.anomalous[site])


@dataclass(frozen=True)
class Found:
    """What the search ended with."""

    elements: tuple[Element, ...]
    betas: Mapping[str, float]
    outcome: Outcome
    without: Mapping[Element, Outcome]
    """What is left of the fix without each of the elements; where the goal is met, each of these misses it."""


class Search:
    """Find benign attention and a 1-minimal set of detecting and redistributing sites that meets the goal.

    Args:
        trial: The session in which sites are switched on and off.
        calibration: Where thresholds come from.
        part: The validation part.
        options: Goal and benign attention to try.
        progress: Told of every attempt.
    """

    def __init__(
        self, trial: Trial, calibration: Calibration, part: DebugSet, options: FitOptions, progress: Progress
    ) -> None:
        self._trial, self._calibration, self._part = trial, calibration, part
        self._options, self._progress = options, progress
        self._base_clean = self._score(part.clean, "validating, clean inputs")
        self._base_other = self._score(part.counterfactual, "validating, counterfactuals")
        self._anomalous = anomalous_columns(part)
        self.attempts = 0

    def run(self) -> Found:
        """Search; the outcome found may still miss the goal."""
        names = list(self._base_clean.margins)
        redistribute: list[Element] = [("redistribute", name) for name in names]
        ranked = sorted(names, key=self._calibration.gap, reverse=True)
        everything: list[Element] = [("detect", name) for name in ranked] + redistribute
        # One site that tells anomalous columns apart on its own is better than several that share one budget for false
        # flags: the detectors of innocent sites would spend it. Sites before it would never have flags.
        alone = [
            [("detect", name), *redistribute[names.index(name) :]] for name in ranked if self._could_do_alone(name)
        ]
        start, beta, outcome = self._begin([*alone, everything])
        betas = dict.fromkeys(names, beta)
        if outcome.shortfalls(self._options.goal):
            return Found(tuple(start), betas, outcome, {})
        elements = self._minimal(start, betas)
        while (raised := self._raised(elements, betas)) != betas:  # more benign attention may make an element needless
            elements, betas = self._minimal(elements, raised), raised
        outcome = self.attempt(elements, betas)
        without = {element: self.attempt([e for e in elements if e != element], betas) for element in elements}
        return Found(tuple(elements), betas, outcome, without)

    def _begin(self, starts: Sequence[Sequence[Element]]) -> tuple[Sequence[Element], float, Outcome]:
        """The first of these sets that meets the goal, at the largest benign attention; else the nearest one."""
        names = list(self._base_clean.margins)
        tried = []
        for beta in self._options.betas:
            for start in starts:
                outcome = self.attempt(start, dict.fromkeys(names, beta))
                if not outcome.shortfalls(self._options.goal):
                    return start, beta, outcome
                tried.append((start, beta, outcome))
        return min(tried, key=lambda one: (one[2].remaining, -one[2].accuracy, one[2].clean_flag_rate))

    def _could_do_alone(self, name: str) -> bool:
        """Whether the goal would be met, were every input repaired that this site's detector flags; nothing is run."""
        threshold = np.float32(self._calibration.thresholds([name])[name])
        clean, other = (side.margins[name] > threshold for side in (self._base_clean, self._base_other))
        before, after = classes(self._base_clean.logits), classes(self._base_other.logits)
        repaired = np.where((clean | other).any(axis=1), before, after)
        outcome = judge(self._part, before, (before, clean), (repaired, other), self._anomalous)
        return not outcome.shortfalls(self._options.goal)

    def _minimal(self, elements: Sequence[Element], betas: Mapping[str, float]) -> list[Element]:
        return ddmin(elements, lambda subset: self._meets(subset, betas))

    def _raised(self, elements: Sequence[Element], betas: Mapping[str, float]) -> dict[str, float]:
        """The largest benign attention of each redistributing site in turn that still meets the goal."""
        raised = dict(betas)
        for name in (name for role, name in elements if role == "redistribute"):
            larger = (b for b in self._options.betas if b > raised[name])
            raised[name] = next((b for b in larger if self._meets(elements, {**raised, name: b})), raised[name])
        return raised

    def _meets(self, elements: Sequence[Element] | frozenset[Element], betas: Mapping[str, float]) -> bool:
        return not self.attempt(elements, betas).shortfalls(self._options.goal)

    def attempt(self, elements: Sequence[Element] | frozenset[Element], betas: Mapping[str, float]) -> Outcome:
        """What these elements do on the validation part."""
        self.attempts += 1
        detecting = sorted(name for role, name in elements if role == "detect")
        setting = Setting(
            thresholds=self._calibration.thresholds(detecting) if detecting else {},
            betas={name: betas[name] for role, name in elements if role == "redistribute"},
        )
        clean = self._patched(self._part.clean, self._base_clean, setting)
        other = self._patched(self._part.counterfactual, self._base_other, setting)
        self._progress("delta debugging, settings tried", self.attempts, 0)
        base = classes(self._base_clean.logits)
        return judge(self._part, base, clean, other, self._anomalous)

    def _patched(
        self, inputs: Mapping[str, Array], base: TrialResult, setting: Setting
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Predictions and flags under a setting. Inputs that no detector flags in the base are the base's: not run."""
        predictions = classes(base.logits).copy()
        flags = np.zeros_like(base.flags)
        for name, threshold in setting.thresholds.items():
            flags |= base.margins[name] > np.float32(threshold)
        rows = np.flatnonzero(flags.any(axis=1))
        if rows.size:
            flagged = {name: array[rows] for name, array in inputs.items()}
            result = self._trial.run(flagged, setting, batch_size=self._options.batch_size)
            predictions[rows], flags[rows] = classes(result.logits), result.flags
        return predictions, flags

    def _score(self, inputs: Mapping[str, Array], stage: str) -> TrialResult:
        return self._trial.scores(inputs, batch_size=self._options.batch_size, progress=self._progress, stage=stage)


def _patch(
    model: ir.Model,
    debug: DebugSet,
    entries: Sequence[tuple[AttentionSite, SitePatch]],
    calibration: Calibration,
    search: Search,
    found: Found,
    parts: Split,
    options: FitOptions,
) -> Patch:
    shortfalls = found.outcome.shortfalls(options.goal)
    if shortfalls and not options.force:
        raise TargetMissedError(
            "the validation part",
            expected="the goal of the fit to be met",
            found="; ".join(shortfalls),
            advice="Give more pairs or other candidate sites, relax the goal, or write it anyway (option --force).",
        )
    detecting = [name for role, name in found.elements if role == "detect"]
    redistributing = [name for role, name in found.elements if role == "redistribute"]
    thresholds = calibration.thresholds(detecting)
    chosen = []
    for site, entry in entries:
        detector = redistribution = None
        if site.name in detecting:
            assert entry.detector is not None
            detector = replace(entry.detector, threshold=thresholds[site.name])
        if site.name in redistributing:
            assert entry.redistribution is not None
            beta = np.full((1, 1, 1), found.betas[site.name], np.float32)
            redistribution = replace(entry.redistribution, beta=beta)
        if detector or redistribution:
            chosen.append(SitePatch(site.name, detector, redistribution))
    figures: dict[str, Any] = {
        "kind": debug.kind,
        "target": debug.target,
        "meets_target": not shortfalls,
        "shortfalls": list(shortfalls),
        "goal": asdict(options.goal),
        "value": options.value,
        "pairs": {"fit": len(parts.fit), "calibration": len(parts.calibration), "validation": len(parts.validation)},
        "outcome": found.outcome.to_json(),
        "settings_tried": search.attempts,
        "sites": [_site_figures(site, calibration, found, thresholds) for site, _ in entries],
    }
    return Patch(base=fingerprint(model), sites=tuple(chosen), figures=figures)


def _site_figures(
    site: AttentionSite, calibration: Calibration, found: Found, thresholds: Mapping[str, float]
) -> dict[str, Any]:
    """What was found of one candidate site, on the calibration part; alone, it would have the whole budget."""
    name = site.name
    threshold = thresholds.get(name, calibration.thresholds([name])[name])
    anomalous, benign = calibration.anomalous[name] > threshold, calibration.benign[name] > threshold
    balance = len(calibration.benign[name])
    false = float(benign.mean()) if balance else 0.0
    roles = [role for role, element in found.elements if element == name]
    return {
        "site": name,
        "separation": calibration.separation(name),
        "gap": calibration.gap(name),
        "recall": float(anomalous.mean()),
        "precision": float(anomalous.sum() / max(anomalous.sum() + benign.sum(), 1)),
        "column_flag_rate": false,
        "clean_flag_rate": float((calibration.clean[name] > threshold).mean()),
        "threshold": threshold,
        "detects": "detect" in roles,
        "redistributes": "redistribute" in roles,
        "beta": found.betas[name] if "redistribute" in roles else None,
        "without": {role: found.without[role, name].to_json() for role in roles if (role, name) in found.without},
    }
