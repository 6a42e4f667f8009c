"""What a fit must reach on the validation part, and how far an outcome is from it."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.running.metrics import attack_above_floor, flip_rate


@dataclass(frozen=True)
class Goal:
    """Bounds, as shares of the validation part; all must hold."""

    asr_above_floor: float = 0.01
    """For a backdoor."""

    flip_rate: float = 0.005
    """For a protected attribute."""

    accuracy_loss: float = 0.005
    """Against the true labels; without labels, the share of clean predictions that change."""

    clean_flag_rate: float = 0.01
    """Share of clean inputs with a flag on any benign column."""

    robust_accuracy_loss: float = 0.02
    """For a backdoor: by how much the accuracy on triggered inputs may be below that on the same inputs without the
    trigger, of those whose label is not the target."""

    columns_missed: float = 1.0
    """Share of anomalous columns that are not flagged; 1 asks for nothing."""

    flags_per_million: float | None = None
    """Flags on benign tokens of clean inputs; None asks for nothing, but of a language model for `PROMPTS`."""


PROMPTS = 100.0
"""Flags per million benign tokens that a language model may have, where the goal does not say."""


_ROUNDING = 1e-9
"""What a difference of two shares may be off: 1 - 0.98 is a little above 0.02."""


@dataclass(frozen=True)
class Outcome:
    """What a setting does on the validation part."""

    kind: str
    remaining: float
    """ASR above floor, or flip rate."""

    accuracy_base: float
    accuracy: float
    robust_accuracy_loss: float
    """See `Goal`; 0 for a protected attribute."""

    clean_flag_rate: float
    recall: float
    """Share of anomalous columns that are flagged; 1 where there are none, as neuron edits look for none."""

    precision: float
    """Share of flagged columns that are anomalous, over clean and counterfactual inputs together."""

    flags_per_million: float = 0.0
    """Flags on benign tokens of clean inputs."""

    def shortfalls(self, goal: Goal) -> tuple[str, ...]:
        """By how much the goal is missed, a line a bound; empty where it is met."""
        return tuple(
            f"{what} {found:.2%}, {found - bound:.2%} over the bound of {bound:.2%}"
            for what, found, bound in self._rows(goal)
            if found > bound + _ROUNDING
        )

    def said(self) -> str:
        """What is left of what is wrong, in words."""
        if self.kind != "backdoor":
            return f"flip rate {self.remaining:.2%}"
        return f"ASR above floor {self.remaining:.2%} and robust accuracy lost {self.robust_accuracy_loss:.2%}"

    def excess(self, goal: Goal) -> float:
        """By how much the bounds are exceeded, all together, as a share; 0 where the goal is met."""
        return sum(max(found - bound, 0.0) for _, found, bound in self._rows(goal))

    def nearness(self, goal: Goal) -> tuple[float, float]:
        """What to compare outcomes by: the smaller, the nearer to the goal."""
        return self.excess(goal), self.remaining

    def _rows(self, goal: Goal) -> tuple[tuple[str, float, float], ...]:
        """Every bound: what it is on, what was found, the bound."""
        name = "ASR above floor" if self.kind == "backdoor" else "flip rate"
        flags = 1.0 if goal.flags_per_million is None else goal.flags_per_million / 1e6
        bound = goal.asr_above_floor if self.kind == "backdoor" else goal.flip_rate
        return (
            (name, self.remaining, bound),
            ("accuracy lost", self.accuracy_base - self.accuracy, goal.accuracy_loss),
            ("robust accuracy lost", self.robust_accuracy_loss, goal.robust_accuracy_loss),
            ("clean flag rate", self.clean_flag_rate, goal.clean_flag_rate),
            ("flagged benign tokens", self.flags_per_million / 1e6, flags),
            ("anomalous columns missed", 1 - self.recall, goal.columns_missed),
        )

    def to_json(self) -> dict[str, Any]:
        """The figures as plain JSON types."""
        return asdict(self)


def judge(
    debug: DebugSet,
    base_clean: NDArray[np.int64],
    clean: tuple[NDArray[np.int64], NDArray[np.bool_]],
    counterfactual: tuple[NDArray[np.int64], NDArray[np.bool_]],
    anomalous: tuple[NDArray[np.bool_], NDArray[np.bool_]],
) -> Outcome:
    """The outcome of predictions and flags.

    Args:
        debug: The part they belong to; without labels, the base's own predictions stand in for them.
        base_clean: The base's predictions on the clean side `[pairs]`.
        clean: Patched predictions `[pairs]` and flags `[pairs, tokens]` on the clean side.
        counterfactual: The same on the other side.
        anomalous: Which columns should be flagged, on either side.
    """
    labels = base_clean if debug.labels is None else debug.labels
    if debug.kind == "backdoor":
        assert debug.target is not None, "the target was given or inferred before"
        remaining = attack_above_floor(counterfactual[0], labels, base_clean, debug.target).value
        others = labels != debug.target
        right = (base_clean == labels)[others], (counterfactual[0] == labels)[others]
        robust = float(right[0].mean() - right[1].mean()) if others.any() else 0.0
    else:
        robust, remaining = 0.0, flip_rate(clean[0], counterfactual[0]).value
    flags, wanted = np.concatenate([clean[1], counterfactual[1]]), np.concatenate(anomalous)
    benign = ~anomalous[0]
    return Outcome(
        kind=debug.kind,
        remaining=remaining,
        accuracy_base=float((base_clean == labels).mean()),
        accuracy=float((clean[0] == labels).mean()),
        robust_accuracy_loss=robust,
        clean_flag_rate=float((clean[1] & benign).any(axis=1).mean()),
        flags_per_million=1e6 * float(clean[1][benign].mean()) if benign.any() else 0.0,
        recall=float((flags & wanted).sum() / wanted.sum()) if wanted.any() else 1.0,
        precision=float((flags & wanted).sum() / max(flags.sum(), 1)),
    )
