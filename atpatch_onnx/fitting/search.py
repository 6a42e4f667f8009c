"""Search for the sites that meet the goal.

Where the attack lives differs from model to model: early sites in a vision model, late ones in a text model. So
detecting and redistributing sites are searched for separately, by delta debugging in one session of the switchboard.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from atpatch_onnx.fitting.calibrate import Calibration, Element
from atpatch_onnx.fitting.cost import Cost
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
    """Find a 1-minimal set of detecting and redistributing sites that meets the goal.

    Args:
        scored: The validation part.
        calibration: Where thresholds come from.
        options: Of the fit.
        progress: Told of every setting that is tried.
        cost: What sets cost, for `FitOptions.prefer_few`; without it, the first is taken.
    """

    def __init__(
        self,
        scored: ScoredPart,
        calibration: Calibration,
        options: FitOptions,
        progress: Progress,
        cost: Cost | None = None,
    ) -> None:
        self._scored, self._calibration, self._cost = scored, calibration, cost
        self._options, self._progress = options, progress
        self._all = options.always or options.redistribute == "all"
        self._known: dict[Setting, Outcome | None] = {}
        """None where a setting was given up."""

    def run(self) -> Found:
        """Search; the outcome found may still miss the goal."""
        names = list(self._scored.clean.margins)
        start, outcome = self._begin(names)
        if outcome.shortfalls(self._options.goal) or self._meets(()):  # where nothing is to be done, nothing is minimal
            return Found(tuple(start), self._calibration.setting(start), outcome, {})
        elements = self._minimal(start)
        if self._cost is not None and self._options.prefer_few:
            elements = self._cheapest(names, elements, self._cost)
        without = {element: self.attempt([e for e in elements if e != element]) for element in elements}
        return Found(tuple(elements), self._calibration.setting(elements), self.attempt(elements), without)

    def _begin(self, names: Sequence[str]) -> tuple[list[Element], Outcome]:
        """The first set that meets the goal; else the nearest to it."""
        goal = self._options.goal
        nearest: tuple[list[Element], Outcome] | None = None

        def farther(best: Outcome) -> bool:
            """Than what was tried before: it is not run to the end."""
            return nearest is not None and best.nearness(goal) > nearest[1].nearness(goal)

        for start, least in self._starts(names):
            if nearest is not None and least > nearest[1].excess(goal):
                continue
            outcome = self._attempt(start, unless=farther)
            if outcome is None:
                continue
            if nearest is None or outcome.nearness(goal) < nearest[1].nearness(goal):
                nearest = start, outcome
            if not outcome.shortfalls(goal):
                return start, outcome
        assert nearest is not None, "the first set is run to the end"
        return nearest

    def _starts(self, names: Sequence[str]) -> Iterator[tuple[list[Element], float]]:
        """Sets to begin with, given the sites in graph order, and by how much each exceeds the goal at best.

        Fewer that name the anomalous tokens are better than more that share one budget for false flags: the detectors
        of innocent sites would spend it. But a site detects too late for the sites before it, whose attention has
        told the others of the anomaly by then; so sites are joined, those whose scores are farthest apart first. Sets
        that could meet the goal come first, few detectors before many, then those that could come nearest to it.
        """
        ranked = sorted(names, key=self._calibration.gap, reverse=True)
        alone = list(ranked)
        if self._all:  # only flags of the first site reach all of them
            alone = list(names[:1])
            ranked = [*alone, *(name for name in ranked if name not in alone)]
        sets = [*([name] for name in alone), *(ranked[:count] for count in range(2, len(names) + 1))]
        excess = [self._at_best(detecting).excess(self._options.goal) for detecting in sets]
        for detecting, least in sorted(zip(sets, excess, strict=True), key=lambda pair: pair[1]):
            first = min(names.index(name) for name in detecting)  # those before never have flags
            yield [("detect", name) for name in detecting] + [("redistribute", name) for name in names[first:]], least

    def _at_best(self, names: Sequence[str]) -> Outcome:
        """The outcome if every input that these detectors flag were repaired; nothing is run."""
        scored = self._scored
        setting = self._calibration.setting([("detect", name) for name in names])
        clean, other = (setting.flags(side.margins) for side in (scored.clean, scored.counterfactual))
        before, after = classes(scored.clean.logits), classes(scored.counterfactual.logits)
        repaired = np.where((clean | other).any(axis=1), before, after)
        return judge(scored.part, before, (before, clean), (repaired, other), scored.anomalous)

    def _cheapest(self, names: Sequence[str], elements: list[Element], cost: Cost) -> list[Element]:
        """A 1-minimal set that meets the goal, of all that the sets to begin with lead to; the first of equal ones."""
        for start, least in self._starts(names):
            if least > 0 or cost.least(start) >= cost.kernels(elements) or not self._meets(start):
                continue
            other = self._minimal(start)
            if cost.kernels(other) < cost.kernels(elements):
                elements = other
        return elements

    def _minimal(self, elements: Sequence[Element]) -> list[Element]:
        """A 1-minimal set; where all sites redistribute, they and the detector that all of them need stay in it."""
        first = ("detect", next(iter(self._scored.clean.margins)))
        kept = [e for e in elements if self._all and (e[0] == "redistribute" or e == first)]
        rest = [e for e in elements if e not in kept]
        return [*ddmin(rest, lambda subset: self._meets([*subset, *kept])), *kept]

    def _meets(self, elements: Collection[Element]) -> bool:
        outcome = self._attempt(elements, unless=self._misses)
        return outcome is not None and not self._misses(outcome)

    def _misses(self, outcome: Outcome) -> bool:
        return bool(outcome.shortfalls(self._options.goal))

    def attempt(self, elements: Collection[Element]) -> Outcome:
        """What these elements do on the validation part."""
        outcome = self._attempt(elements, unless=lambda best: False)
        if outcome is None:  # it was given up before
            setting = self._calibration.setting(elements)
            outcome = self._known[setting] = self._scored.outcome(setting)
        return outcome

    def _attempt(self, elements: Collection[Element], *, unless: Callable[[Outcome], bool]) -> Outcome | None:
        """The same, or None where it is given up, now or before: then it misses the goal."""
        setting = self._calibration.setting(elements)
        if setting not in self._known:
            self._known[setting] = self._scored.outcome_unless(setting, unless)
            self._progress("delta debugging, settings tried", self.attempts, 0)
        return self._known[setting]

    @property
    def attempts(self) -> int:
        """How many settings were tried."""
        return len(self._known)
