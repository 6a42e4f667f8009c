"""`docs/evidence/fairness.json` and `docs/evidence/fairness.md`: what a fix that is always on comes to."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from atpatch_onnx.report.rows import percent
from samples import in_short
from samples.page_tables import named, points, share, table
from samples.summary import Spread, spread

NOTES = Path(__file__).with_name("fairness_notes.md")
"""What a UF of zero means, and what was tried, in words; goes into the page as it is."""

Run = Mapping[str, Any]
"""What `samples.fairness.measure` found."""

METHODS = {
    "base": "the base",
    "ours": "**always neutral**",
    "without": "trained without the attribute",
    "threshold": "ThresholdOptimizer behind the base",
    "trees": "boosted trees",
    "gradient": "ExponentiatedGradient around such trees",
}
"""What is compared, in the order of the page."""

REFERENCE = {"ours": "base", "without": "base", "threshold": "base", "gradient": "trees"}
"""Whose accuracy is lost."""

HEADER = ("fix", "accuracy", "accuracy lost, points", "UF, any value", "DPD", "EOD")


def write_page(document: Mapping[str, Any], docs: Path) -> None:
    """Write the page and its data into `docs`."""
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "fairness.json").write_text(json.dumps(document, indent=1) + "\n")
    (docs / "fairness.md").write_text(render(document))


def uncertified(document: Mapping[str, Any]) -> list[str]:
    """Cases and seeds in which our fix is not proven, or an input flips, and why."""
    return [
        f"{case}, seed {run['seed']}: {', '.join(run['ours']['failures']) or 'UF above zero'}"
        for case, runs in document["runs"].items()
        for run in runs
        if not run["ours"]["verified"] or run["ours"]["uf"]["value"] > 0
    ]


def render(document: Mapping[str, Any]) -> str:
    """The page of `fairness.json`."""
    runs: Mapping[str, Sequence[Run]] = document["runs"]
    parts = [
        "# Fairness, proven",
        "Written by `python -m samples.fairness`. The attribute's token is neutral in every input at every site"
        " (`FitOptions(always=True)`): nothing is detected, and no path leads from the attribute to the output. Figures"
        " are means over the seeds that each case names, in brackets the smallest and the largest seed, then the 95 %"
        " interval at the rows of one seed. *UF, any value*: the share of"
        " evaluation rows that get another answer under any value of the attribute, or any combination of values where"
        " there are several, all of them tried. DPD and EOD are fairlearn's, with the groups of each attribute. The"
        " figures of every run are in [fairness.json](fairness.json).",
        *in_short.fairness(runs),
        NOTES.read_text().strip(),
    ]
    for case, found in runs.items():
        parts += [f"## {case}", _told(found), table(HEADER, _rows(found))]
    return "\n\n".join(parts) + "\n"


def _told(runs: Sequence[Run]) -> str:
    """What was proven and tried of a case."""
    first = runs[0]
    proven = sum(run["ours"]["verified"] for run in runs)
    guessed = "; ".join(
        f"{name} {percent(_mean(runs, name, 'guessed'))}"
        f" (the most frequent value: {percent(_mean(runs, name, 'most frequent'))})"
        for name in first["proxies"]
    )
    return (
        f"With {named([run['seed'] for run in runs])}. {first['rows']:,} evaluation rows,"
        f" {first['combinations']} values or combinations each."
        f" Proven for {proven} of {len(runs)} seeds: {first['ours']['no path']}."
        f" Proxies: trees guess the attribute from the columns that are left, right for {guessed} of the rows."
    )


def _mean(runs: Sequence[Run], attribute: str, figure: str) -> float:
    return float(sum(run["proxies"][attribute][figure] for run in runs) / len(runs))


def _rows(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    found = []
    for name, shown in METHODS.items():
        refused = [run[name]["refused"] for run in runs if "refused" in run[name]]
        if refused:
            found.append((shown, f"none: {refused[0]}", *[""] * (len(HEADER) - 2)))
            continue
        found.append(
            (
                shown,
                share(spread(runs, lambda run, name=name: run[name]["accuracy"])),  # type: ignore[misc]
                points(lost(runs, name)),
                share(spread(runs, lambda run, name=name: run[name]["uf"])),  # type: ignore[misc]
                _of_groups(runs, name, "dpd"),
                _of_groups(runs, name, "eod"),
            )
        )
    return found


def lost(runs: Sequence[Run], name: str) -> Spread | None:
    """Accuracy below that of the model that a fix starts from; where it is paired, with the interval."""
    if name not in REFERENCE or any("accuracy" not in run[name] for run in runs):
        return None
    if all("accuracy_lost" in run[name] for run in runs):
        return spread(runs, lambda run: run[name]["accuracy_lost"])
    reference = REFERENCE[name]
    return spread(runs, lambda run: run[reference]["accuracy"]["value"] - run[name]["accuracy"]["value"])


def _of_groups(runs: Sequence[Run], name: str, metric: str) -> str:
    """A difference between groups, of each attribute."""
    attributes = list(runs[0][name]["groups"])
    means = {
        attribute: sum(run[name]["groups"][attribute][metric]["value"] for run in runs) / len(runs)
        for attribute in attributes
    }
    if len(means) == 1:
        return percent(next(iter(means.values())))
    return ", ".join(f"{attribute} {percent(value)}" for attribute, value in means.items())
