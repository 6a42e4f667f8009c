"""The verdict of a report in one sentence, with what speaks against the fix, worst first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from atpatch_onnx.baking.metadata import PatchRecord
from atpatch_onnx.patches.patch import Patch
from atpatch_onnx.report.rows import goal_rows, number, percent, residual, shown, standing_in

if TYPE_CHECKING:  # modules that run models, which `atpatch sites` does without
    from atpatch_onnx.measuring.evaluate import Evaluation
    from atpatch_onnx.measuring.verify import Verification


class Tone(StrEnum):
    """How good the news is."""

    GOOD = "good"
    WARNING = "warning"
    BAD = "bad"


@dataclass(frozen=True)
class Verdict:
    """What a reader should take away."""

    tone: Tone
    label: str
    """Two or three words that carry the tone without colour."""

    sentence: str
    objections: tuple[str, ...]
    """What speaks against the fix; empty where nothing does."""


def judge(patch: Patch | PatchRecord, evaluation: Evaluation | None, verification: Verification | None) -> Verdict:
    """The verdict on a patch, from whatever is known of it."""
    figures = patch.figures
    broken = [] if verification is None else [f"{shown(c.name)}: {shown(c.detail)}" for c in verification.failures]
    if evaluation is not None and evaluation.clean_bit_identical is False:
        broken.append("Clean inputs without a flag do not all keep their outputs bit for bit.")
    missed = missed_goal(figures)
    beyond = [] if evaluation is None else _beyond_goal(figures, evaluation)
    idle = needless(figures)
    objections = (*broken, *missed, *beyond, *idle)
    summary = _summary(figures, evaluation)
    if broken:
        return Verdict(Tone.BAD, "Do not ship", f"The patched file fails its checks. {summary}", objections)
    if missed:
        label = "Not fixable this way" if any(_beyond_detectors(figures)) else "Goal missed"
        return Verdict(Tone.BAD, label, f"The fix does not reach its own goal. {summary}", objections)
    if beyond:
        return Verdict(
            Tone.WARNING, "Look closer", f"The fix held where it was fitted, not here. {summary}", objections
        )
    if idle:
        return Verdict(Tone.WARNING, "Nothing to fix", f"The model met the goal before. {summary}", objections)
    if evaluation is None or verification is None:
        gaps = [name for name, result in (("evaluated", evaluation), ("verified", verification)) if result is None]
        return Verdict(Tone.WARNING, f"Not {' or '.join(gaps)}", summary, objections)
    return Verdict(Tone.GOOD, "Fix holds", summary, objections)


def needless(figures: Mapping[str, Any]) -> tuple[str, ...]:
    """That the base met the goal of the fit as it was: one line, or none."""
    said = figures.get("needless")
    if not isinstance(said, str):
        return ()
    return (f"Nothing needs a patch: without one, {shown(said)}, within the bounds of the goal.",)


def missed_goal(figures: Mapping[str, Any]) -> tuple[str, ...]:
    """By how much the fit missed its goal, a line a bound; empty where it met it, or was never fitted."""
    if figures.get("meets_target", True) is True:
        return ()
    lines = figures.get("shortfalls")
    found = tuple(f"On the validation part: {shown(line)}." for line in lines) if isinstance(lines, list) else ()
    return (*(found or ("On the validation part the goal was missed.",)), *_beyond_detectors(figures))


def _beyond_detectors(figures: Mapping[str, Any]) -> Iterator[str]:
    """That no detector could reach the goal, a line a bound; nothing where one could, or that is not known."""
    best = figures.get("at_best")
    lines = best.get("shortfalls") if isinstance(best, Mapping) else None
    for line in lines if isinstance(lines, list) else ():
        yield f"Not fixable this way: with flags without a fault, {shown(line)}."


def _beyond_goal(figures: Mapping[str, Any], evaluation: Evaluation) -> list[str]:
    """Where the evaluation is beyond the goal of the fit."""
    remaining = robust = None
    if evaluation.backdoor is not None:
        remaining = evaluation.backdoor.asr_above_floor.value
        robust = evaluation.backdoor.robust_accuracy_lost.value
    elif evaluation.fairness is not None:
        remaining = evaluation.fairness.uf_patched.value
    lost = evaluation.accuracy_lost.value
    found = {
        residual(figures): remaining,
        "accuracy lost": lost,
        "robust accuracy lost": robust,
        "clean flag rate": evaluation.clean_flag_rate.value,
    }
    lines = []
    for row in goal_rows(figures):
        value = number(found.get(row.name))
        if value is not None and row.bound is not None and value > row.bound:
            lines.append(
                f"On the evaluated inputs: {row.name} {percent(value)}, over the bound of {percent(row.bound)}."
            )
    return lines


def _summary(figures: Mapping[str, Any], evaluation: Evaluation | None) -> str:
    if evaluation is None:
        reached = next((row.reached for row in goal_rows(figures)), None)
        left = "" if reached is None else f"; {residual(figures)} {percent(reached)} on its validation part"
        return f"Nothing was measured on inputs that the fit never saw{left}."
    parts = []
    if evaluation.backdoor is not None:
        attack = evaluation.backdoor
        parts.append(
            f"attack success falls from {percent(attack.asr_base.value, 1)} to {percent(attack.asr_patched.value, 1)}"
            f" (floor {percent(attack.asr_floor.value, 1)})"
        )
    if evaluation.fairness is not None:
        before, after = evaluation.fairness.uf_base.value, evaluation.fairness.uf_patched.value
        parts.append(f"the flip rate goes from {percent(before)} to {percent(after)}")
    was, now = (percent(rate.value, 1) for rate in (evaluation.accuracy_base, evaluation.accuracy_patched))
    parts.append(f"clean accuracy stays at {now}" if was == now else f"clean accuracy goes from {was} to {now}")
    if evaluation.clean_bit_identical:
        parts.append("inputs without a flag keep their outputs bit for bit")
    sentence = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
    return f"On {evaluation.inputs:,} pairs, {sentence}. {standing_in(evaluation)}".strip()
