"""Fairness, proven: a fix that is always on, beside what people would pick instead (`samples.fairness`, in short)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from atpatch_onnx.files import write_whole
from atpatch_onnx.running.sessions import Progress
from samples import fairness, in_short
from samples.beside.part import Figures, Part
from samples.case import folder_of
from samples.fairness_page import METHODS, lost
from samples.page_tables import named, points, share, table
from samples.results_pictures import COLORS
from samples.summary import spread

BESIDE = ("ours", "threshold", "gradient", "without")
"""The fixes that stand in the table and in the picture."""


def cases(fast: bool) -> tuple[str, ...]:
    """Each table with one attribute, and with all of them."""
    names = fairness.FAST if fast else fairness.SETS
    return tuple(fairness.named(name, protected) for name in names for protected in fairness.SETS[name])


def measure(case: str, seed: int, out: Path, fast: bool, progress: Progress) -> dict[str, Any]:
    """What `samples.fairness` measured, or measures now."""
    file = folder_of(out, case, seed) / "fairness.json"
    if not file.is_file():
        name = case.split("/")[0]
        every = fairness.settings(name, seed, out, None, fast, progress)
        setting = next(one for one in every if one.name == case)
        found = fairness.measure(setting, (fairness.FAST if fast else fairness.SIZES)[name], file.parent, progress)
        write_whole(file, (json.dumps(found, indent=1) + "\n").encode())
    measured: dict[str, Any] = json.loads(file.read_text())
    return measured


def section(figures: Figures) -> str:
    """What is proven and what it costs, then a row a case."""
    runs = _runs(figures)
    (_, lines) = in_short.fairness(runs)
    header = ("case", "seeds", "UF, the base", "UF, ours", *(f"accuracy lost, {METHODS[one]}" for one in BESIDE))
    rows = [
        (
            case,
            named([run["seed"] for run in found]).removeprefix("the "),
            share(spread(found, lambda run: run["base"]["uf"])),
            share(spread(found, lambda run: run["ours"]["uf"])),
            *(points(lost(found, name)) for name in BESIDE),
        )
        for case, found in runs.items()
    ]
    told = (
        "ExponentiatedGradient is around boosted trees: what it loses is beside the trees alone. What was tried, group"
        " metrics before and after, and what a UF of zero does not mean: [fairness, proven](fairness.md)."
    )
    return "\n\n".join([lines, table(header, rows), told])


def picture(figures: Figures, axes: Axes) -> None:
    """Accuracy lost, a group of bars a case."""
    runs = _runs(figures)
    width = 0.8 / len(BESIDE)
    for number, (name, color) in enumerate(zip(BESIDE, COLORS, strict=False)):
        found = {case: lost(of_case, name) for case, of_case in runs.items()}
        at = [place + number * width for place, one in enumerate(found.values()) if one is not None]
        axes.bar(at, [100 * one.mean for one in found.values() if one is not None], width, color=color)
        axes.bar(0, 0, color=color, label=METHODS[name].strip("*"))
    axes.set_xticks([place + 0.4 - width / 2 for place in range(len(runs))], list(runs), rotation=40, ha="right")
    axes.set_ylabel("accuracy lost, points")
    axes.axhline(0, color="black", linewidth=0.6)
    axes.legend(fontsize="small")


def _runs(figures: Figures) -> Mapping[str, Sequence[Mapping[str, Any]]]:
    return {case: list(runs.values()) for case, runs in figures.items()}


PART = Part("fairness", "Fairness, proven", cases, measure, section, picture)
