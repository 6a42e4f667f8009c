"""What a result comes to, in a line or in four numbers: what a command says first, or last."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.table import Table

from atpatch_onnx.matching.hidden import HiddenLayer
from atpatch_onnx.matching.sites import Matches
from atpatch_onnx.report.rows import NONE, shown
from atpatch_onnx.report.tables import INTERVALS, NARROW, WIDE, Columns, measure, table
from atpatch_onnx.running.metrics import Rate

if TYPE_CHECKING:  # modules that run models, which `atpatch sites` does without
    from atpatch_onnx.measuring.evaluate import Evaluation
    from atpatch_onnx.measuring.evaluate_prompts import Written

Number = tuple[str, Rate | float | None, Rate | float]
"""A name, and a figure before and after; None where there is none before."""

Numbers = tuple[Number, ...]


def patchable(name: str, matches: Matches, layers: Sequence[HiddenLayer]) -> str:
    """Whether a model can be patched, in one line."""
    refused = sum(miss.attention for miss in matches.near_misses)
    if matches.sites:
        others = f", and {refused} more that cannot" if refused else ""
        return f"{shown(name)} can be patched: {_count(len(matches.sites), 'attention site')}{others}."
    were = f"{_count(refused, 'attention')} {'was' if refused == 1 else 'were'} refused, see below why"
    why = were if refused else "no attention was found"
    units = f"; hidden units of {_count(len(layers), 'layer')} can be edited instead" if layers else ""
    return f"{shown(name)} cannot be patched: {why}{units}."


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def of_pairs(found: Evaluation) -> Numbers:
    """What a fix comes to, on pairs that the fit never saw."""
    accuracy: Number = ("Accuracy", found.accuracy_base, found.accuracy_patched)
    if found.backdoor is not None:
        attack = found.backdoor
        return (
            ("Attack success (ASR); after: above its floor", attack.asr_base, attack.asr_above_floor),
            accuracy,
            ("Accuracy on triggered inputs", attack.robust_accuracy_base, attack.robust_accuracy_patched),
            ("Clean inputs flagged", None, found.clean_flag_rate),
        )
    fairness = found.fairness
    assert fairness is not None, "pairs are of a backdoor or of an attribute"
    return (
        ("Predictions that flip (UF)", fairness.uf_base, fairness.uf_patched),
        accuracy,
        ("Confidence gap", fairness.confidence_gap_base, fairness.confidence_gap_patched),
        ("Clean inputs changed", None, found.clean_changed),
    )


def of_prompts(found: Written) -> Numbers:
    """What a fix comes to, on prompts that the fit never saw."""
    return (
        ("Triggered answers with the payload", found.asr_base, found.asr_cached),
        ("Triggered answers as without the trigger", None, found.right_triggered),
        ("Clean answers kept", None, found.clean_exact),
        ("Benign tokens flagged", None, found.flags),
    )


def numbers_table(numbers: Numbers, count: int, note: str = "") -> Table:
    """Numbers before and after with 95 % intervals, on `count` held-out pairs; a note, where there is one."""
    columns: Columns = {"Measure": WIDE, "Before": NARROW, "After": NARROW}
    cells = ((name, NONE if before is None else measure(before), measure(after)) for name, before, after in numbers)
    return table(f"On {count:,} held-out pairs", columns, cells, f"{INTERVALS} {note}".strip())


def numbers_json(numbers: Numbers) -> list[dict[str, Any]]:
    """The same as plain JSON types."""
    return [{"name": name, "before": _plain(before), "after": _plain(after)} for name, before, after in numbers]


def _plain(value: Rate | float | None) -> Any:
    return asdict(value) if isinstance(value, Rate) else value
