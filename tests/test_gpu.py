"""The sample that measures on a GPU: all of it runs on a CPU, and its page says what was measured and what was not."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from models import draw_patch
from planted import Planted

import atpatch_onnx as atp
from atpatch_onnx.baking.kernels import kernels
from atpatch_onnx.running.sessions import Session
from samples import gpu, performance
from samples.gpu_cells import GOALS, MODELS, cells, few, firing
from samples.kernel_counts import counts

DOCS = Path(__file__).parents[1] / "docs" / "evidence"
FIGURES = json.loads((DOCS / "performance.json").read_text())


def test_every_cell_with_a_goal_is_measured_and_stands_first() -> None:
    found = cells(graphs=True)
    assert len(set(found)) == len(found)
    with_goal = [cell for cell in found if cell.goal is not None]
    assert len(with_goal) == len(MODELS) * sum(len(of) for of in GOALS.values())
    assert found[: len(with_goal)] == with_goal
    assert {replace(cell, cuda_graph=False) for cell in found} <= set(found), "and without a CUDA graph"
    assert not any(cell.cuda_graph for cell in cells(graphs=False))


def test_a_patch_such_as_fits_find() -> None:
    model = Planted(layers=7).model()
    patch = few(draw_patch(model))
    assert [site.detector is not None for site in patch.sites] == [True, True, False, False]
    assert all(site.neutral is not None for site in patch.sites)
    found = kernels(atp.bake(model, patch, target="cuda"))
    assert found.total == 19


def test_a_share_of_the_tokens_is_flagged() -> None:
    planted = Planted(tokens=12)
    inputs, model = planted.inputs(40)[0], planted.model()
    patch = firing(model, few(draw_patch(model)), inputs)
    baked = atp.bake(model, patch, target="cuda", site_flags=True)
    flags = Session(baked).run(inputs)[f"atpatch/{patch.sites[0].site}/flags"]
    assert flags.mean() == pytest.approx(0.02, abs=0.005)


@pytest.mark.nightly
def test_all_of_it_runs_on_a_cpu(tmp_path, capsys) -> None:
    out = tmp_path / "gpu.json"
    assert gpu.main(["--fast", "--provider", "cpu", "--out", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert not figures["failed"]
    assert not figures["lacking"]
    assert set(figures["rows"]) == {cell.key for cell in cells(graphs=False)}
    assert set(figures["hooks"]) == set(MODELS)
    assert len(figures["checks"]) == 4
    assert all(check["passed"] and check["checks"] > 20 for check in figures["checks"].values())
    assert all(np.isfinite(row["ratio"]).all() and row["base_ms"] > 0 for row in figures["rows"].values())
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {out}"
    page = performance.page(FIGURES, figures)
    assert f"of commit {figures['machine']['commit']}. CPU, CPUExecutionProvider" in page
    assert "`verify` on the device, vit, fp16: all" in page
    assert "Not measured for this form" not in page


def test_what_there_was_no_time_for_is_named(tmp_path) -> None:
    out = tmp_path / "gpu.json"
    assert gpu.main(["--fast", "--provider", "cpu", "--seconds", "0", "--out", str(out)]) == 0
    figures = json.loads(out.read_text())
    assert len(figures["lacking"]) == 4 + len(cells(graphs=False)) + 2
    assert "**Not measured**: vit, fp16; vit, fp32;" in performance.page(FIGURES, figures)


def test_a_step_that_fails_is_said_and_ends_nothing_else(tmp_path, monkeypatch) -> None:
    def fails(self, model, precision):
        raise RuntimeError(f"no kernel\nfor {model}")

    monkeypatch.setattr(gpu.Bench, "check", fails)
    monkeypatch.setattr(
        gpu.Bench, "time", lambda self, cell: {"form": "", "base_ms": 1.0, "ratio": [1, 1, 1], "goal": 1}
    )
    monkeypatch.setattr(gpu.Bench, "hooks", lambda self, model: [4.0, 3.9, 4.1])
    out = tmp_path / "gpu.json"
    assert gpu.main(["--fast", "--provider", "cpu", "--out", str(out)]) == 1
    figures = json.loads(out.read_text())
    assert figures["failed"]["vit, fp16"] == "RuntimeError: no kernel for vit"
    assert len(figures["rows"]) == len(cells(graphs=False))
    assert "vit, fp16 failed: RuntimeError: no kernel for vit" in performance.page(FIGURES, figures)


@pytest.mark.nightly
def test_the_counts_of_the_page_are_those_of_the_code() -> None:
    assert json.loads((DOCS / "gpu.json").read_text())["kernels"] == counts()


def test_the_page_says_that_nothing_was_measured() -> None:
    figures = json.loads((DOCS / "gpu.json").read_text())
    page = performance.page(FIGURES, figures)
    assert ("Not measured for this form of the patch" in page) == (figures["machine"] is None)
    for row in figures["kernels"]:
        assert f"| {row['precision']} | {row['reading']} | {row['detecting']} |" in page
