"""What is measured on a GPU, the goals, and the patches that it is measured with."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

import atpatch_onnx as atp
from atpatch_onnx.baking.expose import expose
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.patches.patch import Patch, SitePatch
from atpatch_onnx.running.sessions import Array, Session
from samples.kernel_counts import DETECTING, REDISTRIBUTING

MODELS = ("vit", "bert")
PRECISIONS = ("fp16", "fp32")

FLAGGED = 0.02
"""Share of tokens that the patches of the checks flag."""

GOALS = {
    ("few", "fp16", True): {1: 1.05, 8: 1.03, 32: 1.02},
    ("all", "fp16", True): {1: 1.12, 8: 1.09, 32: 1.06},
    ("few", "fp32", False): {1: 1.08, 8: 1.05, 32: 1.03},
}
"""By patch, precision and whether runs are recorded: ratios to the base by batch."""

HOOKS = 3.0
"""Goal: how many times as long torch takes with hooks, batch 1."""


@dataclass(frozen=True)
class Cell:
    """One timing: of a model in a precision, with a patch, at a batch, recorded or not."""

    model: str
    precision: str
    patch: str
    batch: int
    cuda_graph: bool

    @property
    def key(self) -> str:
        """What its figures stand under."""
        how = "CUDA graph" if self.cuda_graph else "no CUDA graph"
        return f"{self.model}, {self.precision}, {self.patch}, batch {self.batch}, {how}"

    @property
    def goal(self) -> float | None:
        """Of the ratio, where there is one."""
        return GOALS.get((self.patch, self.precision, self.cuda_graph), {}).get(self.batch)


def cells(graphs: bool) -> list[Cell]:
    """Those with a goal first; of the others, what a goal stands beside."""
    found = [
        Cell(model, precision, patch, batch, recorded)
        for (patch, precision, recorded), of in GOALS.items()
        for batch in of
        for model in MODELS
    ]
    found += [replace(cell, cuda_graph=False) for cell in found if cell.cuda_graph]
    return list(dict.fromkeys(cell if graphs else replace(cell, cuda_graph=False) for cell in found))


def few(whole: Patch) -> Patch:
    """A patch such as fits find: some sites detect, these and those behind them redistribute."""
    start = min(2, max(len(whole.sites) - REDISTRIBUTING, 0))
    chosen = whole.sites[start : start + REDISTRIBUTING]
    sites = [site if number < DETECTING else replace(site, detector=None) for number, site in enumerate(chosen)]
    return replace(whole, sites=tuple(sites))


def firing(base: ir.Model, patch: Patch, inputs: Mapping[str, Array]) -> Patch:
    """The patch with thresholds that a share of the tokens of these inputs exceed, `FLAGGED`, at each site."""
    scored = _at_thresholds(patch, {site.site: 0.0 for site in patch.sites})
    baked = atp.bake(base, scored, target="cuda")
    own = {site.site: site.own for site in read_record(baked).sites if site.own is not None}
    found = Session(expose(baked, own.values())).run(inputs, list(own.values()))
    return _at_thresholds(patch, {site: float(np.quantile(found[name], 1 - FLAGGED)) for site, name in own.items()})


def _at_thresholds(patch: Patch, thresholds: Mapping[str, float]) -> Patch:
    """The patch with other thresholds at these sites, where they detect."""

    def moved(site: SitePatch) -> SitePatch:
        if site.detector is None or site.site not in thresholds:
            return site
        return replace(site, detector=replace(site.detector, threshold=thresholds[site.site]))

    return replace(patch, sites=tuple(moved(site) for site in patch.sites))
