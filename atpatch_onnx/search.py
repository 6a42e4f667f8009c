"""Calibrate thresholds, and search for the sites and the benign attention that meet the goal.

Where the attack lives differs from model to model: early sites in a vision model, late ones in a text model. So
detecting and redistributing sites are searched for separately, by delta debugging in one session of the trial graph.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.collect import anomalous_columns
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.deltadebug import ddmin
from atpatch_onnx.goal import Outcome, judge
from atpatch_onnx.options import FitOptions
from atpatch_onnx.predictions import classes
from atpatch_onnx.runtime import Array, Progress
from atpatch_onnx.thresholds import calibrate, gap
from atpatch_onnx.trial import Setting, Trial, TrialResult

Role = Literal["detect", "redistribute"]
Element = tuple[Role, str]
"""One thing a site may do; what delta debugging switches on and off."""


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
