"""The sample of fixes that are always on: a small run from its table to its page, and the page of the real one."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_tables import RECIPE, SIZE
from test_tables import table as table  # a fixture

from atpatch_onnx.discovery import Attribute
from samples import fairness, fairness_page, fairness_rivals, tables
from samples.fairness import Setting
from samples.table_data import TableData

DOCS = Path(__file__).parents[1] / "docs" / "evidence"


@pytest.fixture
def small(table: TableData, monkeypatch) -> TableData:
    """The sample over a small table, its colour protected as well, and another category beside them."""
    place = np.random.default_rng(5).integers(0, 3, size=(len(table.rows), 1)).astype(np.float32)
    both = replace(
        table,
        attributes=(*table.attributes, Attribute.categorical("place", 3)),
        rows=np.concatenate([table.rows, place], axis=1),
        protected=("sex", "colour"),
    )
    size = replace(SIZE, recipe=replace(RECIPE, epochs=4))
    monkeypatch.setattr(fairness, "load_table", lambda name, folder: both)
    monkeypatch.setattr(fairness, "SETS", {"german": (("sex",), ("sex", "colour"))})
    monkeypatch.setattr(fairness, "FAST", {"german": size})
    monkeypatch.setattr(fairness_rivals, "ROUNDS", 3)
    return both


def setting(table: TableData, *protected: str) -> Setting:
    parts = tables.divide(table, SIZE, 0)
    return Setting("german/x", table, protected, parts, Path("base.onnx"), 0)


def test_every_combination_of_values_is_tried(small):
    both = setting(small, "sex", "colour")
    assert both.values == [(float(sex), float(colour)) for sex in range(2) for colour in range(5)]
    changed = both.with_values(small.rows[:7], (1, 4))
    assert (changed[:, :2] == [1, 4]).all()
    np.testing.assert_array_equal(changed[:, 2:], small.rows[:7, 2:])
    np.testing.assert_array_equal(both.groups(small.rows), small.rows[:, 0] * 5 + small.rows[:, 1])


def test_pairs_change_every_protected_attribute_and_nothing_else(small):
    debug = fairness.pairs(setting(small, "sex", "colour"), np.arange(300), seed=3)
    differs = debug.clean["table"] != debug.counterfactual["table"]
    assert differs[:, :2].all()
    assert not differs[:, 2:].any()


def test_uf_counts_a_row_that_flips_under_any_value(small):
    one = setting(small, "colour")

    def predict(rows):  # one of five colours decides, for some rows
        return ((rows[:, 1] == 3) & (rows[:, 2] > 25)).astype(np.int64)

    found = fairness.figures(one, predict)
    assert found["uf"]["value"] == pytest.approx((one.evaluation[:, 2] > 25).mean())
    assert set(found["groups"]) == {"colour"}


@pytest.mark.nightly
def test_a_small_run_from_the_table_to_the_page(small, tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--data", str(tmp_path), "--fast"]
    assert fairness.main(arguments) == 0, capsys.readouterr()
    document = json.loads((tmp_path / "fairness.json").read_text())
    assert list(document["runs"]) == ["german/sex", "german/sex+colour"]
    for runs, combinations in zip(document["runs"].values(), (2, 10), strict=True):
        (run,) = runs
        assert run["combinations"] == combinations
        assert run["ours"]["verified"]
        assert run["ours"]["uf"]["value"] == 0 < run["base"]["uf"]["value"]
        assert run["ours"]["no path"].startswith("from table[0]")
        assert set(fairness_page.METHODS) < set(run)
    page = (tmp_path / "fairness.md").read_text()
    assert page == fairness_page.render(document)
    assert "UF 0.00% in 2 of 2" in page
    files = {file: file.stat().st_mtime_ns for file in tmp_path.glob("*/fairness.json")}
    assert fairness.main(arguments) == 0
    assert {file: file.stat().st_mtime_ns for file in files} == files, "what is there is not measured again"


def test_a_fix_that_is_not_proven_fails_the_command(tmp_path):
    rate = {"value": 0.0, "low": 0, "high": 0.01, "count": 100}
    run = {"seed": 1, "ours": {"verified": False, "failures": ["no path"], "uf": rate}}
    assert fairness_page.uncertified({"runs": {"a/b": [run]}}) == ["a/b, seed 1: no path"]
    flips = {"seed": 1, "ours": {"verified": True, "failures": [], "uf": {**rate, "value": 0.01}}}
    assert fairness_page.uncertified({"runs": {"a/b": [flips]}}) == ["a/b, seed 1: UF above zero"]


def test_what_cannot_be_made_is_said_with_the_reason(small, tmp_path, monkeypatch):
    def none(setting):
        raise ValueError("Degenerate labels for sensitive feature value 3")

    monkeypatch.setattr(fairness_rivals, "thresholds", none)
    for name in ("trees", "gradient"):
        monkeypatch.setattr(fairness_rivals, name, lambda setting: None)
    monkeypatch.setattr(fairness_rivals, "without", lambda *given: None)
    found = fairness_rivals.measured(setting(small, "sex"), SIZE, tmp_path, lambda *given: {}, lambda *news: None)
    assert found["threshold"] == {"refused": "Degenerate labels for sensitive feature value 3"}
    assert found["trees"] == {}


def test_the_page_is_rendered_from_its_figures():
    document = json.loads((DOCS / "fairness.json").read_text())
    assert (DOCS / "fairness.md").read_text() == fairness_page.render(document), "run samples.fairness --render"
    assert not fairness_page.uncertified(document)
