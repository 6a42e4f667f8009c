"""What a drawn patch scores and flags on the base, with whatever thresholds and prototypes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.emission import Emission, import_functions
from atpatch_onnx.baking.weave import Controls, weave
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.graph.names import own_name
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.measuring.rehearse_base import BaseRuns, add_output, is_random
from atpatch_onnx.patches.patch import Detector, SitePatch
from atpatch_onnx.running.sessions import Session

_UNSEEN = -7.0
"""Margins below belong to columns that no query sees."""


@dataclass(frozen=True, eq=False)
class Scores:
    """One site's scores; all `[samples, columns]`."""

    scores: NDArray[np.float64]
    seen: NDArray[np.bool_]
    flags: NDArray[np.bool_]


class Trial:
    """One graph and session for the whole search: thresholds and directions are inputs."""

    def __init__(
        self,
        base: ir.Model,
        entries: Sequence[tuple[AttentionSite, SitePatch]],
        runs: BaseRuns,
        emission: Emission,
        threads: int | None,
    ) -> None:
        self._model = graphs.copy(base)
        self._entries, self._inputs, self._threads = entries, runs.inputs, threads
        self._optimize = runs.levels[0].optimize
        woven = weave(self._model, entries, emission, self._controls)
        end = Insertion(self._model.graph, "rehearsal")
        self._outputs = {}
        for step in woven:
            assert step.margin is not None, "drawn sites detect"
            name = step.site.name
            names = [
                add_output(self._model, end, value, f"{name}/{of}")
                for value, of in ((step.margin, "margin"), (step.flags, "flags"))
            ]
            self._outputs[name] = names
            # an initializer that is an input as well: a default that a run may override
            self._model.graph.inputs.append(self._model.graph.initializers[control(name, "direction")])
        import_functions(self._model)
        self._session: Session | None = None

    def run(self, detectors: Mapping[str, Detector]) -> dict[str, Scores]:
        """Every site's scores with these detectors, and the flags that are carried to it, or are its own."""
        feed = dict(self._inputs)
        for name, detector in detectors.items():
            feed[control(name, "threshold")] = np.array([detector.threshold], np.float32)
            feed[control(name, "direction")] = detector.direction
        if self._session is None or is_random(self._model):
            self._session = Session(self._model, optimize=self._optimize, threads=self._threads)
        found = self._session.run(feed, [name for names in self._outputs.values() for name in names])
        results = {}
        for name, (margin, flags) in self._outputs.items():
            margins = np.asarray(found[margin], np.float64)
            scores = margins + detectors[name].threshold
            results[name] = Scores(scores, margins > _UNSEEN, np.asarray(found[flags], bool))
        return results

    def _controls(self, at: Insertion, site: AttentionSite, entry: SitePatch) -> Controls:
        threshold = ir.Value(
            name=control(site.name, "threshold"), shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT)
        )
        at.graph.inputs.append(threshold)
        assert entry.redistribution is not None, "drawn sites redistribute"
        return Controls(threshold, beta=at.constant("beta", entry.redistribution.beta))


def control(site: str, name: str) -> str:
    """The name of a drawn site's weight in a patched graph."""
    return own_name(site, name)
