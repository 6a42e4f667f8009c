"""The part of the page that says what a fix costs which is always on: figures of docs/evidence/fairness.json."""

import json
from pathlib import Path

from matplotlib.figure import Figure

from samples.beside import fairness
from samples.pieces import ROOT


def figures():
    runs = json.loads((ROOT / "docs" / "evidence" / "fairness.json").read_text())["runs"]
    return {case: {run["seed"]: run for run in found} for case, found in runs.items()}


def test_every_case_has_a_row_and_a_group_of_bars() -> None:
    found = figures()
    told = fairness.section(found)
    rows = [line for line in told.splitlines() if line.startswith("| ")][2:]
    assert [row.split(" | ")[0].strip("| ") for row in rows] == list(found)
    assert "ExponentiatedGradient is around boosted trees" in told
    axes = Figure().subplots()
    fairness.picture(found, axes)
    assert [label.get_text() for label in axes.get_xticklabels()] == list(found)


def test_what_was_measured_is_taken_as_it_is(tmp_path: Path) -> None:
    run = figures()["german/sex+age"][0]
    file = tmp_path / "german-sex+age-0" / "fairness.json"
    file.parent.mkdir()
    file.write_text(json.dumps(run))
    assert fairness.measure("german/sex+age", 0, tmp_path, False, lambda stage, done, total: None) == run


def test_the_cases_are_those_of_the_sample() -> None:
    assert set(figures()) <= set(fairness.cases(False))
    assert set(fairness.cases(True)) < set(fairness.cases(False))
