"""Results as rich renderables for the terminal: pure functions, nothing is printed. Made to be read at 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from atpatch_onnx.baking.metadata import PatchRecord
from atpatch_onnx.matching.hidden import HiddenLayer
from atpatch_onnx.matching.sites import AttentionSite, Dim, Matches, Place
from atpatch_onnx.patches.patch import Patch
from atpatch_onnx.report.rows import (
    NONE,
    SiteRow,
    before_after,
    check_lines,
    decimal,
    detector_rows,
    edit_rows,
    goal_rows,
    number,
    pairs_used,
    patch_id,
    percent,
    reading,
    residual,
    shown,
    site_rows,
)
from atpatch_onnx.report.verdict import missed_goal
from atpatch_onnx.running.metrics import Difference, Rate

if TYPE_CHECKING:  # modules that run models, which `atpatch sites` does without
    from atpatch_onnx.measuring.benchmark import Benchmark
    from atpatch_onnx.measuring.compare import Fix, Ladder
    from atpatch_onnx.measuring.evaluate import Evaluation
    from atpatch_onnx.measuring.verify import Verification


def sites_table(matches: Matches, why: bool = False) -> Table:
    """The attention sites of a graph; `why` says by which values and nodes each was recognised."""
    table = _table("Attention sites", caption=None if matches.sites else "No attention site was found.")
    table.add_column("#", justify="right")
    table.add_column("Site", overflow="fold", ratio=2 if why else None)
    if why:
        table.add_column("What and where", overflow="fold", ratio=3)
        for site in matches.sites:
            table.add_row(*_texts((str(site.index), shown(site.name), _whereabouts(site, matches))))
        return table
    table.add_column("Form")
    for name in ("Heads", "Map", "Key"):
        table.add_column(name, justify="right")
    table.add_column("Type")
    table.add_column("Mask")
    for site in matches.sites:
        cells = (site.form.value, _heads(site), _size(site), str(site.key.depth), shown(site.dtype.lower()))
        table.add_row(*_texts((str(site.index), shown(site.name), *cells, "yes" if site.masked else "no")))
    return table


def _size(site: AttentionSite) -> str:
    parts = "" if site.parts in (0, 1) else f"{_dim(site.parts)} parts of "
    return f"{parts}{_dim(site.queries)} x {_dim(site.keys)}"


def _whereabouts(site: AttentionSite, matches: Matches) -> str:
    kind = "self-attention" if site.self_attention else "cross-attention"
    form = f"{site.form.value}, {_heads(site)} heads, {_size(site)}, depth {site.key.depth}"
    lines = [
        f"{form}, {shown(site.dtype.lower())}, {'masked' if site.masked else 'no mask'}",
        f"{kind}, token axis {shown(site.token_axis)}; flags are {shown(matches.carry_note(site))}",
        f"keys replaced in: {_place(site.key)}",
        f"values replaced in: {_place(site.value)}",
        f"map: {'inside the op' if site.map is None else f'{shown(site.map)} [{site.map_layout}]'}",
        f"output: {shown(site.output)}",
        f"nodes: {', '.join(map(shown, site.nodes)) or NONE}",
    ]
    return "\n".join(lines)


def _heads(site: AttentionSite) -> str:
    return _dim(site.heads) if site.heads == site.key.heads else f"{_dim(site.heads)}/{site.key.heads}"


def _place(place: Place) -> str:
    """A tensor and what its axes are; of a packed one, which of its features."""
    axes = ", ".join(
        {"n": "maps", "k": "tokens", "nk": "maps and tokens", "kn": "tokens and maps"}.get(letters, str(size))
        for letters, size in zip(place.axes, place.sizes, strict=True)
    )
    return f"{shown(place.value)} [{axes}]" + ("" if place.whole else f", {place.features} of its features")


def near_misses_table(matches: Matches) -> Table:
    """What looked like attention and was refused, with the reasons; unsupported attention first."""
    table = _table("Near misses", caption=None if matches.near_misses else "Nothing else looked like attention.")
    table.add_column("Nodes", overflow="fold", ratio=2)
    table.add_column("What it is")
    table.add_column("Why it is left alone", overflow="fold", ratio=3)
    for miss in sorted(matches.near_misses, key=lambda miss: not miss.attention):
        nodes = ", ".join(map(shown, miss.nodes)) or NONE
        table.add_row(*_texts((nodes, "attention" if miss.attention else "not attention", shown(miss.reason))))
    return table


def layers_table(layers: Sequence[HiddenLayer]) -> Table:
    """The hidden layers of a model."""
    table = _table("Hidden layers", caption=None if layers else "None that neuron edits could be of.")
    table.add_column("Layer", overflow="fold", ratio=1)
    table.add_column("Units", justify="right", no_wrap=True)
    table.add_column("Activation")
    for layer in layers:
        table.add_row(*_texts((shown(layer.name), str(layer.units), shown(layer.activation))))
    return table


def fit_table(patch: Patch | PatchRecord) -> Table:
    """What the fit found per candidate site, what each does, and what is left of the problem without it."""
    rows = site_rows(patch.figures)
    table = _table("Candidate sites", caption=_legend(patch.figures) if rows else "This patch has no figures of a fit.")
    table.add_column("Site", overflow="fold", ratio=1, min_width=12)
    table.padding = (0, 0, 0, 0)  # the divider is a space already: room for long names
    for name in ("Sepa-\nration", "Gap", "Preci-\nsion", "Recall", "Flag\nrate"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("Does", no_wrap=True)
    table.add_column("With-\nout it", justify="right", no_wrap=True)
    for row in rows:
        cells = (
            row.site,
            decimal(row.separation),
            decimal(row.gap, 2),
            _short_percent(row.precision),
            _short_percent(row.recall),
            percent(row.flag_rate),
            *_role_cells(row),
        )
        table.add_row(*_texts(cells))
    return table


def _role_cells(row: SiteRow) -> tuple[str, str]:
    """What a site does and what is left without it, a line an element each."""
    if not row.elements:
        return NONE, NONE
    names = ["detect" if element.role == "detect" else "redistr." for element in row.elements]
    return "\n".join(names), "\n".join(_short_percent(element.left) for element in row.elements)


def _short_percent(value: float | None) -> str:
    """A share in at most five places."""
    return "100%" if value == 1 else percent(value, 1)


def _legend(figures: Mapping[str, object]) -> str:
    return (
        "Separation: ROC area of token scores. Gap: lowest anomalous less largest clean score, in deviations of benign "
        "ones. Flag rate: clean inputs flagged. "
        f"Without it: {residual(figures)} when this element alone is switched off."
    )


def fit_summary(patch: Patch | PatchRecord) -> Group:
    """What a fit ended with: identity, elements, goal; a missed goal comes first and in words."""
    figures, rows = patch.figures, site_rows(patch.figures)
    missed = missed_goal(figures)
    parts: list[RenderableType] = []
    if missed:
        parts.append(Text("\n".join(("GOAL MISSED: the patch does not do what was asked.", *missed)), "bold red"))
    facts = [("Patch", patch_id(patch)), ("Base", shown(patch.base))]
    if "kind" in figures:
        target = figures.get("target")
        facts.append(("Against", shown(figures["kind"]) + ("" if target is None else f", to class {shown(target)}")))
    if pairs := pairs_used(figures):
        facts.append(("Pairs", pairs))
    if read := reading(figures):
        facts.append(("Detectors read", read))
    for role, label in (("detect", "Detects at"), ("redistribute", "Redistributes at")):
        names = [row.site for row in rows if any(element.role == role for element in row.elements)]
        if rows:
            facts.append((label, ", ".join(names) or "no site"))
    if number(figures.get("settings_tried")) is not None:
        facts.append(("Settings tried", f"{figures['settings_tried']:,}"))
    parts.append(_facts(facts))
    goal = goal_rows(figures)
    if goal:
        table = _table("Goal, on the validation part")
        table.add_column("Measure")
        for name in ("Reached", "At most"):
            table.add_column(name, justify="right")
        table.add_column("")
        for row in goal:
            table.add_row(*_texts((row.name, percent(row.reached), percent(row.bound), "met" if row.met else "MISSED")))
        parts += [_BLANK, table]
    return Group(*parts)


def verification_table(verification: Verification) -> Group:
    """The checks with their verdicts in words, failures first; sites that pass alike share a line."""
    table = _table("Checks")
    table.add_column("Result", no_wrap=True)
    table.add_column("Check", overflow="fold", ratio=2)
    table.add_column("Found", overflow="fold", ratio=3)
    for passed, name, detail in check_lines(verification):
        result = Text("passed", "green") if passed else Text("FAILED", "bold red")
        table.add_row(result, *_texts((name, detail)))
    total, failed = len(verification.checks), len(verification.failures)
    if failed:
        line = Text(f"{failed} of {total} checks FAILED: do not ship this file.", "bold red")
    else:
        line = Text(f"All {total} checks passed.", "bold green")
    return Group(table, _BLANK, line)


def evaluation_table(evaluation: Evaluation) -> Group:
    """Before and after with 95 % intervals, the detector at both levels, and whether clean outputs are kept."""
    table = _table(f"Before and after, {evaluation.inputs:,} pairs", caption="In brackets: 95 % intervals.")
    table.add_column("Measure", overflow="fold", ratio=1)
    for name in ("Before", "After"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in before_after(evaluation):
        table.add_row(*_texts((row.name, measure(row.before), measure(row.after))))
    detector = _table("Detector")
    detector.add_column("Level", ratio=1)
    for name in ("Precision", "Recall", "Average\nprecision"):
        detector.add_column(name, justify="right", no_wrap=True)
    for level in detector_rows(evaluation):
        cells = (level.level, measure(level.precision), measure(level.recall), decimal(level.average_precision))
        detector.add_row(*_texts(cells))
    kept = {True: "yes", False: "NO", None: "no, units are edited"}[evaluation.clean_bit_identical]
    style = "bold red" if evaluation.clean_bit_identical is False else ""
    line = Text(f"Clean inputs without a flag keep their outputs bit for bit: {kept}", style)
    parts: list[RenderableType] = [table, _BLANK]
    if detector.row_count:
        parts += [detector, _BLANK]
    return Group(*parts, line)


def edits_table(patch: Patch) -> Table:
    """Which hidden units a patch edits, how, and what each did alone."""
    table = _table("Edited hidden units")
    table.add_column("Layer", overflow="fold", ratio=1)
    for name in ("Unit", "Factor", "Constant", "Rank", "Alone"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in edit_rows(patch.figures):
        cells = (str(row.unit), decimal(row.factor), decimal(row.constant), NONE if row.rank is None else str(row.rank))
        table.add_row(*_texts((row.layer, *cells, row.alone)))
    return table


def ladder_table(ladder: Ladder) -> Group:
    """All fixes of a model beside each other, and which one serves it best."""
    base = next((fix.evaluation for fix in ladder.fixes if fix.evaluation is not None), None)
    what = "ASR above\nfloor" if ladder.kind == "backdoor" else "Flip\nrate"
    table = _table(f"Fixes, on {ladder.pairs} held-out pairs")
    table.add_column("Fix", overflow="fold", ratio=1)
    for name in ("Accuracy", what, "Clean inputs\nchanged", "Edits", "Seconds\nto make", "Time an\ninference"):
        table.add_column(name, justify="right", no_wrap=True)
    if base is not None:
        table.add_row(*_texts(("base", percent(base.accuracy_base.value), _before(base), NONE, NONE, NONE, "1.00")))
    for fix in ladder.fixes:
        found, outcome = fix.evaluation, fix.outcome
        if found is None or outcome is None:
            table.add_row(*_texts((fix.name, *[NONE] * 4, f"{fix.seconds:.0f}", NONE)))
            continue
        cells = (
            percent(outcome.accuracy),
            percent(outcome.remaining),
            percent(found.clean_changed.value, 1),
            _edits(fix),
        )
        style = "bold" if fix is ladder.recommended else ""
        table.add_row(*_texts((fix.name, *cells, f"{fix.seconds:.0f}", decimal(fix.time, 2))), style=style)
    failed = [Text(f"{fix.name}: {shown(fix.failure)}") for fix in ladder.fixes if fix.failure]
    return Group(table, *failed, _BLANK, Text(f"Recommended: {shown(ladder.reason)}", "bold"))


def _edits(fix: Fix) -> str:
    """How many units are edited and how many sites patched, a line each."""
    counts = {
        "units": sum(len(edit.units) for patch in fix.patches for edit in patch.edits),
        "sites": sum(len(patch.sites) for patch in fix.patches),
    }
    return "\n".join(f"{count} {what}" for what, count in counts.items() if count)


def _before(evaluation: Evaluation) -> str:
    if evaluation.backdoor is not None:
        return f"{percent(evaluation.backdoor.asr_base.value)} ASR"
    return NONE if evaluation.fairness is None else percent(evaluation.fairness.uf_base.value)


def benchmark_table(benchmark: Benchmark) -> Table:
    """Ratios of medians, patched over base, with their intervals."""
    memory = "" if benchmark.memory is None else f" Peak memory, clean: {benchmark.memory:.3f} of the base's."
    table = _table(
        f"Cost of a patch at {benchmark.sites} sites, {'with' if benchmark.conditional else 'without'} If",
        caption="Ratios of medians, patched over base; in brackets: 95 % bootstrap intervals. Base again: what another "
        f"session of the base comes to.{memory}",
    )
    for name in ("Batch", "Threads", "Base", "Clean inputs", "Flagged inputs", "Base again"):
        table.add_column(name, justify="right")
    for one in benchmark.timings:
        ratios = (f"{r.value:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in (one.clean, one.flagged, one.itself))
        table.add_row(*_texts((str(one.batch), str(one.threads), f"{one.base_ms:.2f} ms", *ratios)))
    return table


def measure(value: Rate | Difference | float | None) -> str:
    """A rate or a difference of rates with its interval, or a plain number."""
    if not isinstance(value, Rate | Difference):
        return decimal(value, 4)
    if isinstance(value, Rate) and value.count == 0:
        return "no inputs"
    return f"{value.value:.2%} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


_BLANK = Text("")


def _table(title: str, caption: str | None = None) -> Table:
    return Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        caption_style="dim",
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )


def _facts(facts: Iterable[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in facts:
        grid.add_row(*_texts((name, value)))
    return grid


def _texts(cells: Iterable[str]) -> tuple[Text, ...]:
    """Cells as plain text: names may hold what rich would take for markup."""
    return tuple(Text(cell) for cell in cells)


def _dim(dim: Dim) -> str:
    return "?" if dim is None else shown(dim)
