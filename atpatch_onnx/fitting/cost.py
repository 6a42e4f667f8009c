"""What sets of sites cost: the kernels that they add to a run without an `If`, see `baking.kernels`."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.kernels import SiteKernels, launched, of_sites
from atpatch_onnx.baking.monitor import add_monitors
from atpatch_onnx.baking.write import constants, write
from atpatch_onnx.fitting.calibrate import Element
from atpatch_onnx.graph.names import MONITOR
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.patches.patch import SitePatch


@dataclass(frozen=True)
class Cost:
    """Kernels of every candidate site of one token axis."""

    sites: tuple[SiteKernels, ...]
    monitors: int

    @classmethod
    def of(cls, model: ir.Model, entries: Sequence[tuple[AttentionSite, SitePatch]]) -> "Cost":
        """Write all candidates into a copy of the model, and count."""
        copy = graphs.copy(model)
        written = write(copy, entries, constants, conditional=False)
        add_monitors(copy, written)
        values = {
            step.site.name: (None if step.own is None else str(step.own.name), str(step.margin.name))
            for step in written
        }
        return cls(of_sites(copy.graph, values), len(launched(copy.graph).get(MONITOR, ())))

    def kernels(self, elements: Collection[Element]) -> int:
        """Of a patch in which sites do this and nothing else; the first that detects carries nothing."""
        detecting = [site for site in self.sites if ("detect", site.site) in elements]
        redistributing = [site for site in self.sites if ("redistribute", site.site) in elements]
        carry = max((site.carrying for site in self.sites), default=0)
        found = sum(site.detecting for site in detecting) + sum(site.redistributing for site in redistributing)
        return found + carry * max(len(detecting) - 1, 0) + self.monitors

    def least(self, elements: Collection[Element]) -> int:
        """Of these detecting sites, and the cheapest of those that may redistribute."""
        detecting = [element for element in elements if element[0] == "detect"]
        others = [element for element in elements if element[0] == "redistribute"]
        return min((self.kernels([*detecting, other]) for other in others), default=self.kernels(detecting))

    def to_json(self, elements: Collection[Element]) -> dict[str, Any]:
        """What these elements cost, beside all of them."""
        everything: list[Element] = [("detect", site.site) for site in self.sites]
        everything += [("redistribute", site.site) for site in self.sites]
        return {"kernels": self.kernels(elements), "all": self.kernels(everything)}
