"""Calibrate thresholds, and search for the sites and the benign attention that meet the goal.

Where the attack lives differs from model to model: early sites in a vision model, late ones in a text model. So
detecting and redistributing sites are searched for separately, by delta debugging in one session of the trial graph.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from atpatch_onnx.deltadebug import ddmin
from atpatch_onnx.goal import Outcome, judge
from atpatch_onnx.options import FitOptions
from atpatch_onnx.predictions import classes
from atpatch_onnx.runtime import Array, Progress
from atpatch_onnx.scored import ScoredPart
from atpatch_onnx.thresholds import calibrate, gap
from atpatch_onnx.trial import Setting

SPENT = 0.5
"""Share of the clean flag rate allowed that calibration spends: what is spent whole is exceeded on every other part."""

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
    def of(cls, scored: ScoredPart, allowed: float) -> "Calibration":
        """From the scores of the calibration part, for a clean flag rate of at most `allowed` on other inputs."""
        clean, other = scored.clean.margins, scored.counterfactual.margins
        on_clean, on_other = scored.anomalous
        return cls(
            clean={site: np.where(on_clean, -np.inf, scores).max(axis=1) for site, scores in clean.items()},
            anomalous={site: other[site][on_other] for site in other},
            benign={site: scores[~on_clean] for site, scores in clean.items()},
            rate=SPENT * allowed,
        )

    def thresholds(self, sites: Sequence[str]) -> dict[str, float]:
        """Thresholds of the detecting `sites`, under one budget for all of them."""
        return calibrate({s: self.clean[s] for s in sites}, {s: self.anomalous[s] for s in sites}, self.rate)

    def setting(self, elements: Collection[Element], betas: Mapping[str, float]) -> Setting:
        """What these elements do, their thresholds calibrated together."""
        detecting = sorted(name for role, name in elements if role == "detect")
        return Setting(
            thresholds=self.thresholds(detecting) if detecting else {},
            betas={name: betas[name] for role, name in elements if role == "redistribute"},
        )

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
        scored: The validation part.
        calibration: Where thresholds come from.
        options: Goal and benign attention to try.
        progress: Told of every attempt.
    """

    def __init__(self, scored: ScoredPart, calibration: Calibration, options: FitOptions, progress: Progress) -> None:
        self._scored, self._calibration = scored, calibration
        self._options, self._progress = options, progress
        self.attempts = 0

    def run(self) -> Found:
        """Search; the outcome found may still miss the goal."""
        names = list(self._scored.clean.margins)
        start, beta, outcome = self._begin(list(self._starts(names)))
        betas = dict.fromkeys(names, beta)
        if outcome.shortfalls(self._options.goal):
            return Found(tuple(start), betas, outcome, {})
        elements = self._minimal(start, betas)
        while (raised := self._raised(elements, betas)) != betas:  # more benign attention may make an element needless
            elements, betas = self._minimal(elements, raised), raised
        outcome = self.attempt(elements, betas)
        without = {element: self.attempt([e for e in elements if e != element], betas) for element in elements}
        return Found(tuple(elements), betas, outcome, without)

    def _starts(self, names: Sequence[str]) -> Iterator[list[Element]]:
        """Sets to begin with, given the sites in graph order: few detectors first.

        Fewer that name the anomalous columns are better than more that share one budget for false flags: the detectors
        of innocent sites would spend it. But a site detects too late for the sites before it, whose attention has told
        the others of the anomaly by then; so sites are joined, those whose scores are farthest apart first.
        """
        ranked = sorted(names, key=self._calibration.gap, reverse=True)
        together = [ranked[:count] for count in range(2, len(names))]
        for detecting in (*([name] for name in ranked), *together):
            if self._could_do(detecting):
                first = min(names.index(name) for name in detecting)  # sites before it would never have flags
                yield [("detect", name) for name in detecting] + [("redistribute", name) for name in names[first:]]
        yield [("detect", name) for name in ranked] + [("redistribute", name) for name in names]

    def _begin(self, starts: Sequence[Sequence[Element]]) -> tuple[Sequence[Element], float, Outcome]:
        """The first of these sets that meets the goal, at the largest benign attention; else the nearest one."""
        names = list(self._scored.clean.margins)
        tried = []
        for beta in self._options.betas:
            for start in starts:
                outcome = self.attempt(start, dict.fromkeys(names, beta))
                if not outcome.shortfalls(self._options.goal):
                    return start, beta, outcome
                tried.append((start, beta, outcome))
        return min(tried, key=lambda one: (one[2].excess(self._options.goal), one[2].remaining))

    def _could_do(self, names: Sequence[str]) -> bool:
        """Whether the goal would be met, were every input repaired that these detectors flag; nothing is run."""
        scored, thresholds = self._scored, self._calibration.thresholds(names)
        clean, other = (
            np.any([side.margins[name] > np.float32(thresholds[name]) for name in names], axis=0)
            for side in (scored.clean, scored.counterfactual)
        )
        before, after = classes(scored.clean.logits), classes(scored.counterfactual.logits)
        repaired = np.where((clean | other).any(axis=1), before, after)
        outcome = judge(scored.part, before, (before, clean), (repaired, other), scored.anomalous)
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

    def _meets(self, elements: Collection[Element], betas: Mapping[str, float]) -> bool:
        return not self.attempt(elements, betas).shortfalls(self._options.goal)

    def attempt(self, elements: Collection[Element], betas: Mapping[str, float]) -> Outcome:
        """What these elements do on the validation part."""
        self.attempts += 1
        outcome = self._scored.outcome(self._calibration.setting(elements, betas))
        self._progress("delta debugging, settings tried", self.attempts, 0)
        return outcome
