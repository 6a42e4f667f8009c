"""What sets of sites cost, and fits that prefer few kernels."""

import io
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from models import draw_patch
from planted import QUICK, Planted, fitted
from rich.console import Console

import atpatch_onnx as atp
from atpatch_onnx.baking.kernels import kernels
from atpatch_onnx.fitting.cost import Cost
from atpatch_onnx.fitting.goal import Outcome
from atpatch_onnx.fitting.options import FitOptions
from atpatch_onnx.fitting.search import Search
from atpatch_onnx.report.text import fit_summary
from atpatch_onnx.running.sessions import silent

PLANTED = Planted()
SITES = PLANTED.sites


@pytest.fixture(scope="module")
def cost() -> Cost:
    model = PLANTED.model()
    return Cost.of(model, list(zip(atp.find_sites(model), draw_patch(model).sites, strict=True)))


def patch_of(elements: list[tuple[str, str]]) -> atp.Patch:
    drawn = draw_patch(PLANTED.model())
    sites = (
        replace(
            entry,
            detector=entry.detector if ("detect", entry.site) in elements else None,
            neutral=entry.neutral if ("redistribute", entry.site) in elements else None,
        )
        for entry in drawn.sites
    )
    return replace(drawn, sites=tuple(one for one in sites if one.detector or one.neutral))


@pytest.mark.parametrize(
    ("detecting", "redistributing"), [([0], [0]), ([1], [1, 2]), ([0, 1], [0, 1, 2]), ([0, 2], [2]), ([0, 1, 2], [1])]
)
def test_it_is_what_baking_writes(cost: Cost, detecting: list[int], redistributing: list[int]) -> None:
    elements = [("detect", SITES[n]) for n in detecting] + [("redistribute", SITES[n]) for n in redistributing]
    baked = atp.bake(PLANTED.model(), patch_of(elements), target="cuda")
    assert cost.kernels(elements) == kernels(baked).total
    assert cost.least(elements) <= cost.kernels(elements)


def test_a_fit_says_what_its_patch_adds() -> None:
    patch = fitted(PLANTED)
    baked = atp.bake(PLANTED.model(), patch, target="cuda")
    everything = kernels(atp.bake(PLANTED.model(), draw_patch(PLANTED.model()), target="cuda"))
    assert patch.figures["cost"] == {"kernels": kernels(baked).total, "all": everything.total}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(fit_summary(patch))
    assert f"{kernels(baked).total} kernels a run; {everything.total} with every site" in console.export_text()


DEAR = [("detect", SITES[0]), *(("redistribute", name) for name in SITES)]
CHEAP = [("detect", SITES[2]), ("redistribute", SITES[2])]


class Told(Search):
    """A search among two sets to begin with, the dear one first; only what holds one of them meets the goal."""

    def __init__(self, cost: Cost, **options: bool) -> None:
        side = SimpleNamespace(margins=dict.fromkeys(SITES))
        thresholds = SimpleNamespace(setting=tuple)
        super().__init__(SimpleNamespace(clean=side), thresholds, FitOptions(**options), silent, cost)

    def _starts(self, names):
        return iter([(DEAR, 0.0), (CHEAP, 0.0)])

    def _attempt(self, elements, *, unless):
        met = any(set(enough) <= set(elements) for enough in (DEAR, CHEAP))
        return Outcome("backdoor", 0.0 if met else 0.5, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0)


def test_the_cheapest_set_that_meets_the_goal_is_taken(cost: Cost) -> None:
    """The likeliest site to detect needs three to redistribute; a later one needs one."""
    assert set(Told(cost).run().elements) == set(DEAR)
    assert set(Told(cost, prefer_few=True).run().elements) == set(CHEAP)
    assert cost.kernels(CHEAP) < cost.kernels(DEAR)


def test_a_fit_that_prefers_few_meets_its_goal_with_no_more_kernels() -> None:
    planted = Planted(drawn=(0, 2), harmful=(2,))
    usual, few = fitted(planted), fitted(planted, replace(QUICK, prefer_few=True))
    assert few.meets_target
    assert few.figures["cost"]["kernels"] <= usual.figures["cost"]["kernels"]
    assert few.figures["settings_tried"] >= usual.figures["settings_tried"]
    assert np.isfinite(few.figures["cost"]["all"])
