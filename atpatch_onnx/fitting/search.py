"""Search for the sites and the benign attention that meet the goal.

Where the attack lives differs from model to model: early sites in a vision model, late ones in a text model. So
detecting and redistributing sites are searched for separately, by delta debugging in one session of the trial graph.
"""

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from atpatch_onnx.fitting.calibrate import Calibration, Element, JointCalibration, Strength
from atpatch_onnx.fitting.ddmin import ddmin
from atpatch_onnx.fitting.goal import Outcome, judge
from atpatch_onnx.fitting.options import FitOptions
from atpatch_onnx.fitting.scored import ScoredPart
from atpatch_onnx.fitting.switchboard import Setting
from atpatch_onnx.running.predictions import classes
from atpatch_onnx.running.sessions import Progress


@dataclass(frozen=True)
class Found:
    """What the search ended with."""

    elements: tuple[Element, ...]
    setting: Setting
    outcome: Outcome
    without: Mapping[Element, Outcome]
    """What is left of the fix without each of the elements; where the goal is met, each of these misses it, but for
    sites that redistribute because all do."""


class Search:
    """Find the strength and a 1-minimal set of detecting and redistributing sites that meets the goal.

    Args:
        scored: The validation part.
        calibration: Where thresholds come from, and how sites decide.
        options: Goal, and benign attention and lower thresholds to try.
        progress: Told of every attempt.
    """

    def __init__(
        self,
        scored: ScoredPart,
        calibration: Calibration | JointCalibration,
        options: FitOptions,
        progress: Progress,
    ) -> None:
        self._scored, self._calibration = scored, calibration
        self._options, self._progress = options, progress
        self._all = options.redistribute == "all"
        self._known: dict[str, Outcome | None] = {}
        """By setting; None where it was given up."""

    def run(self) -> Found:
        """Search; the outcome found may still miss the goal."""
        names = list(self._scored.clean.margins)
        start, strength, outcome = self._begin(names)
        if outcome.shortfalls(self._options.goal):
            return Found(tuple(start), self._calibration.setting(start, strength), outcome, {})
        elements = self._minimal(start, strength)
        while (raised := self._raised(elements, strength)) != strength:  # may make an element needless
            elements, strength = self._minimal(elements, raised), raised
        outcome = self.attempt(elements, strength)
        without = {element: self.attempt([e for e in elements if e != element], strength) for element in elements}
        return Found(tuple(elements), self._calibration.setting(elements, strength), outcome, without)

    def _begin(self, names: Sequence[str]) -> tuple[list[Element], Strength, Outcome]:
        """The first set and strength that meet the goal, at the largest benign attention; else the nearest."""
        goal, starts = self._options.goal, list(self._starts(names))
        tried: list[tuple[list[Element], Strength, Outcome]] = []

        def nearness(one: tuple[list[Element], Strength, Outcome]) -> tuple[float, float]:
            return one[2].nearness(goal)

        def farther(best: Outcome) -> bool:
            """Than what was tried before: such a one is not run to the end."""
            return best.nearness(goal) > min(map(nearness, tried), default=(np.inf, np.inf))

        def tries(strengths: Iterable[Strength], starts: Sequence[list[Element]]) -> bool:
            for strength, start in itertools.product(strengths, starts):
                outcome = self._attempt(start, strength, unless=farther)
                if outcome is not None:
                    tried.append((start, strength, outcome))
                    if not outcome.shortfalls(goal):
                        return True
            return False

        first, *smaller = (dict.fromkeys(names, beta) for beta in self._options.betas)
        same, *lower = self._options.missed
        if tries([Strength(first, same)], starts):
            return tried[-1]
        kept = [min(tried, key=nearness)[0], starts[-1]]  # what comes nearest, and all sites
        if tries((Strength(first, missed) for missed in lower), kept):
            return tried[-1]
        missed = min(tried, key=nearness)[1].missed
        tries((Strength(betas, missed) for betas in smaller), kept)
        return min(tried, key=nearness)

    def _starts(self, names: Sequence[str]) -> Iterator[list[Element]]:
        """Sets to begin with, given the sites in graph order: few detectors first.

        Fewer that name the anomalous columns are better than more that share one budget for false flags: the detectors
        of innocent sites would spend it. But a site detects too late for the sites before it, whose attention has told
        the others of the anomaly by then; so sites are joined, those whose scores are farthest apart first. Only sets
        that could meet the goal are tried, or the one that comes nearest to it; and all sites at last.
        """
        ranked = sorted(names, key=self._calibration.gap, reverse=True)
        alone, in_time = ranked, self._calibration.in_time
        if self._all and not in_time:  # only flags of the first site reach all of them
            alone = list(names[:1])
            ranked = [*alone, *(name for name in ranked if name not in alone)]
        sets = [*([name] for name in alone), *(ranked[:count] for count in range(2, len(names)))]
        excess = [self._at_best(detecting).excess(self._options.goal) for detecting in sets]
        nearest = min(excess, default=0.0)
        for detecting in (*(one for one, short in zip(sets, excess, strict=True) if short == nearest), ranked):
            first = 0 if in_time else min(names.index(name) for name in detecting)  # those before never have flags
            yield [("detect", name) for name in detecting] + [("redistribute", name) for name in names[first:]]

    def _at_best(self, names: Sequence[str]) -> Outcome:
        """The outcome if every input that these detectors flag were repaired; nothing is run."""
        scored = self._scored
        setting = self._calibration.setting([("detect", name) for name in names], Strength({}, missed=1.0))
        clean, other = (setting.flags(side.margins) for side in (scored.clean, scored.counterfactual))
        before, after = classes(scored.clean.logits), classes(scored.counterfactual.logits)
        repaired = np.where((clean | other).any(axis=1), before, after)
        return judge(scored.part, before, (before, clean), (repaired, other), scored.anomalous)

    def _minimal(self, elements: Sequence[Element], strength: Strength) -> list[Element]:
        """A 1-minimal set; where all sites redistribute, they and the detector that all of them need stay in it."""
        first = None if self._calibration.in_time else ("detect", next(iter(self._scored.clean.margins)))
        kept = [e for e in elements if self._all and (e[0] == "redistribute" or e == first)]
        rest = [e for e in elements if e not in kept]
        return [*ddmin(rest, lambda subset: self._meets([*subset, *kept], strength)), *kept]

    def _raised(self, elements: Sequence[Element], strength: Strength) -> Strength:
        """The largest benign attention of each redistributing site in turn that still meets the goal."""
        raised = strength
        for name in (name for role, name in elements if role == "redistribute"):
            larger = (replace(raised, betas={**raised.betas, name: b}) for b in self._options.betas)
            better = (one for one in larger if one.betas[name] > raised.betas[name] and self._meets(elements, one))
            raised = next(better, raised)
        return raised

    def _meets(self, elements: Collection[Element], strength: Strength) -> bool:
        outcome = self._attempt(elements, strength, unless=self._misses)
        return outcome is not None and not self._misses(outcome)

    def _misses(self, outcome: Outcome) -> bool:
        return bool(outcome.shortfalls(self._options.goal))

    def attempt(self, elements: Collection[Element], strength: Strength) -> Outcome:
        """What these elements do on the validation part."""
        outcome = self._attempt(elements, strength, unless=lambda best: False)
        if outcome is None:  # it was given up before
            setting = self._calibration.setting(elements, strength)
            outcome = self._known[repr(setting)] = self._scored.outcome(setting)
        return outcome

    def _attempt(
        self, elements: Collection[Element], strength: Strength, *, unless: Callable[[Outcome], bool]
    ) -> Outcome | None:
        """The same, or None where it is given up, now or before: then it misses the goal."""
        setting = self._calibration.setting(elements, strength)
        key = repr(setting)
        if key not in self._known:
            self._known[key] = self._scored.outcome_unless(setting, unless)
            self._progress("delta debugging, settings tried", self.attempts, 0)
        return self._known[key]

    @property
    def attempts(self) -> int:
        """How many settings were tried."""
        return len(self._known)
