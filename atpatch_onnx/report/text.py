"""Results as rich renderables for the terminal: pure functions, nothing is printed. Made to be read at 80 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from atpatch_onnx.baking.metadata import PatchRecord
from atpatch_onnx.matching.hidden import HiddenLayer
from atpatch_onnx.matching.sites import AttentionSite, Dim, Matches, Place
from atpatch_onnx.patches.patch import Patch
from atpatch_onnx.report import rows
from atpatch_onnx.report.rows import NONE, decimal, percent, residual, shown
from atpatch_onnx.report.tables import FOLD, INTERVALS, NARROW, RIGHT, WIDE, Columns, measure, table, texts
from atpatch_onnx.report.verdict import missed_goal, needless

if TYPE_CHECKING:  # modules that run models, which `atpatch sites` does without
    from atpatch_onnx.discovery.verdict import Search
    from atpatch_onnx.measuring.benchmark import Benchmark
    from atpatch_onnx.measuring.compare import Fix, Ladder
    from atpatch_onnx.measuring.evaluate import Evaluation
    from atpatch_onnx.measuring.evaluate_prompts import Written
    from atpatch_onnx.measuring.verify import Verification


_BLANK = Text("")


def sites_table(matches: Matches, why: bool = False) -> Table:
    """The attention sites of a graph; `why` says by which values and nodes each was recognised."""
    caption = None if matches.sites else "No attention site was found."
    if why:
        columns: Columns = {"#": RIGHT, "Site": {**FOLD, "ratio": 2}, "What and where": {**FOLD, "ratio": 3}}
        wheres = ((str(site.index), shown(site.name), _whereabouts(site, matches)) for site in matches.sites)
        return table("Attention sites", columns, wheres, caption)
    columns = {"#": RIGHT, "Site": FOLD, "Form": {}, "Heads": RIGHT, "Map": RIGHT, "Key": RIGHT, "Type": {}, "Mask": {}}
    cells = (
        (
            *(str(site.index), shown(site.name), site.form.value, _heads(site), _size(site), str(site.key.depth)),
            *(shown(site.dtype.lower()), "yes" if site.masked else "no"),
        )
        for site in matches.sites
    )
    return table("Attention sites", columns, cells, caption)


def _size(site: AttentionSite) -> str:
    parts = "" if site.parts in (0, 1) else f"{_dim(site.parts)} parts of "
    return f"{parts}{_dim(site.queries)} x {_dim(site.keys)}"


def _whereabouts(site: AttentionSite, matches: Matches) -> str:
    kind = {True: "self-attention", False: "cross-attention", None: "self- or cross-attention"}[site.self_attention]
    form = f"{site.form.value}, {_heads(site)} heads, {_size(site)}, depth {site.key.depth}"
    lines = [
        f"{form}, {shown(site.dtype.lower())}, {'masked' if site.masked else 'no mask'}",
        f"{kind}, token axis {shown(site.token_axis)}; flags are {shown(matches.carry_note(site))}",
        f"keys replaced in: {_place(site.key)}",
        f"values replaced in: {_place(site.value)}",
        f"map: {'inside the op' if site.map is None else f'{shown(site.map)} [{site.map_layout}]'}",
        f"output: {shown(site.output)}",
        f"nodes: {_names(site.nodes)}",
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
    columns: Columns = {"Nodes": {**FOLD, "ratio": 2}, "What it is": {}, "Why it is left alone": {**FOLD, "ratio": 3}}
    cells = (
        (_names(miss.nodes), "attention" if miss.attention else "not attention", shown(miss.reason))
        for miss in sorted(matches.near_misses, key=lambda miss: not miss.attention)
    )
    return table("Near misses", columns, cells, None if matches.near_misses else "Nothing else looked like attention.")


def layers_table(layers: Sequence[HiddenLayer]) -> Table:
    """The hidden layers of a model."""
    cells = ((shown(layer.name), str(layer.units), shown(layer.activation)) for layer in layers)
    caption = None if layers else "None that neuron edits could be of."
    return table("Hidden layers", {"Layer": WIDE, "Units": NARROW, "Activation": {}}, cells, caption)


def fit_table(patch: Patch | PatchRecord) -> Table:
    """What the fit found per candidate site, what each does, and what is left of the problem without it."""
    sites = rows.site_rows(patch.figures)
    columns: Columns = {
        "Site": {**WIDE, "min_width": 12},
        **dict.fromkeys(("Sepa-\nration", "Gap", "Preci-\nsion", "Recall", "Flag\nrate"), NARROW),
        "Does": {"no_wrap": True},
        "With-\nout it": NARROW,
    }
    cells = (
        (
            *(row.site, decimal(row.separation), decimal(row.gap, 2), _short_percent(row.precision)),
            *(_short_percent(row.recall), percent(row.flag_rate), *_role_cells(row)),
        )
        for row in sites
    )
    caption = _legend(patch.figures) if sites else "This patch has no figures of a fit."
    made = table("Candidate sites", columns, cells, caption)
    made.padding = (0, 0, 0, 0)  # the divider is a space already: room for long names
    return made


def _role_cells(row: rows.SiteRow) -> tuple[str, str]:
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
    figures, sites = patch.figures, rows.site_rows(patch.figures)
    missed = missed_goal(figures)
    parts: list[RenderableType] = []
    if missed:
        parts.append(Text("\n".join(("GOAL MISSED: the patch does not do what was asked.", *missed)), "bold red"))
    parts += [Text(line, "bold yellow") for line in needless(figures)]
    facts = rows.facts(patch)
    for role, label in (("detect", "Detects at"), ("redistribute", "Redistributes at")):
        names = [row.site for row in sites if any(element.role == role for element in row.elements)]
        if sites:
            facts.append((label, ", ".join(names) or "no site"))
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(overflow="fold")
    for fact in facts:
        grid.add_row(*texts(fact))
    parts.append(grid)
    if goal := rows.goal_rows(figures):
        cells = ((row.name, percent(row.reached), percent(row.bound), "met" if row.met else "MISSED") for row in goal)
        columns: Columns = {"Measure": {}, "Reached": RIGHT, "At most": RIGHT, "": {}}
        parts += [_BLANK, table("Goal, on the validation part", columns, cells)]
    return Group(*parts)


def verification_table(verification: Verification) -> Group:
    """The checks with their verdicts in words, failures first; sites that pass alike share a line."""
    made = table(
        "Checks", {"Result": {"no_wrap": True}, "Check": {**FOLD, "ratio": 2}, "Found": {**FOLD, "ratio": 3}}, ()
    )
    for passed, name, detail in rows.check_lines(verification):
        result = Text("passed", "green") if passed else Text("FAILED", "bold red")
        made.add_row(result, *texts((name, detail)))
    total, failed = len(verification.checks), len(verification.failures)
    if failed:
        line = Text(f"{failed} of {total} checks FAILED: do not ship this file.", "bold red")
    else:
        line = Text(f"All {total} checks passed.", "bold green")
    return Group(made, _BLANK, line)


def evaluation_table(evaluation: Evaluation) -> Group:
    """Before and after with 95 % intervals, the detector at both levels, and whether clean outputs are kept."""
    cells = ((row.name, measure(row.before), measure(row.after)) for row in rows.before_after(evaluation))
    title = f"Before and after, {evaluation.inputs:,} pairs"
    columns: Columns = {"Measure": WIDE, "Before": NARROW, "After": NARROW}
    note = f"{INTERVALS} {rows.standing_in(evaluation)}".strip()
    parts: list[RenderableType] = [table(title, columns, cells, note), _BLANK]
    if levels := rows.detector_rows(evaluation):
        columns = {"Level": {"ratio": 1}, "Precision": NARROW, "Recall": NARROW, "Average\nprecision": NARROW}
        found = ((at.level, measure(at.precision), measure(at.recall), decimal(at.average_precision)) for at in levels)
        parts += [table("Detector", columns, found), _BLANK]
    kept = {True: "yes", False: "NO", None: "no, units are edited"}[evaluation.clean_bit_identical]
    style = "bold red" if evaluation.clean_bit_identical is False else ""
    parts.append(Text(f"Clean inputs without a flag keep their outputs bit for bit: {kept}", style))
    if evaluation.ran is not None:
        parts.append(Text(f"Ran: {_ran(evaluation.ran)}"))
    return Group(*parts)


def written_table(written: Written) -> Table:
    """What a language model writes before and after, with 95 % intervals."""
    found = (
        ("ASR of triggered prompts", written.asr_base, written.asr_cached),
        ("the same without a cache", None, written.asr_uncached),
        ("the same, read in chunks", None, written.asr_chunked),
        ("the same, sampled", None, written.asr_sampled),
        ("Answered as without trigger", None, written.right_triggered),
        ("Clean answers kept", None, written.clean_exact),
        ("Benign tokens flagged", None, written.flags),
    )
    cells = ((name, NONE if before is None else measure(before), measure(after)) for name, before, after in found)
    caption = f"Perplexity: {written.perplexity_base:.3f} before, {written.perplexity_patched:.3f} after."
    columns: Columns = {"Measure": WIDE, "Before": NARROW, "After": NARROW}
    return table(f"Answers to {written.prompts:,} prompts, {written.steps} tokens each", columns, cells, caption)


def edits_table(patch: Patch) -> Table:
    """Which hidden units a patch edits, how, and what each did alone."""
    columns: Columns = {"Layer": WIDE, **dict.fromkeys(("Unit", "Factor", "Constant", "Rank", "Alone"), NARROW)}
    cells = (
        (
            *(row.layer, str(row.unit), decimal(row.factor), decimal(row.constant)),
            *(NONE if row.rank is None else str(row.rank), row.alone),
        )
        for row in rows.edit_rows(patch.figures)
    )
    return table("Edited hidden units", columns, cells)


def ladder_table(ladder: Ladder) -> Group:
    """All fixes of a model beside each other, and which one serves it best."""
    base = next((fix.evaluation for fix in ladder.fixes if fix.evaluation is not None), None)
    what = "ASR above\nfloor" if ladder.kind == "backdoor" else "Flip\nrate"
    names = ("Accuracy", what, "Clean inputs\nchanged", "Edits", "Seconds\nto make", "Time an\ninference")
    of_base = [] if base is None else [("base", percent(base.accuracy_base.value), _before(base), *[NONE] * 3, "1.00")]
    columns: Columns = {"Fix": WIDE, **dict.fromkeys(names, NARROW)}
    made = table(f"Fixes, on {ladder.pairs} held-out pairs", columns, of_base)
    for fix in ladder.fixes:
        figures = [NONE] * 4
        if fix.evaluation is not None and fix.outcome is not None:
            changed = percent(fix.evaluation.clean_changed.value, 1)
            figures = [percent(fix.outcome.accuracy), percent(fix.outcome.remaining), changed, _edits(fix)]
        cells = texts((fix.name, *figures, f"{fix.seconds:.0f}", decimal(fix.time, 2)))
        made.add_row(*cells, style="bold" if fix is ladder.recommended else "")
    failed = [Text(f"{fix.name}: {shown(fix.failure)}") for fix in ladder.fixes if fix.failure]
    return Group(made, *failed, _BLANK, Text(f"Recommended: {shown(ladder.reason)}", "bold"))


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
    graph = ", runs recorded and played again (CUDA graph)" if benchmark.cuda_graph else ""
    where = f" On {benchmark.provider}{graph}. Ran: {_ran(benchmark.ran)}." if benchmark.ran else ""
    columns = dict.fromkeys(("Batch", "Threads", "Base", "Clean inputs", "Flagged inputs", "Base again"), RIGHT)
    cells = (
        (
            *(str(one.batch), str(one.threads), f"{one.base_ms:.2f} ms"),
            *(f"{r.value:.3f} [{r.low:.3f}, {r.high:.3f}]" for r in (one.clean, one.flagged, one.itself)),
        )
        for one in benchmark.timings
    )
    return table(
        f"Cost of a patch at {benchmark.sites} sites, {'with' if benchmark.conditional else 'without'} If",
        columns,
        cells,
        "Ratios of medians, patched over base; in brackets: 95 % bootstrap intervals. Base again: what another "
        f"session of the base comes to.{memory}{where}",
    )


def _ran(ran: Mapping[str, Mapping[str, int]]) -> str:
    """How many nodes of the patched model ran on which provider."""
    return ", ".join(
        f"{one['nodes']} nodes on {shown(name)} ({one['of_the_patch']} of the patch)" for name, one in ran.items()
    )


def search_tables(found: Search) -> list[Table]:
    """The parts and columns that a search found; none where there are none."""
    tables = []
    if found.parts:
        columns: Columns = {"Part": WIDE, "Effect": WIDE, "Decides": NARROW, "Traffic": NARROW, "p": NARROW}
        parts = (
            (
                shown(part.what),
                shown(part.effect),
                measure(part.success),
                NONE if part.share is None else percent(part.share),
                f"{part.chance:.2g}",
            )
            for part in found.parts
        )
        tables.append(table("Parts that decide", columns, parts))
    if found.columns:
        columns = {"Column": WIDE, "Flips": NARROW, "Groups differ": NARROW, "": {}}
        rows_ = (
            (shown(one.name), measure(one.flips), measure(one.parity), "protected" if one.protected else "")
            for one in found.columns
        )
        tables.append(table("Columns", columns, rows_))
    return tables


def _names(nodes: Iterable[str]) -> str:
    return ", ".join(map(shown, nodes)) or NONE


def _dim(dim: Dim) -> str:
    return "?" if dim is None else shown(dim)
