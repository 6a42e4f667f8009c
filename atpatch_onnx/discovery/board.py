"""One graph that is asked by forward passes only: the base, and for each input which of its tokens are neutral.

The flags of a patch are computed; here they are an input of the graph. Everything else is as in a patched model: a
flagged token shows every site a neutral key and hands over a neutral value.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.probe import key_output, mass_output, probe, value_output
from atpatch_onnx.baking.replace import Decision, replace_tokens, replacements
from atpatch_onnx.discovery.padding import Padding
from atpatch_onnx.errors import NoSiteError
from atpatch_onnx.fitting.collect import Means
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.graph.names import own_name
from atpatch_onnx.graph.values import find_value
from atpatch_onnx.matching import find_sites
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.patches.patch import Neutral
from atpatch_onnx.running.predictions import classes
from atpatch_onnx.running.sessions import Array, Progress, Session, silent

_SCOPE = "hunt"
FLAGS = own_name(_SCOPE, "neutral")
"""Name of the graph's input that says which tokens are neutral, bool `[inputs, tokens]`."""


@dataclass(frozen=True, eq=False)
class Looked:
    """What one pass over the inputs tells."""

    predicted: NDArray[np.int64]
    """`[inputs]`."""

    mass: NDArray[np.float32] | None
    """Attention that tokens draw, the mean over sites `[inputs, tokens]`; None where no site's map can be read."""

    neutral: Mapping[str, Neutral]
    """By site."""

    spread: Mapping[str, tuple[Array, Array]]
    """Mean and standard deviation of keys over all tokens, `[features]` each, by site."""


def askable_sites(model: ir.Model) -> tuple[AttentionSite, ...]:
    """The sites on the token axis of the first that have one map a sample, in the order of the graph.

    Raises:
        NoSiteError: There are none.
    """
    found = [site for site in find_sites(model) if site.parts == 1 and site.self_attention]
    if not found:
        raise NoSiteError(
            "the model",
            expected="at least one site of self-attention with one map a sample",
            found="none",
            advice="See why with: atpatch sites MODEL --why",
        )
    return tuple(site for site in found if site.token_axis == found[0].token_axis)


def look(
    model: ir.Model,
    sites: Sequence[AttentionSite],
    inputs: Mapping[str, Array],
    parts: NDArray[np.bool_],
    output: str,
    *,
    batch_size: int = 32,
    progress: Progress = silent,
) -> Looked:
    """One pass over inputs `[inputs, ...]`: predictions, what tokens draw, and the means over their `parts`."""
    session = Session(probe(model, sites, masses=True, kept=[output]))
    means = {site: Means(site) for site in sites}
    sums = {site: np.zeros((2, site.key.features)) for site in sites}
    predicted, masses = [], []
    for rows, outputs in session.stream(inputs, batch_size=batch_size, progress=progress, stage="looking at inputs"):
        drawn = []
        for site in sites:
            keys, values = outputs[key_output(site)], outputs[value_output(site)]
            name = mass_output(site)
            mass = None if name is None else outputs[name]
            means[site].add(keys, values, mass, parts[rows])
            own = keys[parts[rows]].astype(np.float64)
            sums[site] += own.sum(axis=0), (own**2).sum(axis=0)
            if mass is not None:
                drawn.append(mass)
        predicted.append(classes(outputs[output]))
        if drawn:
            masses.append(np.mean(drawn, axis=0, dtype=np.float32))
    count = max(int(parts.sum()), 1)
    spread = {}
    for site, (total, squares) in sums.items():
        mean = total / count
        spread[site.name] = (mean, np.sqrt(np.maximum(squares / count - mean**2, 1e-12)))
    return Looked(
        np.concatenate(predicted),
        np.concatenate(masses) if masses else None,
        {site.name: means[site].neutral() for site in sites},
        spread,
    )


class Board:
    """A session in which tokens are made neutral.

    Args:
        model: The base.
        sites: On one token axis.
        neutral: The neutral token of each, by name.
        output: Name of the output that predictions are read from.
        batch_size: Inputs at a time.
        padding: Of texts that do as well without it.
    """

    def __init__(
        self,
        model: ir.Model,
        sites: Sequence[AttentionSite],
        neutral: Mapping[str, Neutral],
        output: str,
        *,
        batch_size: int = 32,
        padding: Padding | None = None,
    ) -> None:
        board = graphs.copy(model)
        flags = ir.Value(name=FLAGS, shape=ir.Shape(["inputs", "tokens"]), type=ir.TensorType(ir.DataType.BOOL))
        board.graph.inputs.append(flags)
        at = Insertion(board.graph, _SCOPE, first=True)
        last = at.constant("last", np.array([2], np.int64))
        decision = Decision(at.op("Unsqueeze", flags, last, name="flags", dtype=ir.DataType.BOOL), None)
        ends: dict[ir.Node | None, ir.Node | None] = {None: at.end}
        for site in sites:
            for replacement in replacements(board.graph, site, neutral[site.name]):
                producer = find_value(board.graph, replacement.place.value).producer()
                into = Insertion(board.graph, site.name, anchor=ends.get(producer, producer))
                replace_tokens(into, replacement, decision)
                ends[producer] = into.end
        self._session, self._output, self._batch, self._padding = Session(board), output, batch_size, padding
        self.passes = 0
        """Inputs that were run."""

    def predict(
        self,
        inputs: Mapping[str, Array],
        neutral: NDArray[np.bool_],
        *,
        progress: Progress = silent,
        stage: str = "making tokens neutral",
    ) -> NDArray[np.int64]:
        """Predicted classes `[inputs]` of inputs with these tokens neutral `[inputs, tokens]`."""
        self.passes += len(neutral)
        given = {**inputs, FLAGS: neutral}
        if self._padding is None:
            return self._classes(given, progress, stage)
        predicted, done = np.zeros(len(neutral), np.int64), 0
        for rows, batch in self._padding.batches(given, self._batch):
            predicted[rows], done = self._classes(batch, silent, stage), done + len(rows)
            progress(stage, done, len(neutral))
        return predicted

    def _classes(self, given: Mapping[str, Array], progress: Progress, stage: str) -> NDArray[np.int64]:
        found = self._session.collect(given, [self._output], batch_size=self._batch, progress=progress, stage=stage)
        return classes(found[self._output])
