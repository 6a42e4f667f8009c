"""The pieces of work that the results are made of: each from a case to figures, JSON types only."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from atpatch_onnx.examples import Story, gather_examples
from samples import inverted
from samples.ablations import ablate
from samples.case import Case, measure
from samples.tasks import prepare

Work = Callable[[str, int, Path, bool], dict[str, Any]]
"""From case, seed, output folder and whether it is the fast form, to figures."""


def measured(case: str, seed: int, out: Path, fast: bool) -> dict[str, Any]:
    """Fit, bake, verify and evaluate, the trigger or the attribute known."""
    prepared, folder = prepare(case, seed=seed, fast=fast, out=out)
    figures = measure(prepared, folder, force=True).to_json()
    _save_view(prepared, folder)
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


def unknown_trigger(case: str, seed: int, out: Path, fast: bool) -> dict[str, Any]:
    """The same with the trigger inverted from the model; measured against the real one."""
    prepared, folder = prepare(case, seed=seed, fast=fast, out=out)
    return measure(inverted.inverted(prepared, folder), folder / "inverted", force=True).to_json()


def ablated(case: str, seed: int, out: Path, fast: bool) -> dict[str, Any]:
    """One thing of the method changed at a time."""
    prepared, _ = prepare(case, seed=seed, fast=fast, out=out)
    return {"case": case, "seed": seed, "rows": [row.to_json() for row in ablate(prepared)]}


WORK: dict[str, Work] = {"measured": measured, "inverted": unknown_trigger, "ablated": ablated}
"""By name; the name of a piece's file."""
