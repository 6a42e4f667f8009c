"""The pictures of the results page: detectors, what each element is worth, and attention before and after."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from samples.case import folder_of

Runs = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]

BEFORE, AFTER, FLAG = "#d55e00", "#0072b2", "#d55e00"
"""Of Okabe and Ito's palette, told apart with any colour vision."""

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
DASHES = ("-", "--", "-.", ":")


def draw(out: Path, folder: Path, runs: Runs) -> list[str]:
    """Draw what the figures allow into `folder`, made if it is not there; the names of the files."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    painters: dict[str, Callable[[], Figure | None]] = {
        "precision_recall.png": lambda: precision_recall(runs),
        "thresholds.png": lambda: thresholds(runs),
        "contributions.png": lambda: contributions(runs),
        "maps.png": lambda: maps(out, runs),
    }
    for name, paint in painters.items():
        figure = paint()
        if figure is not None:
            figure.savefig(folder / name, dpi=130, metadata={"Software": None})
            drawn.append(name)
    return drawn


def _tasks(cases: Sequence[str]) -> dict[str, list[str]]:
    """Cases by what stands before the stroke: images, text, tables."""
    found: dict[str, list[str]] = {"images": [], "text": [], "tables": []}
    for case in cases:
        model = case.split("/")[0]
        kind = "images" if model in ("vit", "deit") else "text" if model == "minilm" else "tables"
        found[kind].append(case)
    return {kind: members for kind, members in found.items() if members}


def precision_recall(runs: Runs) -> Figure | None:
    """A panel a task, a curve a case: the first seed's detectors, by columns, and where the patch works."""
    cases = [case for work, case in runs if work == "measured"]
    if not cases:
        return None
    tasks = _tasks(cases)
    figure = Figure(figsize=(4.2 * len(tasks), 3.6), layout="constrained")
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    for at, (kind, members) in zip(panels, tasks.items(), strict=True):
        for number, case in enumerate(members):
            columns = runs["measured", case][0]["evaluation"]["columns"]
            color = COLORS[number % len(COLORS)]
            curve = columns["curve"]
            at.step(curve["recall"], curve["precision"], DASHES[number % 4], where="post", color=color, label=case)
            at.plot(columns["recall"]["value"], columns["precision"]["value"], "o", color=color, clip_on=False)
        at.set_title(kind)
        at.set_xlabel("recall: anomalous columns that are flagged")
        _percent_axes(at)
        at.legend(loc="lower left", fontsize=8)
    panels[0].set_ylabel("precision: flags that are right")
    return figure


def thresholds(runs: Runs) -> Figure | None:
    """What is left, and the accuracy lost, over the clean flag rate that the threshold is set to."""
    ablated = [(case, found) for (work, case), found in runs.items() if work == "ablated"]
    if not ablated:
        return None
    figure = Figure(figsize=(4.2 * len(ablated), 3.4), layout="constrained")
    panels = figure.subplots(1, len(ablated), squeeze=False)[0]
    for at, (case, found) in zip(panels, ablated, strict=True):
        sweep = [row for row in found[0]["rows"] if row["variant"].startswith("threshold at")]
        rates = [float(row["variant"].split()[2].rstrip("%")) / 100 for row in sweep]
        left = [row["remaining"] for row in sweep]
        lost = [row["accuracy_base"] - row["accuracy"] for row in sweep]
        at.semilogx(rates, left, "o-", color=BEFORE, label="left of the problem")
        at.semilogx(rates, lost, "s--", color=AFTER, label="accuracy lost")
        at.set_title(case)
        at.set_xlabel("clean inputs at which the threshold is set")
        for axis in (at.xaxis, at.yaxis):
            axis.set_major_formatter(PercentFormatter(1))
        at.grid(alpha=0.4)
        at.legend(fontsize=8)
    return figure


def contributions(runs: Runs) -> Figure | None:
    """What is left without each element of a patch: the first seed of the first case of each task."""
    cases = [members[0] for members in _tasks([case for work, case in runs if work == "measured"]).values()]
    bars = []
    for case in cases:
        fit = runs["measured", case][0]["fit"]
        rows = [("the whole patch", fit["outcome"]["remaining"])]
        for site in fit["sites"]:
            rows += [(f"{role} at {site['site']}", one["remaining"]) for role, one in site["without"].items()]
        bars.append((case, rows))
    if not bars:
        return None
    longest = max(len(rows) for _, rows in bars)
    figure = Figure(figsize=(4.6 * len(bars), 1.0 + 0.3 * longest), layout="constrained")
    panels = figure.subplots(1, len(bars), squeeze=False)[0]
    for at, (case, rows) in zip(panels, bars, strict=True):
        places = np.arange(len(rows))
        at.barh(places, [left for _, left in rows], 0.6, color=[AFTER] + [BEFORE] * (len(rows) - 1))
        at.set_yticks(places, [label for label, _ in rows], fontsize=7)
        at.invert_yaxis()
        at.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        at.set_title(f"{case}: left without it", fontsize=9)
    return figure


def maps(out: Path, runs: Runs) -> Figure | None:
    """Attention before and after at one site, an example a task."""
    views = []
    for members in _tasks([case for work, case in runs if work == "measured"]).values():
        seed = runs["measured", members[0]][0]["seed"]
        file = folder_of(out, members[0], seed) / "view.npz"
        if file.is_file():
            with np.load(file, allow_pickle=False) as arrays:
                views.append((members[0], {name: arrays[name] for name in arrays.files}))
    if not views:
        return None
    figure = Figure(figsize=(6.4, 3.1 * len(views)), layout="constrained")
    for panels, (case, view) in zip(figure.subplots(len(views), 2, squeeze=False), views, strict=True):
        top = max(float(view["before"].max()), float(view["after"].max()))
        for at, side in zip(panels, ("before", "after"), strict=True):
            image = at.imshow(view[side], cmap="cividis", vmin=0, vmax=top, interpolation="none", aspect="auto")
            flagged = np.flatnonzero(view["flags"])
            at.plot(flagged, np.full(len(flagged), -1.2), "v", color=FLAG, clip_on=False, markersize=5)
            at.set_title(f"{case}, {side}", fontsize=9, pad=10)
            at.set_xlabel(f"key token, {view['site']}", fontsize=8)
        panels[0].set_ylabel("query token")
        figure.colorbar(image, ax=panels, format=PercentFormatter(1, decimals=0), shrink=0.8)
    return figure


def _percent_axes(at: Axes) -> None:
    at.set_xlim(0, 1.01)
    at.set_ylim(0, 1.02)
    for axis in (at.xaxis, at.yaxis):
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    at.grid(alpha=0.4)
