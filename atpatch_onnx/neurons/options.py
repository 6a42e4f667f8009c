"""How hidden units are edited: settings only."""

from dataclasses import dataclass, field
from typing import Literal, TypeVar

from atpatch_onnx.errors import FitError, check_at_least, check_options
from atpatch_onnx.fitting.goal import Goal

Optimizer = Literal["swarm", "evolution"]

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, kw_only=True)
class NeuronOptions:
    """What both methods have in common."""

    goal: Goal = field(default_factory=Goal)

    candidates: int | None = 512
    """How many units are tried one by one: those whose activations differ most between the two sides, of all layers,
    in standard deviations on the clean inputs. None: every unit.

    The papers try every unit. That is several forward passes of `inputs` pairs a unit: dear where there are tens of
    thousands.
    """

    finalists: int = 96
    """How many of the candidates are ranked on all `inputs`. The others drop out in a first round, on an eighth of
    these, by probabilities: these tell units apart on few inputs where predictions do not.
    """

    inputs: int = 128
    """How many pairs of the fit part units are ranked on, drawn by the seed; fewer where the part is smaller."""

    output: str | None = None
    """Output that predictions are read from; None: the first float output `[batch, classes]`."""

    batch_size: int = 32
    seed: int = 0

    force: bool = False
    """Write a patch that misses its goal, marked as such."""

    def __post_init__(self) -> None:
        candidates = self.candidates is None or self.candidates >= 1
        check_options(self, FitError, candidates=(candidates, "at least 1, or None"))
        check_at_least(self, FitError, finalists=1, inputs=1, batch_size=1)


@dataclass(frozen=True, kw_only=True)
class IsolationOptions(NeuronOptions):
    """How units are frozen."""

    most: int = 20
    """At most so many units are frozen together; as many ranks the epsilon-greedy variant draws from."""

    epsilon: float | tuple[float, ...] = 0.0
    """Probability that one of the K slots is drawn from the ranks behind the first K, or several to try; 0.1 in the
    paper's variant."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, FitError, most=1)
        epsilon = _all(several(self.epsilon, ()), 0, 1), "a number from 0 to 1, or some such numbers"
        check_options(self, FitError, epsilon=epsilon)


@dataclass(frozen=True, kw_only=True)
class RepairOptions(NeuronOptions):
    """How units are scaled."""

    units: int | tuple[int, ...] | None = None
    """How many units are scaled, or several numbers to try; None: 3 for an attribute, 5 for a backdoor."""

    alpha: float | tuple[float, ...] | None = None
    """Weight of the accuracy in the cost, or several to try; None: 0.3 for an attribute, 0.1 for a backdoor."""

    search_inputs: int = 256
    """How many pairs of the fit part the cost is measured on, drawn by the seed."""

    optimizer: Optimizer = "swarm"
    """Particle swarm, as in the paper, or SciPy's differential evolution."""

    particles: int = 20
    iterations: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least(self, FitError, search_inputs=1, particles=5, iterations=1)
        units = self.units is None or _all(several(self.units, ()), 1, float("inf"))
        alpha = self.alpha is None or _all(several(self.alpha, ()), 0, 1)
        check_options(
            self,
            FitError,
            units=(units, "at least 1, or some such numbers"),
            alpha=(alpha, "a number from 0 to 1, or some such numbers"),
            optimizer=(self.optimizer in ("swarm", "evolution"), "'swarm' or 'evolution'"),
        )


def several(given: _Number | tuple[_Number, ...] | None, default: tuple[_Number, ...]) -> tuple[_Number, ...]:
    """One number or several as several, or what they are by default."""
    if given is None:
        return default
    return given if isinstance(given, tuple) else (given,)


def _all(numbers: tuple[float, ...], low: float, high: float) -> bool:
    return bool(numbers) and all(low <= number <= high for number in numbers)
