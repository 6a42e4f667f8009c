"""From results to the rows of tables: one place for terminal and HTML, so that both say the same.

Figures come out of files that anyone may have written: names are made printable, and a figure that is missing or of
another type becomes None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from atpatch_onnx.baking.metadata import PatchRecord
from atpatch_onnx.errors import printable
from atpatch_onnx.patches.patch import Patch
from atpatch_onnx.running.metrics import Difference, Rate

if TYPE_CHECKING:  # modules that run models, which `atpatch sites` does without
    from atpatch_onnx.measuring.evaluate import Evaluation
    from atpatch_onnx.measuring.verify import Verification

NONE = "-"
"""What stands for a figure that is not there."""

shown = printable
"""Text that is safe to show."""

BETTER_LOW, BETTER_HIGH = "lower is better", "higher is better"


@dataclass(frozen=True)
class MetricRow:
    """One metric before and after; None where it has no meaning."""

    name: str
    before: Rate | Difference | float | None
    after: Rate | Difference | float | None
    hint: str


@dataclass(frozen=True)
class DetectorRow:
    """How well anomalies are named, at one level."""

    level: str
    precision: Rate
    recall: Rate
    average_precision: float


@dataclass(frozen=True)
class Element:
    """One thing that a site does, and what is left of the problem without it."""

    site: str
    role: str
    """`detect` or `redistribute`."""

    left: float | None
    missed: str
    """Which bounds of the goal are missed without it."""


@dataclass(frozen=True)
class SiteRow:
    """What the fit found out about one candidate site, on its calibration part."""

    site: str
    separation: float | None
    gap: float | None
    precision: float | None
    recall: float | None
    flag_rate: float | None
    """Share of clean inputs on which the site flags a column."""

    elements: tuple[Element, ...]


@dataclass(frozen=True)
class EditRow:
    """One edited hidden unit: `h` becomes `factor h + constant`."""

    layer: str
    unit: str
    factor: float | None
    constant: float | None
    rank: int | None
    alone: str
    """What it was ranked by."""


@dataclass(frozen=True)
class GoalRow:
    """One bound of the goal, and what was reached on the validation part."""

    name: str
    bound: float | None
    reached: float | None

    @property
    def met(self) -> bool:
        """Whether the bound holds."""
        return self.bound is not None and self.reached is not None and self.reached <= self.bound


def number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:  # JSON has integers of any size
        return None
    return found if math.isfinite(found) else None


def percent(value: float | None, digits: int = 2) -> str:
    """A share in percent."""
    return NONE if value is None else f"{value:.{digits}%}"


def decimal(value: float | None, digits: int = 3) -> str:
    """A plain number."""
    return NONE if value is None else f"{value:.{digits}f}"


def residual(figures: Mapping[str, Any]) -> str:
    """What the fit drives down: the name of `remaining`."""
    return "flip rate" if figures.get("kind") == "attribute" else "ASR above floor"


def reading(figures: Mapping[str, Any]) -> str | None:
    """What detectors read and why, in words; None where the fit does not say."""
    kinds = {
        "linear": "one product with each token's key",
        "hidden": "each token's key, by a hidden layer",
        "place": "where tokens stand: the fix is always on",
    }
    chosen = kinds.get(str(figures.get("detectors")))
    others = [
        f"{shown(one.get('detectors', NONE))} ones missed {shown('; '.join(map(str, one['shortfalls'])))}"
        for one in _entries(figures, "tried")
        if isinstance(one.get("shortfalls"), list)
        if one["shortfalls"] and one.get("detectors") != figures.get("detectors")
    ]
    return chosen and "; ".join([chosen, *others])


def _entries(figures: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """The objects of a list."""
    found = figures.get(key)
    return [one for one in found if isinstance(one, Mapping)] if isinstance(found, list) else []


def _object(figures: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = figures.get(key)
    return found if isinstance(found, Mapping) else {}


def facts(patch: Patch | PatchRecord) -> list[tuple[str, str]]:
    """What a patch, or a patched file, says of itself, apart from its sites and its goal."""
    figures = patch.figures
    found = [("Patch", shown(patch.id if isinstance(patch, Patch) else patch.patch)), ("Base", shown(patch.base))]
    if "kind" in figures:
        kinds = {"backdoor": "a backdoor", "attribute": "leaning on a protected attribute"}
        found.append(("Against", kinds.get(str(figures["kind"]), shown(figures["kind"]))))
    if figures.get("target") is not None:
        found.append(("Target class", shown(figures["target"])))
    if read := reading(figures):
        found.append(("Detectors read", read))
    if left_out := list(_entries(figures, "left_out")):
        names = ", ".join(shown(str(site.get("site", ""))) for site in left_out)
        found.append(("Left out", f"{names}: on other token axes, to which no flags are carried"))
    if pairs := _object(figures, "pairs"):
        parts = (part for part in ("fit", "calibration", "validation") if part in pairs)
        found.append(("Pairs", ", ".join(f"{shown(pairs[part])} {part}" for part in parts)))
    if number(figures.get("settings_tried")) is not None:
        found.append(("Settings tried", f"{figures['settings_tried']:,}"))
    if cost := _object(figures, "cost"):
        found.append(("Adds", f"{shown(cost.get('kernels'))} kernels a run; {shown(cost.get('all'))} with every site"))
    return found


def standing_in(evaluation: Evaluation) -> str:
    """What stands in for labels that pairs do not have; empty where they have them."""
    return "" if evaluation.labelled else "No labels: the base's predictions on clean inputs stand in for them."


def before_after(evaluation: Evaluation) -> tuple[MetricRow, ...]:
    """The metrics of base and patched model."""
    rows = [
        MetricRow("Clean accuracy", evaluation.accuracy_base, evaluation.accuracy_patched, BETTER_HIGH),
        MetricRow("Accuracy lost", None, evaluation.accuracy_lost, BETTER_LOW),
    ]
    attack, fairness = evaluation.backdoor, evaluation.fairness
    if attack is not None:
        rows += [
            MetricRow("Attack success rate (ASR)", attack.asr_base, attack.asr_patched, BETTER_LOW),
            MetricRow("ASR above floor", None, attack.asr_above_floor, BETTER_LOW),
            MetricRow("Floor: same share, no trigger", attack.asr_floor, None, "what ASR can fall to"),
            MetricRow("Robust accuracy", attack.robust_accuracy_base, attack.robust_accuracy_patched, BETTER_HIGH),
        ]
    if fairness is not None:
        rows.append(MetricRow("Flip rate (UF)", fairness.uf_base, fairness.uf_patched, BETTER_LOW))
        for name, key in (
            ("Confidence gap", "confidence_gap"),
            ("Demographic parity difference", "demographic_parity_difference"),
            ("Equalized odds difference", "equalized_odds_difference"),
        ):
            pair = (getattr(fairness, f"{key}_base"), getattr(fairness, f"{key}_patched"))
            if pair != (None, None):
                rows.append(MetricRow(name, *pair, BETTER_LOW))
    rows += [
        MetricRow("Clean inputs flagged", None, evaluation.clean_flag_rate, BETTER_LOW),
        MetricRow("Clean inputs changed at all", None, evaluation.clean_changed, BETTER_LOW),
    ]
    return tuple(rows)


def detector_rows(evaluation: Evaluation) -> tuple[DetectorRow, ...]:
    """The detector by columns and by whole inputs."""
    levels = (("Columns", evaluation.columns), ("Whole inputs", evaluation.input_level))
    return tuple(DetectorRow(name, at.precision, at.recall, at.curve.average_precision) for name, at in levels if at)


def site_rows(figures: Mapping[str, Any]) -> tuple[SiteRow, ...]:
    """What a patch says of its candidate sites."""
    return tuple(
        SiteRow(
            site=shown(entry.get("site", NONE)),
            separation=number(entry.get("separation")),
            gap=number(entry.get("gap")),
            precision=number(entry.get("precision")),
            recall=number(entry.get("recall")),
            flag_rate=number(entry.get("clean_flag_rate")),
            elements=_elements(entry, figures),
        )
        for entry in _entries(figures, "sites")
    )


def edit_rows(figures: Mapping[str, Any]) -> tuple[EditRow, ...]:
    """What a patch says of the hidden units that it edits; of several patches, all of theirs."""
    own = _entries(figures, "composed") if isinstance(figures.get("composed"), list) else [figures]
    return tuple(
        EditRow(
            layer=shown(entry.get("layer", NONE)),
            unit=shown(entry.get("unit", NONE)),
            factor=number(entry.get("factor")),
            constant=number(entry.get("constant")),
            rank=None if number(entry.get("rank")) is None else int(entry["rank"]),
            alone=_alone(entry, one),
        )
        for one in own
        for entry in _entries(one, "units")
    )


def _alone(entry: Mapping[str, Any], figures: Mapping[str, Any]) -> str:
    """What a unit was ranked by."""
    lowers, effect = number(entry.get("lowers")), number(entry.get("effect"))
    if lowers is not None:
        return f"{residual(figures)} {-100 * lowers:+z.2f} points"
    return NONE if effect is None else f"causal effect {effect:.3f}"


def _elements(entry: Mapping[str, Any], figures: Mapping[str, Any]) -> tuple[Element, ...]:
    found = []
    for key, role in (("detects", "detect"), ("redistributes", "redistribute")):
        if entry.get(key) is True:
            outcome = _object(_object(entry, "without"), role)
            missed = [row.name for row in _goal(figures, outcome) if row.reached is not None and not row.met]
            left = number(outcome.get("remaining"))
            found.append(Element(shown(entry.get("site", NONE)), role, left, ", ".join(missed)))
    return tuple(found)


def goal_rows(figures: Mapping[str, Any]) -> tuple[GoalRow, ...]:
    """The goal of a fit and what it reached; empty for a patch that was not fitted."""
    return tuple(_goal(figures, _object(figures, "outcome")))


def _goal(figures: Mapping[str, Any], outcome: Mapping[str, Any]) -> list[GoalRow]:
    if not isinstance(goal := figures.get("goal"), Mapping):
        return []
    key = "flip_rate" if figures.get("kind") == "attribute" else "asr_above_floor"
    before, after = number(outcome.get("accuracy_base")), number(outcome.get("accuracy"))
    lost = None if before is None or after is None else max(0.0, before - after)
    robust = number(outcome.get("robust_accuracy_loss"))
    robust = None if robust is None else max(0.0, robust)
    rows = [
        GoalRow(residual(figures), number(goal.get(key)), number(outcome.get("remaining"))),
        GoalRow("accuracy lost", number(goal.get("accuracy_loss")), lost),
    ]
    if figures.get("kind") == "backdoor" and "robust_accuracy_loss" in goal:
        rows.append(GoalRow("robust accuracy lost", number(goal.get("robust_accuracy_loss")), robust))
    flagged = number(outcome.get("clean_flag_rate"))
    rows.append(GoalRow("clean flag rate", number(goal.get("clean_flag_rate")), flagged))
    missed, recall = number(goal.get("columns_missed")), number(outcome.get("recall"))
    if missed is not None and missed < 1:
        rows.append(GoalRow("anomalous columns missed", missed, None if recall is None else 1 - recall))
    return rows


_ALIKE = {
    "site ": ("", "flagged tokens are neutral at each, all others the base's bit for bit"),
    "scores at ": ("scores at ", "scores agree with the numpy reference at each, within what rounding is allowed"),
}
"""What checks of one site begin with: how a line for several of them begins, and what it says."""


def check_lines(verification: Verification) -> list[tuple[bool, str, str]]:
    """Whether each check passed, its name and detail, failures first; sites that pass the same check share a line."""
    lines = [(check.passed, shown(check.name), shown(check.detail)) for check in verification.checks]
    alike: dict[tuple[str, ...], list[str]] = {}
    for passed, name, _ in lines:
        kind = next((kind for kind in _ALIKE if name.startswith(kind)), None)
        if passed and kind is not None:
            alike.setdefault((kind, *name.rsplit(", ", 2)[1:]), []).append(name)
    shared = {name: (key, names) for key, names in alike.items() if len(names) > 1 for name in names}
    found = []
    for passed, name, detail in sorted(lines, key=lambda line: line[0]):
        (kind, *where), names = shared.get(name, (("",), [name]))
        if names[0] == name and len(names) > 1:
            begins, said = _ALIKE[kind]
            found.append((passed, ", ".join((f"{begins}{len(names)} sites", *where)), said))
        elif names[0] == name:
            found.append((passed, name, detail))
    return found
