"""`docs/evidence/results.json` and `docs/evidence/results.md` from the figures of single runs."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from atpatch_onnx.report.rows import percent
from samples import in_short
from samples import results_pictures as pictures
from samples.bounds import FIGURES
from samples.page_tables import named, points, seeds, share, table
from samples.pieces import Piece, figures_of
from samples.summary import GOALS, Spread, Verdict, spread, verdicts

NOTES = Path(__file__).with_name("results_notes.md")
"""What was tried, in words; goes into the page as it is."""

Runs = Mapping[tuple[str, str], Sequence[Mapping[str, Any]]]
"""Figures by work and case, one a seed."""

POINTS = ("accuracy lost", "robust accuracy below the twin's")
"""Figures that are differences, in points."""

Spreads = Mapping[tuple[str, str], Mapping[str, Spread | None]]

PAPER = (
    ("ASR, patched: ViT, BERT", "ASR above floor", "97.9 % to 0.46-0.70 %"),
    ("UF, patched", "UF, patched", "0.04 %"),
    ("Accuracy lost, in points", "accuracy lost", "0.1"),
    ("Precision of the detector", "precision", "0.910-0.981"),
    ("Recall of the detector", "recall", "above 0.994"),
)
"""What the paper (AtPatch, ICSE 2026) reports, beside the figure of ours that it is compared with."""


def write_page(out: Path, docs: Path, pieces: Iterable[Piece]) -> None:
    """Gather the figures in `out` and write the page, its data and its pictures into `docs`."""
    runs = figures_of(pieces, out)
    docs.mkdir(parents=True, exist_ok=True)
    folder = docs / "results"
    drawn = pictures.draw(out, folder, runs)
    judged = verdicts(_spreads(runs))
    document = {
        "core_hours": round(_core_seconds(out, runs) / 3600, 2),
        "pictures": [f"{folder.name}/{name}" for name in drawn],
        "seeds": sorted({run["seed"] for found in runs.values() for run in found}),
        "goals": [_verdict_json(verdict) for verdict in judged],
        "runs": {f"{work} {case}": [_trimmed(run) for run in found] for (work, case), found in runs.items()},
    }
    (docs / "results.json").write_text(json.dumps(document, indent=1) + "\n")
    (docs / "results.md").write_text(render(document))


def _spreads(runs: Runs) -> Spreads:
    return {
        key: {name: spread(found, read) for name, read in FIGURES.items()}
        for key, found in runs.items()
        if key[0] in ("measured", "inverted")
    }


def _core_seconds(out: Path, runs: Runs) -> float:
    """Of all pieces, and of every training, by its own clock: a training is not done again with the pieces."""
    seconds = [run["core_seconds"] for (work, _), found in runs.items() if work != "trained" for run in found]
    seconds += [json.loads(file.read_text())["seconds"] for file in out.glob("*/base.json")]
    return math.fsum(seconds)


def _verdict_json(verdict: Verdict) -> dict[str, Any]:
    bound = verdict.bound
    limit = {"at_least" if bound.at_least else "at_most": bound.limit}
    return {
        "goal": verdict.goal,
        "case": verdict.case,
        "figure": bound.figure,
        **limit,
        "found": verdict.value,
        "met": verdict.met,
    }


def _trimmed(run: Mapping[str, Any]) -> dict[str, Any]:
    """A run without its curves, which are in the pictures."""
    kept = dict(run)
    if "evaluation" in kept:
        evaluation = dict(kept["evaluation"])
        for level in ("columns", "input_level"):
            if evaluation[level] is not None:
                evaluation[level] = {name: value for name, value in evaluation[level].items() if name != "curve"}
        kept["evaluation"] = evaluation
    return kept


def render(document: Mapping[str, Any]) -> str:
    """The page of `results.json`."""
    runs = {(work, case): found for key, found in document["runs"].items() for work, case in [key.split(" ", 1)]}
    spreads, hours, seeds = _spreads(runs), document["core_hours"], document["seeds"]
    judged = verdicts(spreads)
    parts = [
        "# Results",
        "Written by `python -m samples.results`. Every case in the tables was trained, fitted and measured with"
        f" {named(seeds)}; {hours:.1f} hours of one core in all, trainings included. Figures are means"
        " over seeds, in brackets the smallest and the largest seed, then the 95 % interval of the mean at the inputs"
        " of one seed: Wilson's for shares, Agresti and Min's for accuracy lost, the bootstrap's for group differences."
        " Training, debug and evaluation inputs are disjoint, and no fit saw an evaluation input."
        " How recipes were chosen is told at the end. The figures of every run are in [results.json](results.json)."
        " AtPatch beside edits of hidden units: [neuron_edits.md](neuron_edits.md).",
        *in_short.results(spreads, judged),
        "## Ours beside the paper's",
        *_summary(spreads),
        "## The goals",
        *_goals(judged),
        "## Backdoors",
        *_backdoors(spreads),
        *_searches(runs),
        "## Unfairness",
        *_unfairness(spreads),
        "## One thing changed at a time",
        *_ablations(runs),
        *(f"![{Path(name).stem.replace('_', ' ')}]({name})" for name in document["pictures"]),
        NOTES.read_text().strip(),
    ]
    return "\n\n".join(parts) + "\n"


def _summary(spreads: Spreads) -> list[str]:
    goal_cases = {case for goal in GOALS if goal.work == "measured" for case in goal.cases}
    rows = []
    for label, figure, paper in PAPER:
        found = [
            figures[figure]
            for (work, case), figures in spreads.items()
            if work == "measured" and case in goal_cases and figures[figure] is not None
        ]
        means = [one.mean for one in found if one is not None]
        if not means:
            continue
        show = (lambda v: f"{100 * v:+z.2f}") if figure == "accuracy lost" else percent
        average = math.fsum(means) / len(means)
        rows.append((label, paper, f"{show(average)} on average, {show(min(means))} to {show(max(means))}"))
    note = (
        "Ours: ASR is counted above the floor, on inputs that the base does not send to the target"
        " anyway; averages are over all cases with a goal below, blended left out."
    )
    return [table(("", "paper", "ours"), rows), note]


def _goals(judged: Sequence[Verdict]) -> list[str]:
    def show(verdict: Verdict, value: float | None) -> str:
        if value is None:
            return "not measured"
        return f"{100 * value:+z.3f} points" if verdict.bound.figure in POINTS else percent(value, 3)

    rows = [
        (
            verdict.goal,
            verdict.case,
            verdict.bound.figure,
            f"{'>=' if verdict.bound.at_least else '<='} {show(verdict, verdict.bound.limit).lstrip('+')}",
            show(verdict, verdict.value),
            "yes" if verdict.met else "**no**",
        )
        for verdict in judged
    ]
    return [table(("goal", "case", "figure", "bound", "mean over seeds", "met"), rows)]


def _rows(spreads: Spreads, figure: str) -> list[tuple[str, Mapping[str, Spread | None]]]:
    """Cases that have this figure, by the name to show."""
    return [
        (case + (", trigger inverted" if work == "inverted" else ""), figures)
        for (work, case), figures in spreads.items()
        if figures.get(figure) is not None
    ]


def _backdoors(spreads: Spreads) -> list[str]:
    found = _rows(spreads, "ASR")
    strength = [
        (
            name,
            seeds(f["ASR"]),
            share(f["accuracy of the unpoisoned twin"]),
            share(f["accuracy"]),
            share(f["ASR"]),
            share(f["floor"]),
        )
        for name, f in found
    ]
    fixed = [
        (
            name,
            share(f["ASR above floor"]),
            points(f["accuracy lost"]),
            share(f["robust accuracy"]),
            share(f["robust accuracy of the twin"]),
            share(f["recall"]),
            share(f["precision"]),
            share(f["clean inputs flagged"]),
            f"{f['core seconds'].mean:.0f} s" if f["core seconds"] else "-",
        )
        for name, f in found
    ]
    return [
        "The bases, and their twins trained without poison: a weak base would make a fix look good.",
        table(("case", "seeds", "twin's accuracy", "accuracy", "ASR", "floor"), strength),
        "After the fix. Robust accuracy is of triggered inputs against their true labels; the twin's is the best that"
        " can be asked. Recall and precision are the detector's, by tokens. Core time is one core's, for the fit, its"
        " verification and its evaluation (and the search for the trigger).",
        table(
            (
                "case",
                "ASR above floor",
                "accuracy lost, points",
                "robust accuracy",
                "twin's robust accuracy",
                "recall",
                "precision",
                "clean inputs flagged",
                "core time",
            ),
            fixed,
        ),
    ]


def _searches(runs: Runs) -> list[str]:
    """What was found where the trigger was not known."""
    rows = [
        (
            case,
            str(run["seed"]),
            str(search["target"]),
            "yes" if search.get("stands_out", True) else "**no**",
            ", ".join(percent(one, 0) for one in search["success"]),
            " ".join(search.get("tokens", ())) or "-",
        )
        for (work, case), found in runs.items()
        if work == "inverted"
        for run in found
        for search in (run["training"]["inversion"],)
    ]
    if not rows:
        return []
    header = ("case", "seed", "class found", "stands out", "success", "tokens found")
    return ["Where the trigger was not known, the search found this.", table(header, rows)]


def _unfairness(spreads: Spreads) -> list[str]:
    shares = {
        "discriminates": "individual discrimination",
        **{name: name for name in ("UF", "UF, patched", "UF of any value", "UF of any value, patched", "accuracy")},
        "larger class": "accuracy of the larger class",
        "boosting": "accuracy of boosting",
    }
    groups = ("DPD", "DPD, patched", "EOD", "EOD, patched")
    header = ("case", "seeds", *shares, "accuracy lost, points", "clean inputs changed", *groups)
    rows = [
        (
            *(name, seeds(f["UF"]), *(share(f[key]) for key in shares.values())),
            *(points(f["accuracy lost"]), share(f["clean inputs changed"]), *(share(f[key], 1) for key in groups)),
        )
        for name, f in _rows(spreads, "UF")
    ]
    return [
        "UF: predictions that change when only the protected attribute does, to one other value, drawn; of any value:"
        " to one at least of all others. *Discriminates*: the same of random rows, as ADF counts it. Beside the base's"
        " accuracy: of always answering the larger class, and of gradient boosting on the same rows. DPD and EOD:"
        " differences in demographic parity and equalized odds between the groups, by fairlearn.",
        table(header, rows),
    ]


def _ablations(runs: Runs) -> list[str]:
    parts = [
        "Judged on the first evaluation pairs of one seed, in a session that computes what the baked graph does."
        " *Left*: ASR above floor, or UF, with its 95 % Wilson interval. Variants of the redistribution keep the fit's"
        " sites and thresholds; those of the detector are trained, calibrated and searched anew."
    ]
    for (work, case), found in runs.items():
        if work != "ablated":
            continue
        rows = []
        for index, row in enumerate(found[0]["rows"]):
            over_seeds = [run["rows"][index] for run in found]

            def of(read: str, over: Sequence[Mapping[str, Any]] = over_seeds) -> Spread:
                found_rates = [{"rate": {"value": one[read], "count": one["count"]}} for one in over]
                shown = spread(found_rates, lambda one: one["rate"])
                assert shown is not None
                return shown if read == "remaining" else replace(shown, low=None, high=None)

            loss = spread(over_seeds, lambda one: one["accuracy_base"] - one["accuracy"])
            rows.append(
                (
                    row["variant"],
                    share(of("remaining")),
                    points(loss),
                    points(spread(over_seeds, lambda one: one["robust_accuracy_loss"])),
                    share(of("clean_flag_rate")),
                    share(of("recall")),
                    share(of("precision")),
                )
            )
        header = (
            "variant",
            "left",
            "accuracy lost, points",
            "robust accuracy lost, points",
            "clean inputs flagged",
            "recall",
            "precision",
        )
        parts += [f"### {case}", table(header, rows)]
    return parts
