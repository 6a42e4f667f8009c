"""The pieces of work that the results are made of: each from a case to figures, JSON types only."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from atpatch_onnx.measuring.examples import Story, gather_examples
from samples import inverted
from samples.ablations import ablate
from samples.case import Case, measure
from samples.compared import compared
from samples.tasks import prepare

Work = Callable[[Case, Path, bool], dict[str, Any]]
"""From a case and its folder, the base trained, and whether it is the fast form, to figures."""


def do(work: str, case: str, *, seed: int, out: Path, fast: bool) -> dict[str, Any]:
    """Do a piece of work, the base trained if it is not there; `core_seconds` are those of all threads together."""
    begun = time.process_time()
    prepared, folder = prepare(case, seed=seed, fast=fast, out=out)
    figures = WORK[work](prepared, folder, fast)
    return {**figures, "core_seconds": round(time.process_time() - begun, 1)}


def trained(case: Case, folder: Path, fast: bool) -> dict[str, Any]:
    """The base and its twin, which are there by now."""
    return {"case": case.name, "seed": case.seed, "training": dict(case.training)}


def measured(case: Case, folder: Path, fast: bool) -> dict[str, Any]:
    """Fit, bake, verify and evaluate, the trigger or the attribute known."""
    figures = measure(case, folder, force=True).to_json()
    _save_view(case, folder)
    return figures


def _save_view(case: Case, folder: Path) -> None:
    """An example's attention before and after, for the pictures: `view.npz`."""
    examples = gather_examples(case.base, folder / "patched.onnx", case.unseen)
    repaired = [example for example in examples if example.story is Story.REPAIRED and example.counterfactual.sites]
    if repaired:
        side = repaired[0].counterfactual
        view = side.sites[0]
        seen = slice(int(np.flatnonzero(view.visible).max()) + 1)  # padding is left out
        np.savez(
            folder / "view.npz",
            before=view.before[seen, seen],
            after=view.after[seen, seen],
            flags=side.flags[seen],
            site=view.site,
        )


def unknown_trigger(case: Case, folder: Path, fast: bool) -> dict[str, Any]:
    """The same with the trigger inverted from the model; measured against the real one."""
    return measure(inverted.inverted(case, folder), folder / "inverted", force=True).to_json()


def ablated(case: Case, folder: Path, fast: bool) -> dict[str, Any]:
    """One thing of the method changed at a time."""
    return {"case": case.name, "seed": case.seed, "rows": [row.to_json() for row in ablate(case)]}


WORK: dict[str, Work] = {
    "trained": trained,
    "measured": measured,
    "inverted": unknown_trigger,
    "ablated": ablated,
    "compared": compared,
}
"""By name; the name of a piece's file."""
