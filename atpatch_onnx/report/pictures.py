"""The pictures of a report. Nothing is told by colour alone: flags are marked, lines differ in dash, bars in hatch."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from numpy.typing import NDArray

from atpatch_onnx.measuring.evaluate import Evaluation
from atpatch_onnx.measuring.examples import Example, SiteView
from atpatch_onnx.report.images import Grid
from atpatch_onnx.report.rows import Element, percent, shown
from atpatch_onnx.report.svg import AFTER, BEFORE, CLEAN, FLAG, PAPER, RULE, TEXT, Picture, style, to_picture

MAX_BARS = 40
"""Tokens up to which attention is drawn as bars; beyond, as lines."""

Flags = NDArray[np.bool_]


def attention_maps(view: SiteView, flags: Flags, name: str) -> Picture:
    """The map before and after, side by side on one scale, flagged columns marked above."""
    last = int(np.flatnonzero(view.visible).max(initial=0)) + 1  # padding at the end is not shown
    maps = [array[: last if array.shape[0] == array.shape[1] else None, :last] for array in (view.before, view.after)]
    top = max(float(array.max()) for array in maps)
    with style(name):
        figure = Figure(figsize=(5.0, 2.6))
        side, rest = 1.75 / 5.0, 1.75 / 2.6
        first = figure.add_axes((0.1, 0.19, side, rest))
        second = figure.add_axes((0.5, 0.19, side, rest))
        for at, array, title in ((first, maps[0], "Before"), (second, maps[1], "After")):
            image = at.imshow(array, cmap="cividis", vmin=0, vmax=top, interpolation="none", aspect="auto")
            at.set_title(title, pad=13, fontweight="bold")
            at.set_xlabel("key token")
            at.spines[:].set_visible(False)
            at.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            at.yaxis.set_major_locator(MaxNLocator(5, integer=True))
            _mark(at, np.flatnonzero(flags[:last]))
        first.set_ylabel("query token")
        second.set_yticklabels([])
        scale = figure.add_axes((0.875, 0.19, 0.02, rest))
        bar = figure.colorbar(image, cax=scale, format=PercentFormatter(1, decimals=0))
        bar.outline.set_visible(False)
        bar.locator = MaxNLocator(4)
        columns = _numbers(flags)
        alt = f"Attention maps of {view.site} before and after, mean over heads; flagged tokens: {columns}."
        return to_picture(figure, name, shown(alt))


def _mark(at: Axes, columns: NDArray[np.int64]) -> None:
    """A triangle above each of these columns."""
    if not len(columns):
        return
    above: dict[str, Any] = {"transform": at.get_xaxis_transform(), "clip_on": False}
    at.plot(columns, np.full(len(columns), 1.04), "v", color=FLAG, markersize=6, **above)


def flagged_image(
    pixels: NDArray[np.float64], grid: Grid, flags: Flags, anomalous: Flags, name: str, what: str
) -> Picture:
    """An image with flagged patches outlined, and those dotted that should be flagged.

    Args:
        pixels: `[height, width]` or `[height, width, 3]` in [0, 1].
        grid: Where its tokens are.
        flags: `[tokens]`.
        anomalous: `[tokens]`: the tokens that should be flagged.
        name: Keeps the picture's ids apart from others'.
        what: What the image is, for the caption in words.
    """
    height, width = pixels.shape[:2]
    with style(name):
        figure = Figure(figsize=(1.9, 1.9 * height / width))
        at = figure.add_axes((0.02, 0.02, 0.96, 0.96))
        at.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="none", extent=(0, width, height, 0))
        at.set_axis_off()
        at.set(xlim=(0, width), ylim=(height, 0))
        for token in np.flatnonzero(flags | anomalous):
            if token < grid.prefix:
                continue
            row, column = divmod(int(token) - grid.prefix, grid.columns)
            size = width / grid.columns, height / grid.rows
            corner = column * size[0], row * size[1]
            if flags[token]:
                for line, color in ((5.0, PAPER), (2.6, FLAG)):  # an outline that shows on any image
                    at.add_patch(Rectangle(corner, *size, fill=False, edgecolor=color, linewidth=line, clip_on=False))
            if anomalous[token]:
                inner = (corner[0] + 0.14 * size[0], corner[1] + 0.14 * size[1]), 0.72 * size[0], 0.72 * size[1]
                for line, color, dash in ((2.4, PAPER, "-"), (1.4, TEXT, (0, (1.2, 1.2)))):
                    at.add_patch(Rectangle(*inner, fill=False, edgecolor=color, linewidth=line, linestyle=dash))
        return to_picture(figure, name, f"{what}; flagged tokens: {_numbers(flags)}.")


def received_attention(example: Example, number: int, name: str) -> Picture:
    """How much attention each token receives at one site: clean, counterfactual before, and after redistribution."""
    clean, other = example.clean.sites[number], example.counterfactual.sites[number]
    visible = clean.visible | other.visible
    last = int(np.flatnonzero(visible).max(initial=0)) + 1
    series = (
        ("clean", clean.received_before, CLEAN, "", ":"),
        ("before", other.received_before, BEFORE, "////", "--"),
        ("after", other.received_after, AFTER, "", "-"),
    )
    flags = example.counterfactual.flags
    with style(name):
        figure = Figure(figsize=(4.0, 2.4), layout="constrained")
        at = figure.subplots()
        position = np.arange(last)
        for place, (label, values, color, hatch, dash) in enumerate(series):
            if last > MAX_BARS:
                at.plot(position, values[:last], dash, color=color, label=label, linewidth=1.4)
            else:
                at.bar(
                    position + (place - 1) * 0.28,
                    values[:last],
                    0.28,
                    facecolor="none" if hatch else color,
                    edgecolor=color,
                    linewidth=0.7,
                    hatch=hatch,
                    label=label,
                )
        _mark(at, np.flatnonzero(flags[:last]))
        at.set_title(_short(other.site), loc="left", pad=12, fontweight="bold")
        at.set(xlabel="token", ylabel="attention received")
        at.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        at.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        at.margins(x=0.02)
        at.grid(axis="y")
        at.set_ylim(bottom=0)
        figure.legend(loc="outside lower left", ncols=3, handlelength=1.6, borderaxespad=0)
        token = int(np.argmax(np.where(flags[:last], other.received_before[:last], -1)))
        at_token = [f"{label} {percent(float(values[token]), 1)}" for label, values, *_ in series]
        alt = f"Attention received per token at {other.site}. Token {token}: {'; '.join(at_token)}."
        return to_picture(figure, name, shown(alt))


def precision_recall(evaluation: Evaluation, name: str) -> Picture:
    """The curves of the detector by columns and by whole inputs, with the points at which the patch works."""
    levels = (
        ("columns", evaluation.columns, AFTER, "-", "o"),
        ("whole inputs", evaluation.input_level, BEFORE, "--", "s"),
    )
    with style(name):
        figure = Figure(figsize=(4.4, 3.1), layout="constrained")
        at = figure.subplots()
        for label, level, color, dash, marker in levels:
            if level is None:
                continue
            curve, precision, recall = level.curve, level.precision, level.recall
            at.step(curve.recall, curve.precision, dash, where="post", color=color, linewidth=1.6, clip_on=False)
            at.errorbar(
                recall.value,
                precision.value,
                xerr=[[recall.value - recall.low], [recall.high - recall.value]],
                yerr=[[precision.value - precision.low], [precision.high - precision.value]],
                fmt=marker,
                linestyle=dash,
                color=color,
                markersize=6,
                markerfacecolor=PAPER,
                markeredgewidth=1.6,
                label=f"{label}, average precision {curve.average_precision:.3f}",
                clip_on=False,
            )
        for axis in (at.xaxis, at.yaxis):
            axis.set_major_formatter(PercentFormatter(1, decimals=0))
        labels = {"xlabel": "recall: anomalies that are flagged", "ylabel": "precision: flags that are right"}
        at.set(xlim=(0, 1.005), ylim=(0, 1.02), **labels)
        at.grid()
        at.legend(loc="lower left", handlelength=2.4)
        parts = [
            f"{label}: precision {percent(level.precision.value, 1)}, recall {percent(level.recall.value, 1)}"
            for label, level, *_ in levels
            if level is not None
        ]
        return to_picture(figure, name, f"Precision-recall curves of the detector; {'; '.join(parts)}.")


def contributions(
    elements: Sequence[Element], reached: float | None, bound: float | None, what: str, name: str
) -> Picture | None:
    """What is left of the problem without each element of the patch; None where it was not tried."""
    known = [(element, element.left) for element in elements if element.left is not None]
    if not known:
        return None
    rows: list[tuple[str, float]] = [(f"{e.role} at {_short(e.site)}", left) for e, left in known]
    if reached is not None:
        rows.insert(0, ("the whole patch", reached))
    with style(name):
        figure = Figure(figsize=(4.8, 0.75 + 0.36 * len(rows)), layout="constrained")
        at = figure.subplots()
        places = np.arange(len(rows))
        colors = [AFTER if label == "the whole patch" else BEFORE for label, _ in rows]
        hatches = ["" if label == "the whole patch" else "////" for label, _ in rows]
        bars = at.barh(places, [left for _, left in rows], 0.62, facecolor="none", edgecolor=colors, linewidth=1)
        for bar, color, hatch in zip(bars, colors, hatches, strict=True):
            bar.set_hatch(hatch)
            bar.set_facecolor("none" if hatch else color)
        at.bar_label(bars, [f" {percent(left, 1)}" for _, left in rows], padding=2, fontsize=9)
        if bound is not None:
            at.axvline(bound, color=TEXT, linewidth=1, linestyle=":")
            at.annotate(
                f"goal {percent(bound, 1)}", (bound, 1), (4, 3), ("data", "axes fraction"), "offset points", fontsize=9
            )
        at.set_yticks(places, [label for label, _ in rows])
        at.tick_params(axis="y", length=0)
        at.invert_yaxis()
        at.set_xlim(0, 1.12 * max(0.05, *(left for _, left in rows), bound or 0))
        at.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        at.set_xlabel(f"{what} without it")
        at.spines[["left"]].set_color(RULE)
        listed = "; ".join(f"{label} {percent(left, 1)}" for label, left in rows)
        return to_picture(figure, name, f"{what} without each element: {listed}.")


def _short(site: str) -> str:
    """A name that leaves room for the bars: its end tells sites apart."""
    site = shown(site)
    return site if len(site) <= 36 else "..." + site[-33:]


def _numbers(flags: Flags) -> str:
    marked = [str(column) for column in np.flatnonzero(flags)]
    return ", ".join(marked[:12]) + (f" and {len(marked) - 12} more" if len(marked) > 12 else "") if marked else "none"
