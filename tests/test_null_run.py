"""The sample of fits that have nothing to find: its cases on a planted model, and its page."""

import json
from pathlib import Path

import numpy as np
import pytest
from planted import QUICK, Planted
from test_null import BLENDED, SLIGHT, blended

import atpatch_onnx as atp
from samples import null_run
from samples.case import Case

DOCS = Path(__file__).parents[1] / "docs" / "evidence"
POISONED = Planted()


def prepared(case: str, *, folder: Path, **told: object) -> Case:
    folder.mkdir(exist_ok=True)
    twin = folder.parent / "vit-clean-0"
    twin.mkdir(exist_ok=True)
    atp.save(SLIGHT.model(), twin / "base.onnx")
    planted, debug = (BLENDED, blended(400)) if case == null_run.BLENDED else (POISONED, POISONED.debug(400))
    atp.save(planted.model(), folder / "base.onnx")
    return Case(case, 0, folder / "base.onnx", debug, planted.debug(200, seed=9), QUICK)


@pytest.mark.nightly
def test_each_fit_says_what_it_found_and_its_patch_does_nothing_that_matters(tmp_path, monkeypatch):
    monkeypatch.setattr(null_run.fashion, "prepare", prepared)
    assert null_run.main(["--out", str(tmp_path), "--docs", str(tmp_path)]) == 0
    runs = json.loads((tmp_path / "null_run.json").read_text())["runs"]
    assert list(runs) == list(null_run.NULLS)
    assert runs["unpoisoned"]["said"].startswith("Nothing needs a patch: without one, ASR above floor ")
    assert "Not fixable this way" in runs["blended"]["said"]
    for name in ("unpoisoned", "wrong tokens"):
        assert abs(runs[name]["accuracy_lost"]["value"]) <= 0.01
        assert runs[name]["clean_flag_rate"]["value"] <= 0.02
    assert (tmp_path / "null_run.md").read_text() == null_run.render({"runs": runs})


def test_wrong_tokens_are_one_a_pair(tmp_path):
    case = null_run.wrong_tokens(prepared("vit/badnets-fixed", folder=tmp_path / "x"), tmp_path)
    assert (case.debug.suspects.sum(axis=1) == 1).all()
    assert not case.debug.suspects[:, 0].any()


def test_wrong_classes_are_the_same_ones_in_another_order(tmp_path):
    case = prepared("vit/badnets-fixed", folder=tmp_path / "x")
    wrong = null_run.wrong_classes(case, tmp_path)
    assert sorted(wrong.debug.labels) == sorted(case.debug.labels)
    assert not np.array_equal(wrong.debug.labels, case.debug.labels)
