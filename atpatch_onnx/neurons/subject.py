"""What comes before units are ranked, and what comes after: the same for both methods.

An edit of a unit changes what the model says of every input. Whether it has forgotten the backdoor's class altogether
is seen on inputs of that class alone. Give some, although ASR does not count them (`DebugSet.from_trigger` leaves them
out unless told otherwise: `drop_target=False`); the figures tell how many there were (`of_target`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from atpatch_onnx.debugset import DebugSet, Split
from atpatch_onnx.errors import NoSiteError, TargetMissedError
from atpatch_onnx.fitting.goal import Outcome
from atpatch_onnx.fitting.preparation import complete
from atpatch_onnx.graph import fingerprint
from atpatch_onnx.matching.hidden import HiddenLayer, find_hidden_layers
from atpatch_onnx.neurons.activations import Activations, measure_activations, most_different
from atpatch_onnx.neurons.measures import JudgedPart
from atpatch_onnx.neurons.options import NeuronOptions
from atpatch_onnx.neurons.trial import NeuronTrial
from atpatch_onnx.neurons.units import Unit
from atpatch_onnx.patches.patch import LayerEdit, Patch
from atpatch_onnx.running.sessions import Progress, silent


@dataclass(frozen=True, eq=False)
class Subject:
    """A model with its pairs, and the units that may be edited."""

    model: ir.Model
    debug: DebugSet
    """With its target, for a backdoor."""

    parts: Split
    """The same parts as a fit of the attention has, given the same pairs and seed."""

    trial: NeuronTrial
    activations: tuple[Activations, ...]
    """Of every layer, on the fit part."""

    candidates: tuple[Unit, ...]
    """The units that are tried one by one."""

    options: NeuronOptions

    @property
    def layers(self) -> tuple[HiddenLayer, ...]:
        """The model's hidden layers."""
        return self.trial.layers

    def judged(self, part: DebugSet) -> JudgedPart:
        """A part in the trial."""
        return JudgedPart(self.trial, part, batch_size=self.options.batch_size)

    def some(self, count: int) -> DebugSet:
        """So many pairs of the fit part, drawn by the seed; all of them where there are no more."""
        rows = np.random.default_rng(self.options.seed).permutation(len(self.parts.fit))[:count]
        return self.parts.fit.take(np.sort(rows))

    def figures(self, unit: Unit, **more: Any) -> dict[str, Any]:
        """Which unit this is, how far apart its two sides are, and `more`: plain JSON types."""
        difference = float(self.activations[unit.layer].difference[unit.unit])
        return {"layer": self.layers[unit.layer].name, "unit": unit.unit, **more, "difference": difference}


def prepare_units(model: ir.Model, debug: DebugSet, options: NeuronOptions, progress: Progress) -> Subject:
    """Find the hidden layers, check and split the pairs, and choose the candidates.

    Raises:
        NoSiteError: The model has no hidden layer.
        DebugSetError: The debug set does not fit the model, is too small, or shows no effect.
        FitError: A backdoor's target class cannot be inferred.
    """
    layers = find_hidden_layers(model)
    if not layers:
        raise NoSiteError(
            "the model",
            expected="at least one hidden layer: an activation between two products with weights",
            found="none",
            advice="Fit a patch of its attention instead: atpatch fit.",
        )
    run = {"batch_size": options.batch_size, "progress": progress}
    debug, output = complete(model, debug, output=options.output, **run)  # type: ignore[arg-type]
    parts = debug.split(seed=options.seed)
    activations = measure_activations(model, layers, parts.fit, **run)  # type: ignore[arg-type]
    candidates = most_different(activations, options.candidates)
    return Subject(model, debug, parts, NeuronTrial(model, layers, output), activations, candidates, options)


FIRST_ROUND = 8
"""Candidates are compared on this part of the pairs that finalists are ranked on, and on as many at least."""


def finalists(
    subject: Subject, left: Callable[[JudgedPart, Unit], float], *, progress: Progress = silent
) -> tuple[Unit, ...]:
    """The candidates worth ranking on many pairs: those with the smallest figure on few, in the order of the graph.

    Successive halving (Jamieson and Talwalkar, AISTATS 2016), in one step.
    """
    count, candidates = subject.options.finalists, subject.candidates
    if len(candidates) <= count:
        return candidates
    part = subject.judged(subject.some(max(subject.options.inputs // FIRST_ROUND, FIRST_ROUND)))
    figures = []
    for number, unit in enumerate(candidates, 1):
        figures.append((round(left(part, unit), 9), unit))
        progress("comparing units on few inputs", number, len(candidates))
    return tuple(sorted(unit for _, unit in sorted(figures)[:count]))


@dataclass(frozen=True, eq=False)
class Attempt:
    """One setting, judged on the validation part."""

    setting: Mapping[str, Any]
    """What was tried, JSON types only."""

    edits: tuple[LayerEdit, ...]
    units: Sequence[Mapping[str, Any]]
    """The edited units and what they were ranked by, JSON types only."""

    outcome: Outcome


def best_patch(subject: Subject, method: str, validation: JudgedPart, attempts: Sequence[Attempt]) -> Patch:
    """The patch of the attempt that is nearest to the goal, of equally near ones the first.

    Raises:
        TargetMissedError: It misses the goal, and the options do not say `force`.
    """
    options, debug, parts = subject.options, subject.debug, subject.parts
    best = min(attempts, key=lambda attempt: attempt.outcome.nearness(options.goal))
    shortfalls = best.outcome.shortfalls(options.goal)
    if shortfalls and not options.force:
        raise TargetMissedError(
            "the validation part",
            expected="the goal to be met by edits of hidden units",
            found="; ".join(shortfalls),
            advice="Give more pairs, edit more units, fit a patch of the attention as well (atpatch fit), relax the "
            "goal, or write it anyway (option --force).",
        )
    figures: dict[str, Any] = {
        "method": method,
        "kind": debug.kind,
        "target": debug.target,
        "meets_target": not shortfalls,
        "shortfalls": list(shortfalls),
        "goal": asdict(options.goal),
        "pairs": {"fit": len(parts.fit), "calibration": len(parts.calibration), "validation": len(parts.validation)},
        "of_target": validation.of_target if debug.kind == "backdoor" else None,
        "candidates": len(subject.candidates),
        "base": validation.outcome(validation.base).to_json(),
        "outcome": best.outcome.to_json(),
        "setting": dict(best.setting),
        "units": [dict(unit) for unit in best.units],
        "tried": [{**attempt.setting, "outcome": attempt.outcome.to_json()} for attempt in attempts],
    }
    return Patch(base=fingerprint(subject.model), sites=(), figures=figures, edits=best.edits)
