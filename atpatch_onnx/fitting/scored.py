"""A part of a debug set, scored once by every site's detector; any setting is then judged on it at little cost."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.fitting.collect import anomalous_columns
from atpatch_onnx.fitting.goal import Outcome, judge
from atpatch_onnx.fitting.switchboard import Setting, Switchboard, Tried
from atpatch_onnx.running.predictions import classes
from atpatch_onnx.running.sessions import Array, Progress, silent

AT_ONCE = 2
"""Batches that are run before it is asked whether the rest is worth it."""


class ScoredPart:
    """A part of a debug set, its suspects and target known, on a switchboard.

    The base runs once, a setting those inputs again that it flags.
    """

    def __init__(
        self,
        board: Switchboard,
        part: DebugSet,
        *,
        batch_size: int = 32,
        progress: Progress = silent,
        stage: str = "scoring",
    ) -> None:
        self.part = part
        self.anomalous = anomalous_columns(part)
        """Which tokens should be flagged, on the clean and on the counterfactual side, bool `[pairs, tokens]`."""
        run = {"batch_size": batch_size, "progress": progress}
        self.clean = board.scores(part.clean, stage=f"{stage}, clean inputs", **run)  # type: ignore[arg-type]
        self.counterfactual = board.scores(part.counterfactual, stage=f"{stage}, counterfactuals", **run)  # type: ignore[arg-type]
        self._board, self._batch_size = board, batch_size

    def outcome(self, setting: Setting) -> Outcome:
        """What a setting does to the part."""
        outcome = self.outcome_unless(setting, lambda possible: False)
        assert outcome is not None, "it was not given up"
        return outcome

    def outcome_unless(self, setting: Setting, hopeless: Callable[[Outcome], bool]) -> Outcome | None:
        """The same, or None as soon as the best outcome that is still possible is `hopeless`.

        That is the outcome if every counterfactual that is not run yet were repaired, and flagged where it should be.
        No bound of a goal is farther away from it than from what would come of running them all.
        """
        *_, (clean, _) = self._patched(self.part.clean, self.clean, setting)
        before = classes(self.clean.logits)
        repaired = clean[0] if self.part.kind == "attribute" else before
        for (predictions, flags), left in self._patched(self.part.counterfactual, self.counterfactual, setting):
            predictions, flags = predictions.copy(), flags.copy()
            predictions[left], flags[left] = repaired[left], self.anomalous[1][left]
            possible = judge(self.part, before, clean, (predictions, flags), self.anomalous)
            if hopeless(possible):
                return None
        return possible

    def _patched(
        self, inputs: Mapping[str, Array], base: Tried, setting: Setting
    ) -> Iterator[tuple[tuple[NDArray[np.int64], NDArray[np.bool_]], NDArray[np.int64]]]:
        """Predictions and flags under a setting, and the rows of which they are the base's still; at last of none.

        Inputs that no detector flags in the base are the base's: they are not run.
        """
        predictions, flags = classes(base.logits).copy(), setting.flags(base.margins)
        rows, size = np.flatnonzero(flags.any(axis=1)), AT_ONCE * self._batch_size
        for start in range(0, rows.size, size):
            now = rows[start : start + size]
            flagged = {name: array[now] for name, array in inputs.items()}
            result = self._board.run(flagged, setting, batch_size=self._batch_size)
            predictions[now], flags[now] = classes(result.logits), result.flags
            yield (predictions, flags), rows[start + size :]
        if not rows.size:
            yield (predictions, flags), rows
