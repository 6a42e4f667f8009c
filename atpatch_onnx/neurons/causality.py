"""CARE: find the guilty units by intervention, and scale the worst of them so that a cost becomes smallest.

Causality-based neural network repair (Sun et al., ICSE 2022). The causal effect of a unit is what becomes of a figure y
when the unit is set to a value at all tokens, do(h_u = v), for several values v:

    effect_u = max_v y(v) - min_v y(v)

    attribute:  y(v) = mean over pairs of the largest difference of a probability between the two sides,  16 values
    backdoor:   y(v) = mean probability of the target on the clean inputs,                                 4 values

The units with the largest effects are multiplied by 1 + w, w in [-1, 1], for an attribute, and by w in [-10, 10] for a
backdoor. A particle swarm finds w, by the cost

    (1 - alpha) (flip rate or ASR above floor) + alpha (1 - accuracy)

Where this differs from the paper:

- Of an attribute, leaving the unit alone counts as one more value. A unit that alone carries the attribute makes the
  two sides equal whatever it is set to: without that value its effect would be 0, the smallest of all.
- For a backdoor, the values lie in the unit's range on both sides. On the clean inputs alone a unit that only fires on
  the trigger has no range.
- Rates over some inputs move in steps, and are 0 long before the harm is gone. What they leave undecided is decided by
  the same cost of probabilities (the target's, or the gap of the pair; the label's), which enters with so small a
  weight (`TIES`) that it does nothing else. The authors' own program minimises probabilities alone.
- Not every unit is tried, but those whose activations differ most between the two sides (`NeuronOptions.candidates`),
  and those that show little on few pairs drop out early (`finalists`).
- One particle starts at the network as it is, so that what is found is no worse than that on the pairs searched on.
- Numbers of units and weights alpha can be tried in turn; the nearest to the goal on the validation part is kept.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.errors import require
from atpatch_onnx.graph import ModelOrPath
from atpatch_onnx.neurons.measures import JudgedPart, output_gaps
from atpatch_onnx.neurons.options import RepairOptions, several
from atpatch_onnx.neurons.subject import Attempt, Subject, best_patch, finalists, prepare_units
from atpatch_onnx.neurons.swarm import Minimum, evolve, minimise
from atpatch_onnx.neurons.trial import NeuronTrial
from atpatch_onnx.neurons.units import Unit, edits_of
from atpatch_onnx.patches.patch import Patch
from atpatch_onnx.running.opening import as_model
from atpatch_onnx.running.predictions import confidences
from atpatch_onnx.running.sessions import Progress, silent

VALUES = {"attribute": 16, "backdoor": 4}
"""How many values a unit is set to, evenly spaced over its range."""

UNITS = {"attribute": 3, "backdoor": 5}
ALPHA = {"attribute": 0.3, "backdoor": 0.1}

BOUNDS = {"attribute": (0.0, 2.0), "backdoor": (-10.0, 10.0)}
"""Of the factor that a unit is multiplied with: 1 + w, or w."""

TIES = 1e-4
"""Weight of the cost of probabilities: all of it weighs less than one input does, with the defaults."""

Floats = NDArray[np.float64]


def repair(
    model: ModelOrPath, debug: DebugSet, options: RepairOptions | None = None, *, progress: Progress = silent
) -> Patch:
    """Scale the guilty units. The same model, debug set and options give the same patch, byte for byte.

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
        MissingExtraError: Differential evolution is asked for, and SciPy is not installed.
        TargetMissedError: The goal is not reached on the validation part; says by how much. With `force` there is a
            patch all the same.
    """
    options = options or RepairOptions()
    if options.optimizer == "evolution":
        require("scipy", "fit", "repairing by differential evolution")
    subject = prepare_units(as_model(model), debug, options, progress)
    kind = subject.debug.kind
    ranked = _ranked(subject, progress)
    searched, validation = subject.judged(subject.some(options.search_inputs)), subject.judged(subject.parts.validation)
    settings = itertools.product(several(options.units, (UNITS[kind],)), several(options.alpha, (ALPHA[kind],)))
    attempts = []
    for count, alpha in settings:
        units = [unit for unit, _ in ranked[:count]]
        found = _scaled(searched, units, alpha, options, progress)
        factors = found.best.astype(np.float32)
        edits = edits_of(subject.layers, units, factors, 0.0)
        figures = [
            subject.figures(unit, factor=float(factor), constant=0.0, rank=place, effect=effect)
            for place, ((unit, effect), factor) in enumerate(zip(ranked[:count], factors, strict=True), 1)
        ]
        setting = {
            "units": len(units),
            "alpha": alpha,
            "optimizer": options.optimizer,
            "iterations": len(found.history) - 1,
            "cost": found.cost,
        }
        attempts.append(Attempt(setting, edits, figures, validation.outcome(validation.run(edits))))
    return best_patch(subject, "repair", validation, attempts)


def causal_effects(
    trial: NeuronTrial,
    part: DebugSet,
    units: Sequence[Unit],
    ranges: Sequence[tuple[float, float]],
    *,
    values: int | None = None,
    batch_size: int = 32,
    progress: Progress = silent,
) -> Floats:
    """The causal effect of each unit, `[units]`; the formula stands at the head of this module.

    Args:
        trial: The session in which units are set.
        part: Pairs whose target, for a backdoor, is known.
        units: Whose effect.
        ranges: Smallest and largest value of each.
        values: How many values in between, both included; None: 16 for an attribute, 4 for a backdoor.
        batch_size: Inputs at a time.
        progress: Told after every unit.
    """
    values = VALUES[part.kind] if values is None else values
    judged = JudgedPart(trial, part, batch_size=batch_size)
    effects = np.zeros(len(units))
    for number, (unit, bounds) in enumerate(zip(units, ranges, strict=True)):
        effects[number] = _effect(judged, unit, bounds, values)
        progress("intervening on units", number + 1, len(units))
    return effects


def _effect(part: JudgedPart, unit: Unit, bounds: tuple[float, float], values: int) -> float:
    figures = [_figure(part, unit, value) for value in np.unique(np.linspace(*bounds, values))]
    if part.part.kind == "attribute":
        figures.append(float(output_gaps(part.base).mean()))
    return max(figures) - min(figures)


def _figure(part: JudgedPart, unit: Unit, value: float) -> float:
    """The figure y under do(h = value)."""
    edits = edits_of(part.trial.layers, [unit], 0.0, value)
    if part.part.kind == "attribute":
        return float(output_gaps(part.run(edits)).mean())
    logits = part.trial.run(part.part.clean, edits, batch_size=part.batch_size)
    return float(confidences(logits)[:, part.part.target].mean())


def _ranked(subject: Subject, progress: Progress) -> list[tuple[Unit, float]]:
    """The finalists of the candidates with their causal effects, over their ranges in the fit part; largest first."""
    options, kind = subject.options, subject.debug.kind

    def bounds(unit: Unit) -> tuple[float, float]:
        of = subject.activations[unit.layer]
        low, high = (of.low, of.high) if kind == "attribute" else (of.low_of_both, of.high_of_both)
        return float(low[unit.unit]), float(high[unit.unit])

    units = finalists(
        subject, lambda few, unit: -_effect(few, unit, bounds(unit), VALUES[few.part.kind]), progress=progress
    )
    part, ranges = subject.some(options.inputs), [bounds(unit) for unit in units]
    effects = causal_effects(subject.trial, part, units, ranges, batch_size=options.batch_size, progress=progress)
    found = zip(units, effects.tolist(), strict=True)
    return sorted(found, key=lambda one: (-round(one[1], 9), one[0]))


def _scaled(
    part: JudgedPart, units: Sequence[Unit], alpha: float, options: RepairOptions, progress: Progress
) -> Minimum:
    """The factors with the smallest cost."""
    stage, tried = f"scaling {len(units)} units, alpha {alpha:g}", itertools.count(1)
    budget = options.particles * (options.iterations + 1)

    def cost(factors: Floats) -> float:
        sides = part.run(edits_of(part.trial.layers, units, factors, 0.0))
        progress(stage, next(tried), budget)
        if not (np.isfinite(sides.clean).all() and np.isfinite(sides.counterfactual).all()):
            return np.inf  # as float16 overflows
        outcome = part.outcome(sides)
        rates = (1 - alpha) * outcome.remaining + alpha * (1 - outcome.accuracy)
        return rates + TIES * ((1 - alpha) * part.trace(sides) + alpha * (1 - part.confidence(sides)))

    search = minimise if options.optimizer == "swarm" else evolve
    return search(
        cost,
        *BOUNDS[part.part.kind],
        len(units),
        particles=options.particles,
        iterations=options.iterations,
        start=1.0,
        rng=np.random.default_rng(options.seed),
    )
