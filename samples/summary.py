"""From the figures of single runs to what is said of a case: means and ranges over seeds, intervals, goals."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from atpatch_onnx.running.metrics import wilson
from samples.bounds import Bound, Run


@dataclass(frozen=True)
class Spread:
    """A figure over seeds."""

    mean: float
    smallest: float
    largest: float
    low: float | None
    """95 % interval of the mean at the inputs of one seed: seeds may share inputs, as they do the test images of
    Fashion-MNIST. Wilson's for a share, of a difference of shares the mean of the seeds' own. None of other figures."""

    high: float | None
    seeds: int


def spread(runs: Sequence[Run], read: Callable[[Run], Any]) -> Spread | None:
    """Of what `read` finds in each run: a rate or a difference as JSON, or a number; None where any run has none."""
    found = [read(run) for run in runs]
    if not found or any(one is None for one in found):
        return None
    if not isinstance(found[0], Mapping):
        return Spread(_mean(found), min(found), max(found), None, None, len(found))
    values = [float(rate["value"]) for rate in found]
    mean = _mean(values)
    if "count" in found[0]:
        count = min(int(rate["count"]) for rate in found)
        low, high = wilson(round(mean * count), count)
    else:
        low, high = (_mean([float(difference[end]) for difference in found]) for end in ("low", "high"))
    return Spread(mean, min(values), max(values), low, high, len(values))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


@dataclass(frozen=True)
class Goal:
    """What the results must show of some cases."""

    name: str
    cases: tuple[str, ...]
    bounds: tuple[Bound, ...]
    work: str = "measured"
    averaged: tuple[str, ...] = ()
    """Figures bounded on average over the cases; the others in every case."""


def _attack(left: float, lost: float, *more: Bound) -> tuple[Bound, ...]:
    return (Bound("ASR above floor", left), Bound("accuracy lost", lost), *more)


TABLES = (
    "adult/sex",
    "adult/race",
    "adult/age",
    "german/sex",
    "german/age",
    "compas/sex",
    "compas/race",
    "compas/age",
)
ROBUST = (
    "vit/badnets-fixed",
    "vit/badnets-random",
    "vit/trojan",
    "deit/badnets-fixed",
    "deit/badnets-random",
    "minilm/token",
    "minilm/phrase",
)
"""Cases with a trigger of columns: not the whole-image blend."""

GOALS = (
    Goal(
        "BadNets fixed, ViT",
        ("vit/badnets-fixed",),
        _attack(0.002, 0.0005, Bound("recall", 0.998, True), Bound("precision", 0.97, True)),
    ),
    Goal("BadNets random place", ("vit/badnets-random", "deit/badnets-random"), _attack(0.005, 0.001)),
    Goal("Trojan, ViT", ("vit/trojan",), _attack(0.005, 0.001)),
    Goal(
        "inverted instead of known trigger",
        ("vit/badnets-fixed", "minilm/token"),
        _attack(0.01, 0.002),
        work="inverted",
    ),
    Goal("text", ("minilm/token", "minilm/phrase"), _attack(0.005, 0.001, Bound("recall", 0.995, True))),
    Goal("robust accuracy beside the twin's", ROBUST, (Bound("robust accuracy below the twin's", 0.01),)),
    Goal(
        "precision of the detector",
        ROBUST,
        (Bound("precision", 0.95, True),),
        averaged=("precision",),
    ),
    Goal(
        "tables, each protected attribute",
        TABLES,
        (Bound("UF, patched", 0.0004), Bound("accuracy lost", 0.001)),
        averaged=("accuracy lost",),
    ),
)


@dataclass(frozen=True)
class Verdict:
    """One bound of a goal and what was found."""

    goal: str
    case: str
    bound: Bound
    value: float | None
    """None: not measured."""

    @property
    def met(self) -> bool:
        """Whether it was measured and keeps the bound."""
        return self.value is not None and self.bound.met(self.value)


def verdicts(spreads: Mapping[tuple[str, str], Mapping[str, Spread | None]]) -> list[Verdict]:
    """Every bound of every goal; `spreads` are the figures by work and case."""
    found = []
    for goal in GOALS:
        for bound in goal.bounds:
            means = {}
            for case in goal.cases:
                value = spreads.get((goal.work, case), {}).get(bound.figure)
                means[case] = None if value is None else value.mean
            if bound.figure in goal.averaged:
                known = [mean for mean in means.values() if mean is not None]
                average = math.fsum(known) / len(known) if len(known) == len(means) else None
                found.append(Verdict(goal.name, "average", bound, average))
            else:
                found += [Verdict(goal.name, case, bound, mean) for case, mean in means.items()]
    return found
