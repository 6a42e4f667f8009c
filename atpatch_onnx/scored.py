"""A part of a debug set, scored once by every site's detector; any setting is then judged on it at little cost."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.collect import anomalous_columns
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.goal import Outcome, judge
from atpatch_onnx.predictions import classes
from atpatch_onnx.runtime import Array, Progress, silent
from atpatch_onnx.trial import Setting, Trial, TrialResult


class ScoredPart:
    """A part of a debug set in a trial. The base is run on it once; a setting runs those inputs again that it flags.

    Args:
        trial: The session in which sites are switched on and off.
        part: Pairs whose suspects and, for a backdoor, target are known.
        batch_size: Inputs at a time.
        progress: Told after every batch of the first run.
        stage: What to call that.
    """

    def __init__(
        self, trial: Trial, part: DebugSet, *, batch_size: int = 32, progress: Progress = silent, stage: str = "scoring"
    ) -> None:
        self.part = part
        self.anomalous = anomalous_columns(part)
        """Which columns should be flagged, on the clean and on the counterfactual side, bool `[pairs, keys]`."""
        run = {"batch_size": batch_size, "progress": progress}
        self.clean = trial.scores(part.clean, stage=f"{stage}, clean inputs", **run)  # type: ignore[arg-type]
        self.counterfactual = trial.scores(part.counterfactual, stage=f"{stage}, counterfactuals", **run)  # type: ignore[arg-type]
        self._trial, self._batch_size = trial, batch_size

    def outcome(self, setting: Setting) -> Outcome:
        """What a setting does to the part."""
        clean = self._patched(self.part.clean, self.clean, setting)
        other = self._patched(self.part.counterfactual, self.counterfactual, setting)
        return judge(self.part, classes(self.clean.logits), clean, other, self.anomalous)

    def _patched(
        self, inputs: Mapping[str, Array], base: TrialResult, setting: Setting
    ) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Predictions and flags under a setting. Inputs that no detector flags in the base are the base's: not run."""
        predictions, flags = classes(base.logits).copy(), setting.flags(base.margins)
        rows = np.flatnonzero(flags.any(axis=1))
        if rows.size:
            flagged = {name: array[rows] for name, array in inputs.items()}
            if setting.joint is not None:
                logits = self._trial.second_pass(flagged, flags[rows], setting, batch_size=self._batch_size)
            else:
                result = self._trial.run(flagged, setting, batch_size=self._batch_size)
                logits, flags[rows] = result.logits, result.flags
            predictions[rows] = classes(logits)
        return predictions, flags
