"""The part of the results page that holds AtPatch beside neuron edits."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from atpatch_onnx.report.rows import percent
from samples.page_tables import points, share, table
from samples.summary import Spread, spread

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


def compared_section(cases: Sequence[Sequence[Run]]) -> list[str]:
    """Text and a table a case; `cases` holds the runs of each, one a seed."""
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
        title = f"### {runs[0]['case']}, seed{'s' * (len(runs) > 1)} {seeds}"
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
        f" ({100 * lost:+.2f}, {100 * their_lost:+.2f} points)"
    )
