"""The graph of the search: every candidate site patched, with thresholds and switches as inputs.

One graph and one session serve the whole search: which sites detect, and which redistribute.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.read import per_sample, read_threshold
from atpatch_onnx.baking.write import Controls, Written, write
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.graph.names import own_name
from atpatch_onnx.matching import batching
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.patches.patch import SitePatch
from atpatch_onnx.running.executors import LOCAL, Executor
from atpatch_onnx.running.sessions import Array, Progress, silent
from atpatch_onnx.running.shards import SpreadSession


@dataclass(frozen=True)
class Setting:
    """What is switched on. Sites that are not named neither detect nor redistribute."""

    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Of the detecting sites, by name."""

    redistributing: tuple[str, ...] = ()

    def __hash__(self) -> int:
        return hash((tuple(self.thresholds.items()), self.redistributing))

    def flags(self, scores: Mapping[str, Array]) -> NDArray[np.bool_]:
        """What is flagged by the scores of the base `[samples, tokens]`, by site: bool `[samples, tokens]`.

        It says which inputs are flagged: in them, sites that redistribute change the scores of those behind them.
        """
        found = np.zeros(next(iter(scores.values())).shape, np.bool_)
        for name, threshold in self.thresholds.items():
            found |= scores[name] > np.float32(threshold)
        return found


@dataclass(frozen=True, eq=False)
class Tried:
    """What a setting does to some inputs."""

    logits: Array
    """`[samples, classes]`."""

    margins: Mapping[str, Array]
    """`[samples, tokens]` by site: score minus threshold; `-inf` where the site does not detect."""

    @property
    def flags(self) -> NDArray[np.bool_]:
        """`[samples, tokens]`: the tokens flagged at any site."""
        return np.asarray(np.any([margin > 0 for margin in self.margins.values()], axis=0), np.bool_)


class Switchboard:
    """A session in which sites are switched on and off.

    Args:
        model: The base.
        entries: Every candidate site with its detector and neutral token, on one token axis.
        output: Name of the output that predictions are read from.
        change: What else is done to the graph, in place: another way to redistribute, to compare with.
        executor: Who runs it.
    """

    def __init__(
        self,
        model: ir.Model,
        entries: Sequence[tuple[AttentionSite, SitePatch]],
        output: str,
        *,
        change: Callable[[ir.Model, Sequence[Written]], None] = lambda board, written: None,
        executor: Executor = LOCAL,
    ) -> None:
        board = graphs.copy(model)
        self._margins: dict[str, str] = {}
        self._offsets: dict[str, Array] = {}
        written = write(board, entries, _inputs, conditional=True)
        for step in written:
            assert step.own is not None, "every candidate detects"
            assert step.entry.detector is not None
            at, name = Insertion(board.graph, "switchboard"), step.site.name
            margin = per_sample(at, step.site, step.own, 1, f"{name}/per_sample")
            last = at.constant("last", np.array([2], np.int64))
            output_value = at.op("Squeeze", margin, last, name=f"{name}/margin", dtype=ir.DataType.FLOAT)
            board.graph.outputs.append(output_value)
            self._margins[name] = str(output_value.name)
            offset = read_threshold(board.graph, step.site.key, step.entry.detector) - step.entry.detector.threshold
            self._offsets[name] = np.asarray(offset, np.float32)
        change(board, written)
        self._logits = output
        self._session = SpreadSession(board, executor=executor, batching=batching(model))

    def run(
        self,
        inputs: Mapping[str, Array],
        setting: Setting,
        *,
        batch_size: int = 32,
        progress: Progress = silent,
        stage: str = "trying a setting",
    ) -> Tried:
        """Run inputs `[samples, ...]` under a setting."""
        constants: dict[str, Array] = {}
        for name, offset in self._offsets.items():
            threshold = np.float32(setting.thresholds.get(name, np.inf))
            constants[own_name(name, "threshold")] = np.asarray(threshold + offset, np.float32)
            level = 0.0 if name in setting.redistributing else np.inf
            constants[own_name(name, "level")] = np.array([level], np.float32)
        outputs = self._session.collect(
            inputs,
            [self._logits, *self._margins.values()],
            batch_size=batch_size,
            constants=constants,
            progress=progress,
            stage=stage,
        )
        return Tried(outputs[self._logits], {site: outputs[name] for site, name in self._margins.items()})

    def scores(
        self, inputs: Mapping[str, Array], *, batch_size: int = 32, progress: Progress = silent, stage: str = "scoring"
    ) -> Tried:
        """Run the base as it is; the margins are the raw scores of every site's detector."""
        setting = Setting(thresholds=dict.fromkeys(self._margins, 0.0))
        return self.run(inputs, setting, batch_size=batch_size, progress=progress, stage=stage)


def _inputs(at: Insertion, site: AttentionSite, entry: SitePatch) -> Controls:
    """Thresholds and levels as inputs of the graph."""

    def control(name: str) -> ir.Value:
        value = ir.Value(name=own_name(site.name, name), shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
        at.graph.inputs.append(value)
        return value

    return Controls(threshold=control("threshold"), level=control("level"))
