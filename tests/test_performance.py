"""The page on cost: it is what its figures say, and its command runs."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models import with_outputs

import atpatch_onnx as atp
from atpatch_onnx.measuring.benchmark import opens, synthetic_patch
from atpatch_onnx.running.sessions import Session
from samples import performance
from samples.speed_models import FUSED, KINDS, export, hooked, torch_model

DOCS = Path(__file__).parents[1] / "docs" / "evidence"


@pytest.fixture(scope="module")
def figures() -> dict:
    return json.loads((DOCS / "performance.json").read_text())


@pytest.fixture(scope="module")
def gpu() -> dict:
    return json.loads((DOCS / "gpu.json").read_text())


def test_the_page_is_rendered_from_its_figures(figures, gpu):
    assert (DOCS / "performance.md").read_text() == performance.page(figures, gpu)


def test_the_page_has_every_row_its_goal_and_what_equal_things_differ_by(figures, gpu):
    page = performance.page(figures, gpu)
    assert figures["rows"]
    for case in performance.CASES:
        if case.label not in figures["rows"]:
            assert case.label in page.split("**Not measured yet**: ")[1].split("\n")[0]
            continue
        row = figures["rows"][case.label]
        found = (row["name"], row["length"], row["batch"], row["goal"])
        assert found == (case.name, case.length, case.batch, performance.GOAL)
        assert f"{row['clean'][0]:.3f} ({row['clean'][1]:.3f} to {row['clean'][2]:.3f})" in page
        assert row["rounds"] >= 3
    met = sum(row["clean"][0] <= row["goal"] for row in figures["rows"].values())
    assert re.search(rf"{met} of {len(figures['rows'])} rows meet it for clean", page)


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> dict[str, dict[str, Path]]:
    folder = tmp_path_factory.mktemp("speed")
    return {name: export(name, folder, fast=True) for name in ("vit", "gpt2")}


@pytest.mark.nightly
def test_all_forms_of_a_model_compute_the_same(exports):
    for forms in exports.values():
        inputs = performance.benchmark_inputs(forms[FUSED], 2, 12)
        logits = [np.asarray(opens(path, {}, inputs, 1)()()[0]) for path in forms.values()]
        for other in logits[1:]:
            np.testing.assert_allclose(other, logits[0], atol=1e-5)


@pytest.mark.nightly
def test_a_row_has_all_that_its_case_asks_for(exports):
    case = performance.Case("tiny", "gpt2", 24, 2)
    row = performance.measured_row(case, exports["gpt2"], 24, 0.0)
    assert row["clean"][0] > 0
    assert row["without_if"][0] > 0
    assert row["kernels"]["clean"] > 1
    assert row["kernels"]["flagged"] > 1
    assert row["kernels"]["count"] >= 2 * 6, "two layers, and at least six nodes each"
    assert set(row["forms"]) == {performance.EAGER, performance.OFFLINE}
    assert row["itself"][1] <= row["itself"][0] <= row["itself"][2]


@pytest.mark.nightly
@pytest.mark.parametrize("flagged", [0.0, 0.2], ids=["nothing flagged", "a fifth of the tokens flagged"])
def test_hooks_compute_what_the_patched_file_does(exports, flagged):
    model = atp.load(exports["vit"][FUSED])
    patch = synthetic_patch(model)
    config = KINDS["vit"].config(True)
    pixels = np.random.default_rng(0).normal(size=(2, 3, config.image_size, config.image_size)).astype(np.float32)
    if flagged:
        margin = f"atpatch/{patch.sites[0].site}/margin"
        scored = with_outputs(atp.bake(model, first_threshold(patch, 0.0)), [margin])
        scores = Session(scored).collect({"pixel_values": pixels})[margin]
        patch = first_threshold(patch, float(np.quantile(scores, 1 - flagged)))
    expected = Session(atp.bake(model, patch, site_flags=True)).collect({"pixel_values": pixels})
    module = hooked(torch_model("vit", fast=True, attention="eager"), patch)
    with torch.inference_mode():
        found = module(torch.from_numpy(pixels)).logits.numpy()
    np.testing.assert_allclose(found, next(iter(expected.values())), atol=1e-5)
    assert expected[f"atpatch/{patch.sites[0].site}/flags"].mean() == pytest.approx(flagged, abs=0.02)


def first_threshold(patch: atp.Patch, threshold: float) -> atp.Patch:
    """The patch with another threshold at its first site."""
    first, *others = patch.sites
    return replace(patch, sites=(replace(first, detector=replace(first.detector, threshold=threshold)), *others))
