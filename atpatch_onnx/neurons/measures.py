"""A part of a debug set under neuron edits: what they do to its predictions, and to its probabilities."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.fitting.goal import Outcome, judge
from atpatch_onnx.neurons.trial import NeuronTrial
from atpatch_onnx.patches.patch import LayerEdit
from atpatch_onnx.running.predictions import classes, confidences
from atpatch_onnx.running.sessions import Array


@dataclass(frozen=True, eq=False)
class Sides:
    """Logits `[pairs, classes]` of either side."""

    clean: Array
    counterfactual: Array


class JudgedPart:
    """A part, its backdoor's target known, in a trial. The base is run on it once."""

    def __init__(self, trial: NeuronTrial, part: DebugSet, *, batch_size: int = 32) -> None:
        self.trial, self.part, self.batch_size = trial, part, batch_size
        self.base = self.run()

    def run(self, edits: Sequence[LayerEdit] = ()) -> Sides:
        """The logits of both sides under some edits."""
        clean, other = (
            self.trial.run(side, edits, batch_size=self.batch_size)
            for side in (self.part.clean, self.part.counterfactual)
        )
        return Sides(clean, other)

    def outcome(self, sides: Sides) -> Outcome:
        """What these logits amount to. Nothing is flagged: an edit changes all inputs."""
        none = np.zeros((len(self.part), 1), bool)
        clean, other = classes(sides.clean), classes(sides.counterfactual)
        return judge(self.part, classes(self.base.clean), (clean, none), (other, none), (none, none))

    def trace_under(self, edits: Sequence[LayerEdit]) -> float:
        """The `trace` under some edits, without running what it does not look at."""
        if self.part.kind == "attribute":
            return self.trace(self.run(edits))
        other = self.trial.run(self.part.counterfactual, edits, batch_size=self.batch_size)
        return self.trace(Sides(self.base.clean, other))

    def trace(self, sides: Sides) -> float:
        """How much of the problem is left, by probabilities, which tell apart what predictions do not.

        Of a backdoor, the mean target probability over the counterfactuals that ASR above floor counts; of an
        attribute, the mean over pairs of `output_gaps`.
        """
        if self.part.kind == "attribute":
            return float(output_gaps(sides).mean())
        target = self.part.target
        counted = (self._labels != target) & (classes(self.base.clean) != target)
        return float(confidences(sides.counterfactual)[counted, target].mean()) if counted.any() else 0.0

    def confidence(self, sides: Sides) -> float:
        """The mean probability of the label over the clean inputs: the accuracy, by probabilities."""
        return float(confidences(sides.clean)[np.arange(len(self.part)), self._labels].mean())

    @property
    def of_target(self) -> int:
        """How many of the inputs are of the backdoor's class: what edits cost there is seen on these alone."""
        return int((self._labels == self.part.target).sum())

    @property
    def _labels(self) -> NDArray[np.int64]:
        """The labels `[pairs]`; without any, the base's own predictions stand in for them."""
        return classes(self.base.clean) if self.part.labels is None else self.part.labels


def output_gaps(sides: Sides) -> NDArray[np.float64]:
    """The largest difference of a probability between the two sides of each pair, `[pairs]`."""
    return np.asarray(np.abs(confidences(sides.counterfactual) - confidences(sides.clean)).max(axis=1))
