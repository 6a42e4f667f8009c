"""IDNN: find the guilty units by freezing each one alone, and freeze the worst of them together.

Isolation-based debugging for neural networks (Chen et al., ISSTA 2024). A unit is frozen at its mean activation over
clean inputs, whatever the input: `h_u <- mean_u`, behind the activation. Units are ranked by what freezing each one
alone does; the best K are frozen together.

Where this differs from the paper:

- A rate over some inputs moves in steps, and few units of a redundant network move it alone. Units that lower it
  equally are ranked by probabilities (`JudgedPart.trace`), not left in any order.
- Not every unit is tried, but those whose activations differ most between the two sides (`NeuronOptions.candidates`),
  and those that show little on few pairs drop out early (`finalists`).
- K is what comes nearest to the goal on the validation part, which the ranking has not seen.
- Padding does not count in the mean.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.graph import ModelOrPath
from atpatch_onnx.neurons.activations import measure_activations
from atpatch_onnx.neurons.measures import JudgedPart
from atpatch_onnx.neurons.options import IsolationOptions, several
from atpatch_onnx.neurons.subject import Attempt, Subject, best_patch, finalists, prepare_units
from atpatch_onnx.neurons.units import Unit, edits_of
from atpatch_onnx.patches.patch import LayerEdit, Patch
from atpatch_onnx.running.opening import as_model
from atpatch_onnx.running.sessions import Progress, silent


@dataclass(frozen=True)
class Isolated:
    """What freezing one unit alone does to the pairs that units are ranked on."""

    unit: Unit
    constant: float
    """What it is frozen at."""

    lowers: float
    """By how much ASR above floor, or the flip rate, falls."""

    costs: float
    """By how much the accuracy falls; not below 0."""

    trace: float
    """What is left by probabilities; see `JudgedPart.trace`."""

    allowed: float = 0.0
    """What it may cost for nothing: the goal's accuracy loss, and at least one input, which may be chance."""

    @property
    def order(self) -> tuple[float, float, Unit]:
        """What to sort by: the guiltiest first."""
        benefit = self.lowers - max(self.costs - self.allowed, 0.0)
        return -round(benefit, 9), self.trace, self.unit  # what is equal but for rounding is equal


def isolate(
    model: ModelOrPath, debug: DebugSet, options: IsolationOptions | None = None, *, progress: Progress = silent
) -> Patch:
    """Freeze the guilty units. The same model, debug set and options give the same patch, byte for byte.

    A backdoor's pairs should hold inputs of the target's class too: see `subject`.

    Args:
        model: The base, or its path.
        debug: Pairs for it; split here into fit, calibration and validation parts, as for `fit`.
        options: How; see there what is tried.
        progress: Told of what is done.

    Raises:
        NoSiteError: The model has no hidden layer.
        DebugSetError: The debug set does not fit the model, is too small, or shows no effect.
        FitError: A backdoor's target class cannot be inferred.
        TargetMissedError: The goal is not reached on the validation part; says by how much. With `force` there is a
            patch all the same.
    """
    options = options or IsolationOptions()
    subject = prepare_units(as_model(model), debug, options, progress)
    run: dict[str, Any] = {
        "batch_size": options.batch_size,
        "progress": progress,
        "stage": "measuring mean activations",
    }
    measured = measure_activations(subject.model, subject.layers, subject.parts.validation, **run)
    ranked = rank(subject, [layer.mean for layer in measured], progress=progress)
    validation = subject.judged(subject.parts.validation)
    most = min(options.most, len(ranked))
    settings = list(itertools.product(range(1, most + 1), several(options.epsilon, ())))
    attempts = []
    for number, (count, epsilon) in enumerate(settings, 1):
        ranks = slots(count, most, epsilon, np.random.default_rng([options.seed, count]))
        attempts.append(_attempt(subject, validation, [ranked[place] for place in ranks], ranks, epsilon))
        progress("freezing units together", number, len(settings))
    return best_patch(subject, "isolation", validation, attempts)


def rank(
    subject: Subject, means: Sequence[NDArray[np.float64]], *, progress: Progress = silent
) -> tuple[Isolated, ...]:
    """The finalists of the candidates, each frozen alone at its layer's `means` `[units]`, the guiltiest first."""
    part = subject.judged(subject.some(subject.options.inputs))
    before = part.outcome(part.base)
    allowed = max(subject.options.goal.accuracy_loss, 1 / len(part.part))

    def frozen(unit: Unit) -> tuple[LayerEdit, ...]:
        return edits_of(subject.layers, [unit], 0.0, means[unit.layer][unit.unit])

    units = finalists(subject, lambda few, unit: few.trace_under(frozen(unit)), progress=progress)
    found = []
    for number, unit in enumerate(units, 1):
        constant = float(np.float32(means[unit.layer][unit.unit]))
        sides = part.run(frozen(unit))
        after = part.outcome(sides)
        lowers, costs = before.remaining - after.remaining, max(before.accuracy - after.accuracy, 0.0)
        found.append(Isolated(unit, constant, lowers, costs, part.trace(sides), allowed))
        progress("isolating units", number, len(units))
    return tuple(sorted(found, key=lambda one: one.order))


def slots(count: int, most: int, epsilon: float, rng: np.random.Generator) -> list[int]:
    """Ranks from 0, `count` of them, each once: the first ones, each exchanged with probability `epsilon`.

    What comes in exchange is drawn from the ranks behind the first `count`, up to `most`, as long as there are any.
    """
    others = list(range(count, most))
    ranks = []
    for place in range(count):
        exchanged = rng.random() < epsilon and others
        ranks.append(others.pop(int(rng.integers(len(others)))) if exchanged else place)
    return sorted(ranks)


def _attempt(
    subject: Subject, validation: JudgedPart, chosen: Sequence[Isolated], ranks: Sequence[int], epsilon: float
) -> Attempt:
    """The chosen units, of these ranks, frozen together."""
    edits = edits_of(subject.layers, [one.unit for one in chosen], 0.0, [one.constant for one in chosen])
    units = [
        subject.figures(
            one.unit,
            factor=0.0,
            constant=one.constant,
            rank=place + 1,
            lowers=one.lowers,
            costs=one.costs,
            trace=one.trace,
        )
        for one, place in zip(chosen, ranks, strict=True)
    ]
    outcome = validation.outcome(validation.run(edits))
    return Attempt({"units": len(chosen), "epsilon": epsilon}, edits, units, outcome)
