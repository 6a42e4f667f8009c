"""`neuron_edits.json` and `neuron_edits.md` of `docs/evidence`: AtPatch beside edits of hidden units."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from atpatch_onnx.report.rows import percent
from samples import in_short
from samples.page_tables import points, share, table
from samples.pieces import Piece, figures_of
from samples.summary import Spread, spread

NOTES = Path(__file__).with_name("compared_notes.md")
"""What was seen on the way, in words; goes into the page as it is."""

Run = Mapping[str, Any]
"""A `Ladder` as JSON, with its case and seed."""

HEADER = (
    "fix",
    "accuracy",
    "accuracy lost, points",
    "left",
    "clean inputs changed",
    "DPD",
    "EOD",
    "meets the goal",
    "seconds to make",
    "time an inference",
)


def write_page(out: Path, docs: Path, pieces: Iterable[Piece]) -> None:
    """Gather the figures in `out` and write the page and its data into `docs`."""
    cases = {case: found for (_, case), found in figures_of(pieces, out).items()}
    docs.mkdir(parents=True, exist_ok=True)
    hours = math.fsum(run["core_seconds"] for found in cases.values() for run in found) / 3600
    document = {"core_hours": round(hours, 2), "runs": cases}
    (docs / "neuron_edits.json").write_text(json.dumps(document, indent=1) + "\n")
    (docs / "neuron_edits.md").write_text(render(list(cases.values()), hours))


def render(cases: Sequence[Sequence[Run]], hours: float) -> str:
    """The page; `cases` holds the runs of each case, one a seed, and `hours` are those of one core that it took."""
    parts = [
        "# AtPatch beside edits of hidden units",
        f"Written by `python -m samples.comparison`; {hours:.1f} hours of one core, the bases' trainings apart. The"
        " bases, debug sets and evaluation inputs are those of [results.md](results.md), at most 3,000 debug and 2,000"
        " evaluation pairs of them; figures are means over seeds and written as there. The figures of every run are in"
        " [neuron_edits.json](neuron_edits.json).",
        *in_short.comparison({runs[0]["case"]: _verdict(runs) for runs in cases}),
        *compared_section(cases),
        "## What was seen on the way",
        NOTES.read_text().strip(),
    ]
    return "\n\n".join(parts) + "\n"


def compared_section(cases: Sequence[Sequence[Run]]) -> list[str]:
    """Text and a table a case."""
    parts = [
        "IDNN freezes guilty hidden units, CARE scales them; both edit every input. *Left*: ASR above floor, or UF. A"
        " fix behind another is fitted on the model with the other in it. *Meets the goal*: of how many seeds, on the"
        " evaluation pairs, with the goal of the case's fit. The settings of neuron edits were searched for on the"
        " validation part: IDNN's number of units, with and without chance; CARE's number of units (of MiniLM, its"
        " own 5), with its own weight of the accuracy. Every unit was a candidate, but of MiniLM's 9,216 the 1,024"
        " (IDNN) and 512 (CARE) that differ most. *Time*: over the base's, clean inputs, batch 1, beside other work.",
    ]
    for runs in cases:
        seeds = ", ".join(str(run["seed"]) for run in runs)
        title = f"## {runs[0]['case']}, seed{'s' * (len(runs) > 1)} {seeds}"
        parts += [title, table(HEADER, [*_base(runs), *_fixes(runs)]), _verdict(runs)]
    return parts if cases else ["Not measured."]


def _of(runs: Sequence[Run], name: str) -> list[Run]:
    """What came of a fix in every run that could make it."""
    return [fix for run in runs for fix in run["fixes"] if fix["name"] == name and fix["evaluation"] is not None]


def _names(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(fix["name"] for run in runs for fix in run["fixes"]))


def _left(fix: Run) -> Any:
    evaluation = fix["evaluation"]
    return evaluation["backdoor"]["asr_above_floor"] if evaluation["backdoor"] else evaluation["fairness"]["uf_patched"]


def _lost(fix: Run) -> float:
    evaluation = fix["evaluation"]
    return float(evaluation["accuracy_base"]["value"] - evaluation["accuracy_patched"]["value"])


def best_edit(runs: Sequence[Run]) -> tuple[str, float] | None:
    """The neuron edit that leaves least on average, and how much; None where none was made."""
    found = {name: spread(_of(runs, name), _left) for name in ("IDNN", "CARE")}
    means = [(left.mean, name) for name, left in found.items() if left is not None]
    return None if not means else (min(means)[1], min(means)[0])


def _group(found: Sequence[Run], metric: str, side: str) -> Spread | None:
    return spread(found, lambda fix: (fix["evaluation"]["fairness"] or {}).get(f"{metric}_difference_{side}"))


def _groups(found: Sequence[Run], side: str) -> tuple[str, str]:
    return (
        share(_group(found, "demographic_parity", side), 1),
        share(_group(found, "equalized_odds", side), 1),
    )


def _base(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """The base's own row, as far as some fix was measured beside it."""
    measured = [[fix for fix in run["fixes"] if fix["evaluation"] is not None] for run in runs]
    found = [fixes[0] for fixes in measured if fixes]
    if not found:
        return []
    attack = found[0]["evaluation"]["backdoor"] is not None
    name = "base" + (", ASR" if attack else "")
    problem = spread(
        found,
        lambda fix: fix["evaluation"]["backdoor"]["asr_base"] if attack else fix["evaluation"]["fairness"]["uf_base"],
    )
    accuracy = spread(found, lambda fix: fix["evaluation"]["accuracy_base"])
    return [(name, share(accuracy), "-", share(problem), "-", *_groups(found, "base"), "-", "-", "1")]


