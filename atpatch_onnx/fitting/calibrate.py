"""Where thresholds come from: the scores of the calibration part."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from atpatch_onnx.fitting.options import FitOptions
from atpatch_onnx.fitting.scored import ScoredPart
from atpatch_onnx.fitting.switchboard import Setting
from atpatch_onnx.fitting.thresholds import calibrate, gap
from atpatch_onnx.running.sessions import Array

SPENT = 0.5
"""Share of the clean flag rate allowed that calibration spends: what is spent whole is exceeded on every other part."""

Role = Literal["detect", "redistribute"]
Element = tuple[Role, str]
"""One thing a site may do; what delta debugging switches on and off."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Scores of the calibration part at every site, from the base as it is."""

    clean: Mapping[str, Array]
    """Largest score over the benign tokens of each clean input `[inputs]`, by site."""

    anomalous: Mapping[str, Array]
    """Scores of the anomalous tokens `[tokens]`, by site."""

    benign: Mapping[str, Array]
    """Scores of the benign tokens of the clean inputs `[tokens]`, by site."""

    rate: float
    lowest: bool = False

    @classmethod
    def of(cls, scored: ScoredPart, options: FitOptions) -> "Calibration":
        """From the scores of the calibration part, for the goal's clean flag rate on other inputs."""
        clean, other = scored.clean.margins, scored.counterfactual.margins
        on_clean, on_other = scored.anomalous
        rate, flags = SPENT * options.goal.clean_flag_rate, options.goal.flags_per_million
        if flags is not None:  # an input has this many tokens that may be flagged
            rate = min(rate, flags / 1e6 * on_clean.shape[1])
        lowest = scored.part.found if options.thresholds is None else options.thresholds == "lowest"
        return cls(
            clean={site: np.where(on_clean, -np.inf, scores).max(axis=1) for site, scores in clean.items()},
            anomalous={site: other[site][on_other] for site in other},
            benign={site: scores[~on_clean] for site, scores in clean.items()},
            rate=rate,
            lowest=lowest,
        )

    def thresholds(self, sites: Sequence[str]) -> dict[str, float]:
        """Thresholds of the detecting `sites`, under one budget for all of them."""
        clean, anomalous = ({site: scores[site] for site in sites} for scores in (self.clean, self.anomalous))
        return calibrate(clean, anomalous, self.rate, lowest=self.lowest)

    def setting(self, elements: Collection[Element]) -> Setting:
        """What these elements do, their thresholds calibrated together."""
        detecting = _sites(elements, "detect")
        return Setting(self.thresholds(detecting) if detecting else {}, tuple(_sites(elements, "redistribute")))

    def separation(self, site: str) -> float:
        """Area under the ROC curve of the site's scores, anomalous against benign tokens."""
        from sklearn.metrics import roc_auc_score

        anomalous, benign = self.anomalous[site], self.benign[site]
        labels = np.r_[np.ones(len(anomalous), int), np.zeros(len(benign), int)]
        return float(roc_auc_score(labels, np.r_[anomalous, benign]))

    def gap(self, site: str) -> float:
        """How far anomalous and clean scores of the site are apart, in standard deviations of benign scores."""
        return gap(self.clean[site], self.anomalous[site]) / max(float(self.benign[site].std()), 1e-12)


def _sites(elements: Collection[Element], role: Role) -> list[str]:
    return sorted(name for one, name in elements if one == role)
