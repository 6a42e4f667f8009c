"""How a patch is fitted: settings only, so that they can be named without torch."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

from atpatch_onnx.errors import FitError, check_options
from atpatch_onnx.fitting.goal import Goal

Kind = Literal["linear", "hidden"]
"""Of a detector that is trained: one product with the token's key, or one hidden layer."""

PLACE = "place"
"""What a detector of a fix that is always on goes by."""


@dataclass(frozen=True)
class Training:
    """How a detector is trained."""

    hidden: int = 32
    """Units of a detector with a hidden layer."""

    steps: int = 1000
    batch: int = 256
    learning_rate: float = 5e-3
    weight_decay: float = 1e-3
    noise: float = 0.3
    """Standard deviation of the Gaussian noise on standardised features: keeps the margin wide."""


@dataclass(frozen=True)
class FitOptions:
    """How a patch is fitted."""

    goal: Goal = field(default_factory=Goal)
    training: Training = field(default_factory=Training)

    detectors: tuple[Kind, ...] = ("linear", "hidden")
    """Kinds to try in this order, the cheapest first: the first that meets the goal, else the nearest to it."""

    thresholds: Literal["balanced", "lowest"] | None = None
    """Where thresholds lie: where fewest columns are named wrongly, in the middle between scores that are apart; or as
    low as half of the clean flag rate allows, for a debug set that only resembles the attack, such as of an inverted
    trigger. None: lowest where the debug set says that a search found it, else balanced.
    """

    redistribute: Literal["needed", "all"] = "needed"
    """Which sites redistribute: those without which the goal is missed on the validation part, or all of them, for
    goals that so few pairs cannot show, such as a flip rate of 0.04 %: a site that is left alone may leak in others.
    """

    always: bool = False
    """Whether the tokens that differ in any pair are neutral in every input, at all sites, whatever they hold: for a
    protected attribute that has tokens to itself. Nothing is trained, and `detectors`, `thresholds` and `redistribute`
    are not asked."""

    prefer_few: bool = False
    """Whether to go on once a set of sites meets the goal, for one that adds fewer kernels to a run: a site that
    detects at a place from which fewer have to redistribute, for devices on which kernels are what costs."""

    sites: tuple[str, ...] | None = None
    """Names of the candidate sites; None: all on the token axis of the first."""

    output: str | None = None
    """Output that predictions are read from; None: the first float output `[batch, classes]`."""

    steps: int = 32
    """Tokens of a language model's answer that count."""

    batch_size: int = 32
    seed: int = 0

    force: bool = False
    """Write a patch that misses its goal, marked as such."""

    def __post_init__(self) -> None:
        check_options(
            self,
            FitError,
            detectors=(_some_of(self.detectors, get_args(Kind)), "some of 'linear' and 'hidden', each once"),
            thresholds=(self.thresholds in (None, "balanced", "lowest"), "'balanced' or 'lowest'"),
            redistribute=(self.redistribute in ("needed", "all"), "'needed' or 'all'"),
            batch_size=(self.batch_size >= 1, "at least 1"),
            steps=(self.steps >= 1, "at least 1"),
        )


def _some_of(chosen: Sequence[str], known: Sequence[str]) -> bool:
    return bool(chosen) and set(chosen) <= set(known) and len(set(chosen)) == len(chosen)
