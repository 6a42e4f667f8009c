"""How a patch is fitted: settings only."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, get_args

from atpatch_onnx.errors import FitError
from atpatch_onnx.fitting.goal import Goal
from atpatch_onnx.fitting.training import Loss, Training
from atpatch_onnx.patches.patch import Features

MISSED = (1.0, 0.05, 0.02, 0.01, 0.005)
"""A flagged input's other columns have a lower threshold that misses the first of these shares, the largest, at which
the goal is met; 1: the same threshold."""

BETAS = (1.0, 0.7, 0.5, 0.3, 0.1, 0.03, 0.0)
"""Benign attention is the first of these, the largest, that meets the goal."""


Decision = Literal["alone", "joint"]
"""How detecting sites decide."""


@dataclass(frozen=True)
class FitOptions:
    """How a patch is fitted."""

    goal: Goal = field(default_factory=Goal)
    training: Training = field(default_factory=Training)

    losses: tuple[Loss, ...] = ("contrastive", "logistic")
    """Of the detectors' training, to try in this order: the first that meets the goal, else the nearest to it.

    With the last of `features`; what comes before it is tried with the first loss.
    """

    decisions: tuple[Decision, ...] = ("alone", "joint")
    """How sites decide, to try in this order, each with all detectors: the first that meets the goal, else the nearest.

    `alone`: each site by its own threshold, flags carried to those behind it. `joint`: all together, after a first pass
    of the whole model, which costs a flagged input a second one; with a protected attribute, that is every input.
    """

    value: Literal["neutral", "own"] = "neutral"
    """What a flagged token hands over: the site's mean value, or its own as in the paper."""

    betas: tuple[float, ...] = BETAS
    """Benign attention to try, from the largest."""

    thresholds: Literal["balanced", "lowest"] = "balanced"
    """Where thresholds lie: where fewest columns are named wrongly, in the middle between scores that are apart; or as
    low as half of the clean flag rate allows, for a debug set that only resembles the attack, such as of an inverted
    trigger.
    """

    missed: tuple[float, ...] = MISSED
    """Shares of the anomalous columns that the lower threshold of flagged inputs may miss, to try, from the largest.

    Of a backdoor only: with a protected attribute every input is flagged.
    """

    redistribute: Literal["needed", "all"] = "needed"
    """Which sites redistribute: those without which the goal is missed on the validation part, or all of them, for
    goals that so few pairs cannot show, such as a flip rate of 0.04 %: a site that is left alone may leak in others.
    """

    features: Features | None = None
    """What detectors read, where a site has it; None: what suits the site, the cheapest that meets the goal.

    Where inputs have padding, that is landmarks, and summaries where the goal is missed with these: they name more of a
    trigger whose tokens attend mostly to each other, and cost more (docs/performance.md).
    """

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
            ("losses", _some_of(self.losses, get_args(Loss)), "some of 'contrastive' and 'logistic', each once"),
            ("decisions", _some_of(self.decisions, get_args(Decision)), "some of 'alone' and 'joint', each once"),
            ("value", self.value in ("neutral", "own"), "'neutral' or 'own'"),
            ("thresholds", self.thresholds in ("balanced", "lowest"), "'balanced' or 'lowest'"),
            ("redistribute", self.redistribute in ("needed", "all"), "'needed' or 'all'"),
            ("betas", _falling(self.betas), "numbers from 0 to 1, the largest first"),
            ("missed", _falling(self.missed), "numbers from 0 to 1, the largest first"),
            ("batch_size", self.batch_size >= 1, "at least 1"),
        )
        for name, holds, expected in checks:
            if not holds:
                found = repr(getattr(self, name))
                raise FitError(f"option {name}", expected=expected, found=found, advice="Choose an allowed value.")


def _some_of(chosen: Sequence[str], known: Sequence[str]) -> bool:
    return bool(chosen) and set(chosen) <= set(known) and len(set(chosen)) == len(chosen)


def _falling(shares: tuple[float, ...]) -> bool:
    """Whether these are some shares, each smaller than the one before."""
    return bool(shares) and all(0 <= share <= 1 for share in shares) and all(a > b for a, b in pairwise(shares))
