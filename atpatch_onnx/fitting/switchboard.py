"""The trial graph: every candidate site patched, thresholds, benign attention and switches as inputs.

One graph and one session serve the whole search: which sites detect, which redistribute, how strongly. A second one, in
which the flags are an input as well, is the second pass of a joint decision.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.emission import Emission, import_functions
from atpatch_onnx.baking.weave import Controls, weave
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.graph.names import PREFIX, own_name
from atpatch_onnx.graph.values import sample_input
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.patches.patch import SitePatch
from atpatch_onnx.running.sessions import Array, Progress, Session, silent

FLAGS = f"{PREFIX}trial/flags"
"""The input of the second pass, bool `[samples, keys]`."""


@dataclass(frozen=True)
class Setting:
    """What is switched on. Sites that are not named neither detect nor redistribute."""

    thresholds: Mapping[str, float] = field(default_factory=dict)
    """Of the detecting sites, by name."""

    betas: Mapping[str, float | Array] = field(default_factory=dict)
    """Benign attention of the redistributing sites, by name: a number, or a profile `[heads, queries, 1]`."""

    reaches: Mapping[str, float] = field(default_factory=dict)
    """By how much thresholds are lower for the other columns of a flagged input, by name; 0 where none is named."""

    joint: "JointSetting | None" = None
    """The decision of all sites together; None: each decides for itself, by its threshold."""

    def flags(self, scores: Mapping[str, Array]) -> NDArray[np.bool_]:
        """What is flagged by the scores of the base `[samples, keys]`, by site, bool `[samples, keys]`.

        With a joint decision that is all. Else it says which inputs are flagged: in them, sites that redistribute
        change the scores of those behind them.
        """
        if self.joint is not None:
            return self.joint.flags(scores)
        found = np.zeros(next(iter(scores.values())).shape, np.bool_)
        for name, threshold in self.thresholds.items():
            found |= scores[name] > np.float32(threshold)
        return found


@dataclass(frozen=True)
class JointSetting:
    """One decision for several sites; see `patch.Joint`."""

    weights: Mapping[str, float]
    """By name of the site."""

    threshold: float
    reach: float

    def score(self, scores: Mapping[str, Array]) -> Array:
        """The weighted sum of scores, float32 `[samples, keys]`."""
        return joint_score(self.weights, scores)

    def flags(self, scores: Mapping[str, Array]) -> NDArray[np.bool_]:
        """What is flagged by the scores of the base, bool `[samples, keys]`."""
        margin = self.score(scores) - np.float32(self.threshold)
        lowered = np.where(margin.max(axis=1, keepdims=True) > 0, np.float32(self.reach), np.float32(0))
        return np.asarray(margin + lowered > 0, np.bool_)


def joint_score(weights: Mapping[str, float], scores: Mapping[str, Array]) -> Array:
    """The weighted sum of scores by site, float32, of their shape."""
    return np.asarray(sum(np.float32(weight) * scores[name] for name, weight in weights.items()), np.float32)


@dataclass(frozen=True, eq=False)
class TrialResult:
    """What a setting does to some inputs."""

    logits: Array
    """`[samples, classes]`."""

    margins: Mapping[str, Array]
    """`[samples, keys]` by site: score minus the threshold that holds for it; `-inf` where the site does not detect."""

    @property
    def flags(self) -> NDArray[np.bool_]:
        """`[samples, keys]`: the columns flagged at any site."""
        return np.asarray(np.any([margin > 0 for margin in self.margins.values()], axis=0), np.bool_)


class Trial:
    """A session of the trial graph.

    Args:
        model: The base.
        entries: Every candidate site with its detector and redistribution, in graph order, on one token axis.
        output: Name of the output that predictions are read from.
        instead: Functions that stand in for those of ours with the same name: an arithmetic to compare with.
    """

    def __init__(
        self,
        model: ir.Model,
        entries: Sequence[tuple[AttentionSite, SitePatch]],
        output: str,
        *,
        instead: Sequence[ir.Function] = (),
    ) -> None:
        trial = graphs.copy(model)
        woven = weave(trial, entries, Emission.CONDITIONAL, _inputs)
        end = Insertion(trial.graph, "trial")
        self._margins = {
            step.site.name: _output(trial, end, step.reached, f"{step.site.name}/margin")
            for step in woven
            if step.reached is not None
        }
        import_functions(trial)
        trial.functions.update({function.identifier(): function for function in instead})
        self._logits = output
        self._sites = [site.name for site, _ in entries]
        self._session = Session(trial)
        self._base, self._entries, self._instead = model, entries, instead

    def run(
        self,
        inputs: Mapping[str, Array],
        setting: Setting,
        *,
        batch_size: int = 32,
        progress: Progress = silent,
        stage: str = "trying a setting",
    ) -> TrialResult:
        """Run inputs `[samples, ...]` under a setting."""
        constants = self._redistribution(setting)
        for name in self._margins:
            constants[_name(name, "threshold")] = np.array([setting.thresholds.get(name, np.inf)], np.float32)
            constants[_name(name, "reach")] = np.array([setting.reaches.get(name, 0.0)], np.float32)
        outputs = self._session.collect(
            inputs,
            [self._logits, *self._margins.values()],
            batch_size=batch_size,
            constants=constants,
            progress=progress,
            stage=stage,
        )
        margins = {site: outputs[name] for site, name in self._margins.items()}
        return TrialResult(outputs[self._logits], margins)

    def _redistribution(self, setting: Setting) -> dict[str, Array]:
        """Benign attention and switches of all sites."""
        constants: dict[str, Array] = {}
        for name in self._sites:
            constants[_name(name, "beta")] = np.array(setting.betas.get(name, 1.0), np.float32, ndmin=3)
            constants[_name(name, "switch")] = np.array([name in setting.betas])
        return constants

    def second_pass(
        self, inputs: Mapping[str, Array], flags: NDArray[np.bool_], setting: Setting, *, batch_size: int = 32
    ) -> Array:
        """The logits `[samples, classes]` with these flags, bool `[samples, keys]`, at all redistributing sites."""
        inputs, constants = {**inputs, FLAGS: flags}, self._redistribution(setting)
        return self._again.collect(inputs, [self._logits], batch_size=batch_size, constants=constants)[self._logits]

    @cached_property
    def _again(self) -> Session:
        """The second pass, in which the flags are an input."""
        again = graphs.copy(self._base)
        sample = sample_input(again.graph)
        shape = ir.Shape([sample.shape[0] if sample.shape else None, None])
        flags = ir.Value(name=FLAGS, shape=shape, type=ir.TensorType(ir.DataType.BOOL))
        again.graph.inputs.append(flags)
        entries = [(site, replace(entry, detector=None)) for site, entry in self._entries]
        carried = {site.token_axis: flags for site, _ in entries}
        weave(again, entries, Emission.CONDITIONAL, _inputs, carried)
        import_functions(again)
        again.functions.update({function.identifier(): function for function in self._instead})
        return Session(again)

    def scores(
        self, inputs: Mapping[str, Array], *, batch_size: int = 32, progress: Progress = silent, stage: str = "scoring"
    ) -> TrialResult:
        """Run the base as it is; the margins are the raw scores of every site's detector."""
        setting = Setting(thresholds=dict.fromkeys(self._margins, 0.0))
        return self.run(inputs, setting, batch_size=batch_size, progress=progress, stage=stage)


def _name(site: str, control: str) -> str:
    return own_name(site, control)


def _inputs(at: Insertion, site: AttentionSite, entry: SitePatch) -> Controls:
    """Thresholds, where the site detects, benign attention and switches as inputs of the graph."""

    def control(name: str, dtype: ir.DataType, shape: list[int | None]) -> ir.Value:
        value = ir.Value(name=_name(site.name, name), shape=ir.Shape(shape), type=ir.TensorType(dtype))
        at.graph.inputs.append(value)
        return value

    detects = entry.detector is not None
    return Controls(
        threshold=control("threshold", ir.DataType.FLOAT, [1]) if detects else None,
        reach=control("reach", ir.DataType.FLOAT, [1]) if detects else None,
        beta=control("beta", ir.DataType.FLOAT, [None, None, 1]),
        switch=control("switch", ir.DataType.BOOL, [1]),
    )


def _output(model: ir.Model, end: Insertion, value: ir.Value, name: str) -> str:
    result = end.op("Identity", value, name=name)
    result.dtype = ir.DataType.FLOAT
    model.graph.outputs.append(result)
    assert result.name is not None
    return result.name