def _fixes(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    rows = []
    for name in _names(runs):
        found = _of(runs, name)
        if not found:
            rows.append((name, "could not be made", *["-"] * (len(HEADER) - 2)))
            continue
        changed = spread(found, lambda fix: fix["evaluation"]["clean_changed"])
        seconds, time = spread(found, lambda fix: fix["seconds"]), spread(found, lambda fix: fix["time"])
        rows.append(
            (
                name,
                share(spread(found, lambda fix: fix["evaluation"]["accuracy_patched"])),
                points(spread(found, _lost)),
                share(spread(found, _left)),
                share(None if changed is None else replace(changed, low=None, high=None)),
                *_groups(found, "patched"),
                f"{sum(not fix['shortfalls'] for fix in found)} of {len(runs)}",
                "-" if seconds is None else f"{seconds.mean:.0f}",
                "-" if time is None else f"{time.mean:.2f}",
            )
        )
    return rows


ALIKE = 0.002
"""Shares that differ by no more count as alike: about the half of a 95 % interval of a small share of 2,000 inputs."""


def _verdict(runs: Sequence[Run]) -> str:
    """Whether redistribution repairs better and keeps more than neuron edits do, by the figures above."""
    means = {}
    for name in _names(runs):
        found = _of(runs, name)
        left, lost = spread(found, _left), spread(found, _lost)
        if left is not None and lost is not None:
            means[name] = (left.mean, lost.mean)
    if "AtPatch" not in means:
        return "AtPatch could not be fitted."
    parts = [_against(name, means["AtPatch"], means[name]) for name in ("IDNN", "CARE") if name in means]
    if not parts:
        return "No neuron edits could be made."
    recommended = [str(run["recommended"]) for run in runs]
    return f"AtPatch alone {'; '.join(parts)}. Recommended, a seed each: {', '.join(recommended)}."


def _against(name: str, ours: tuple[float, float], theirs: tuple[float, float]) -> str:
    def word(left: float, right: float) -> str:
        return "about as much" if abs(left - right) <= ALIKE else "less" if left < right else "more"

    (left, lost), (their_left, their_lost) = ours, theirs
    return (
        f"leaves {word(left, their_left)} {'as' if abs(left - their_left) <= ALIKE else 'than'} {name}"
        f" ({percent(left)}, {percent(their_left)}) and loses {word(lost, their_lost)} accuracy"
        f" ({100 * lost:+z.2f}, {100 * their_lost:+z.2f} points)"
    )
