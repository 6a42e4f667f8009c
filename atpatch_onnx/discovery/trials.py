"""Stamped inputs beside the same without a stamp: which class gains, and how many inputs are turned."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.running.predictions import classes, confidences
from atpatch_onnx.running.sessions import Array, Progress, silent
from atpatch_onnx.running.shards import SpreadSession


class Trials:
    """A model and clean inputs that stamps are tried on.

    Args:
        session: Of the model.
        output: Name of the output that predictions are read from.
        inputs: Clean inputs `[inputs, ...]` by name.
        batch_size: Inputs at a time.
        progress: Told of the first pass.
    """

    def __init__(
        self,
        session: SpreadSession,
        output: str,
        inputs: Mapping[str, Array],
        *,
        batch_size: int = 64,
        progress: Progress = silent,
    ) -> None:
        self._session, self._output, self._batch = session, output, batch_size
        self.inputs, self.passes = inputs, 0
        logits = self._logits(inputs, progress)
        self.confidence = confidences(logits)
        """`[inputs, classes]`."""

        self.predicted = classes(logits)
        """`[inputs]`."""

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return int(self.confidence.shape[1])

    def balanced(
        self, count: int, generator: np.random.Generator, allowed: NDArray[np.bool_] | None = None
    ) -> NDArray[np.int64]:
        """Numbers of about `count` inputs `[rows]`, as many of each predicted class, of the allowed ones `[inputs]`."""
        every = np.ones(len(self.predicted), np.bool_) if allowed is None else allowed
        order = generator.permutation(np.flatnonzero(every))
        turn = np.zeros(len(order), np.int64)
        for label in np.unique(self.predicted[order]):
            own = self.predicted[order] == label
            turn[own] = np.arange(own.sum())
        return order[np.argsort(turn, kind="stable")][:count]

    def gains(self, stamped: Mapping[str, Array], rows: NDArray[np.int64]) -> NDArray[np.float64]:
        """Mean gain in confidence of each class over inputs of other classes `[stamps, classes]`.

        Args:
            stamped: Every stamp on each of the inputs, `[stamps * rows, ...]` by name.
            rows: Numbers of the inputs.
        """
        after = confidences(self._logits(stamped)).reshape(-1, len(rows), self.classes)
        others = self.predicted[rows][:, None] != np.arange(self.classes)
        gained = np.where(others, after - self.confidence[rows], 0.0).sum(axis=1)
        mean: NDArray[np.float64] = gained / np.maximum(others.sum(axis=0), 1)
        return mean

    def predict(self, stamped: Mapping[str, Array]) -> NDArray[np.int64]:
        """Predicted classes of inputs `[inputs, ...]` by name."""
        return classes(self._logits(stamped))

    def _logits(self, inputs: Mapping[str, Array], progress: Progress = silent) -> Array:
        self.passes += len(next(iter(inputs.values())))
        found = self._session.collect(
            inputs, [self._output], batch_size=self._batch, progress=progress, stage="looking at inputs"
        )
        return found[self._output]
