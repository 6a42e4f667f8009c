"""One graph that is asked by forward passes only: the base, and for each input which of its tokens are neutral.

The flags of a patch are computed; here they are an input of the graph. Everything else is as in a patched model: a
flagged token shows every site a neutral key and hands over a neutral value.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.replace import Decision, replace_tokens, replacements
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.graph.names import own_name
from atpatch_onnx.graph.values import find_value
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.patches.patch import Neutral
from atpatch_onnx.running.batching import AS_GIVEN, Batching
from atpatch_onnx.running.executors import LOCAL, Executor
from atpatch_onnx.running.predictions import classes
from atpatch_onnx.running.sessions import Array, Progress, silent
from atpatch_onnx.running.shards import SpreadSession

_SCOPE = "hunt"
FLAGS = own_name(_SCOPE, "neutral")
"""Name of the graph's input that says which tokens are neutral, bool `[inputs, tokens]`."""

Batches = Callable[[Mapping[str, Array], int], Iterable[tuple[NDArray[np.int64], Mapping[str, Array]]]]


class Board:
    """A session in which tokens are made neutral.

    Args:
        model: The base.
        sites: On one token axis.
        neutral: The neutral token of each, by name.
        output: Name of the output that predictions are read from.
        batch_size: Inputs at a time.
        batching: How samples are given to the model.
        batches: From inputs and a size to batches and which inputs are in each, such as texts of like length; None: in
            order.
        executor: Who runs it.
    """

    def __init__(
        self,
        model: ir.Model,
        sites: Sequence[AttentionSite],
        neutral: Mapping[str, Neutral],
        output: str,
        *,
        batch_size: int = 32,
        batching: Batching = AS_GIVEN,
        batches: Batches | None = None,
        executor: Executor = LOCAL,
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
        self._session = SpreadSession(board, executor=executor, batching=batching)
        self._output, self._batch, self._batches = output, batch_size, batches
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
        if self._batches is None:
            return self._classes(given, progress, stage)
        predicted, done = np.zeros(len(neutral), np.int64), 0
        for rows, batch in self._batches(given, self._batch):
            predicted[rows], done = self._classes(batch, silent, stage), done + len(rows)
            progress(stage, done, len(neutral))
        return predicted

    def _classes(self, given: Mapping[str, Array], progress: Progress, stage: str) -> NDArray[np.int64]:
        found = self._session.collect(given, [self._output], batch_size=self._batch, progress=progress, stage=stage)
        return classes(found[self._output])
