"""The figures of a run by name, and bounds on them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Run = Mapping[str, Any]
"""The figures of one case and seed, as `samples.case.Measured.to_json` writes them."""


def _of(*path: str) -> Callable[[Run], Any]:
    """Reads what stands at a path; None where there is nothing."""

    def read(run: Run) -> Any:
        at: Any = run
        for key in path:
            at = None if at is None else at.get(key)
        return at

    return read


def _below(best: float | None, found: float | None) -> float | None:
    """How far a figure is below the best that can be asked."""
    return None if best is None or found is None else best - found


FIGURES: Mapping[str, Callable[[Run], Any]] = {
    "accuracy of the unpoisoned twin": _of("training", "accuracy_twin"),
    "accuracy of the larger class": _of("training", "accuracy_majority"),
    "accuracy of boosting": _of("training", "accuracy_boosting"),
    "accuracy": _of("evaluation", "accuracy_base"),
    "accuracy, patched": _of("evaluation", "accuracy_patched"),
    "accuracy lost": _of("evaluation", "accuracy_lost"),
    "ASR": _of("evaluation", "backdoor", "asr_base"),
    "ASR, patched": _of("evaluation", "backdoor", "asr_patched"),
    "floor": _of("evaluation", "backdoor", "asr_floor"),
    "ASR above floor": _of("evaluation", "backdoor", "asr_above_floor"),
    "robust accuracy": _of("evaluation", "backdoor", "robust_accuracy_patched"),
    "robust accuracy of the twin": _of("training", "robust_accuracy_twin"),
    "robust accuracy below the twin's": lambda run: _below(
        _of("training", "robust_accuracy_twin")(run),
        _of("evaluation", "backdoor", "robust_accuracy_patched", "value")(run),
    ),
    "robust accuracy lost": _of("evaluation", "backdoor", "robust_accuracy_lost"),
    "individual discrimination": _of("training", "discrimination_rate"),
    "UF": _of("evaluation", "fairness", "uf_base"),
    "UF, patched": _of("evaluation", "fairness", "uf_patched"),
    "UF of any value": _of("more", "uf_any_base"),
    "UF of any value, patched": _of("more", "uf_any_patched"),
    "DPD": _of("evaluation", "fairness", "demographic_parity_difference_base"),
    "DPD, patched": _of("evaluation", "fairness", "demographic_parity_difference_patched"),
    "EOD": _of("evaluation", "fairness", "equalized_odds_difference_base"),
    "EOD, patched": _of("evaluation", "fairness", "equalized_odds_difference_patched"),
    "recall": _of("evaluation", "columns", "recall"),
    "precision": _of("evaluation", "columns", "precision"),
    "clean inputs flagged": _of("evaluation", "clean_flag_rate"),
    "clean inputs changed": _of("evaluation", "clean_changed"),
    "core seconds": _of("core_seconds"),
}
"""What is said of a run, and where it stands: a rate as JSON, a number, or None."""


@dataclass(frozen=True)
class Bound:
    """One bound on a figure, as a share."""

    figure: str
    """A key of `FIGURES`."""

    limit: float
    at_least: bool = False

    def met(self, value: float) -> bool:
        """Whether the value keeps the bound."""
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{self.figure} {'at least' if self.at_least else 'at most'} {self.limit:.2%}"


def shortfalls(run: Run, bounds: tuple[Bound, ...]) -> list[str]:
    """The bounds that a run does not keep, a line each."""
    lines = []
    for bound in bounds:
        found = FIGURES[bound.figure](run)
        value = found["value"] if isinstance(found, Mapping) else found
        if value is None or not bound.met(value):
            lines.append(f"MISSED: {bound}, found {'nothing' if value is None else f'{value:.2%}'}")
    return lines
