"""Where thresholds come from: the scores of the calibration part, for sites that decide alone or jointly."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.fitting.options import FitOptions
from atpatch_onnx.fitting.scored import ScoredPart
from atpatch_onnx.fitting.switchboard import JointSetting, Setting, joint_score
from atpatch_onnx.fitting.thresholds import calibrate, gap, reach
from atpatch_onnx.patches.patch import MAX_REACH
from atpatch_onnx.running.sessions import Array

SPENT = 0.5
"""Share of the clean flag rate allowed that calibration spends: what is spent whole is exceeded on every other part."""

BENIGN = 8
"""Innocent columns of an input that the weights of a joint decision are found with, drawn at random."""

Role = Literal["detect", "redistribute"]
Element = tuple[Role, str]
"""One thing a site may do; what delta debugging switches on and off."""


@dataclass(frozen=True, eq=False)
class Calibration:
    """Scores of the calibration part at every site, from the base as it is."""

    clean: Mapping[str, Array]
    """Largest score over the benign columns of each clean input `[inputs]`, by site."""

    anomalous: Mapping[str, Array]
    """Scores of the anomalous columns `[columns]`, by site."""

    benign: Mapping[str, Array]
    """Scores of the benign columns of the clean inputs `[columns]`, by site."""

    kind: str
    """Of the debug set."""

    rate: float
    lowest: bool = False
    in_time: bool = False
    """Whether sites before the first detecting one have its flags as well."""

    @classmethod
    def of(cls, scored: ScoredPart, options: FitOptions) -> "Calibration":
        """From the scores of the calibration part, for the goal's clean flag rate on other inputs."""
        clean, other = scored.clean.margins, scored.counterfactual.margins
        on_clean, on_other = scored.anomalous
        return cls(
            clean={site: np.where(on_clean, -np.inf, scores).max(axis=1) for site, scores in clean.items()},
            anomalous={site: other[site][on_other] for site in other},
            benign={site: scores[~on_clean] for site, scores in clean.items()},
            kind=scored.part.kind,
            rate=SPENT * options.goal.clean_flag_rate,
            lowest=options.thresholds == "lowest",
        )

    def thresholds(self, sites: Sequence[str]) -> dict[str, float]:
        """Thresholds of the detecting `sites`, under one budget for all of them."""
        clean, anomalous = ({site: scores[site] for site in sites} for scores in (self.clean, self.anomalous))
        return calibrate(clean, anomalous, self.rate, lowest=self.lowest)

    def setting(self, elements: Collection[Element], strength: "Strength") -> Setting:
        """What these elements do, their thresholds calibrated together."""
        detecting = _sites(elements, "detect")
        thresholds = self.thresholds(detecting) if detecting else {}
        missed = strength.missed_in(self.kind)
        return Setting(
            thresholds=thresholds,
            reaches={name: reach(self.anomalous[name], at, missed) for name, at in thresholds.items()},
            betas={name: strength.betas[name] for name in _sites(elements, "redistribute")},
        )

    def separation(self, site: str) -> float:
        """Area under the ROC curve of the site's scores, anomalous against benign columns."""
        from sklearn.metrics import roc_auc_score

        anomalous, benign = self.anomalous[site], self.benign[site]
        labels = np.r_[np.ones(len(anomalous), int), np.zeros(len(benign), int)]
        return float(roc_auc_score(labels, np.r_[anomalous, benign]))

    def gap(self, site: str) -> float:
        """How far anomalous and clean scores of the site are apart."""
        return gap(self.clean[site], self.anomalous[site])


@dataclass(frozen=True)
class Strength:
    """How strongly sites do what they do."""

    betas: Mapping[str, float]
    """Benign attention by site."""

    missed: float
    """Share of the anomalous columns that the lower threshold of flagged inputs misses; 1: it is not lower."""

    def missed_in(self, kind: str) -> float:
        """The share that is missed in a debug set of this kind.

        Clean inputs with a protected attribute are flagged all the same: lower, they would spend the budget.
        """
        return 1.0 if kind == "attribute" else self.missed


def _sites(elements: Collection[Element], role: Role) -> list[str]:
    return sorted(name for one, name in elements if one == role)


class JointCalibration:
    """The same for sites that decide together: one weight a site, one threshold for the weighted sum of their scores.

    The weights are those of a logistic regression of "this column is anomalous" on the scores of the fit part. A weight
    below zero would reward a site for seeing nothing: such a site is left out.

    Args:
        alone: The calibration of sites that decide alone.
        fitted: The fit part, scored.
        scored: The calibration part, scored.
        seed: Innocent columns are drawn with it.
    """

    in_time = True

    def __init__(self, alone: Calibration, fitted: ScoredPart, scored: ScoredPart, *, seed: int) -> None:
        self._alone, self._scored = alone, scored
        self._rows, self._labels = _rows(fitted, seed)
        self._weights: dict[tuple[str, ...], dict[str, float]] = {}

    def gap(self, site: str) -> float:
        """How far anomalous and clean scores of the site are apart."""
        return self._alone.gap(site)

    def weights(self, sites: Sequence[str]) -> dict[str, float]:
        """The weights of the detecting `sites`, none negative, their sum 1."""
        key = tuple(sites)
        if key not in self._weights:
            self._weights[key] = self._regression(key)
        return self._weights[key]

    def _regression(self, sites: Sequence[str]) -> dict[str, float]:
        from sklearn.linear_model import LogisticRegression

        left = list(sites)
        while len(left) > 1:
            columns = np.stack([self._rows[site] for site in left], axis=1)
            model = LogisticRegression(class_weight="balanced", max_iter=1000).fit(columns, self._labels)
            found = dict(zip(left, model.coef_[0].tolist(), strict=True))
            worst = min(left, key=found.__getitem__)
            if found[worst] > 0:
                break
            left.remove(worst)
        else:
            found = dict.fromkeys(left, 1.0)
        total = sum(found[site] for site in left)
        return {site: found[site] / total for site in left}

    def setting(self, elements: Collection[Element], strength: Strength) -> Setting:
        """What these elements do, the threshold of their joint decision calibrated."""
        betas = {name: strength.betas[name] for name in _sites(elements, "redistribute")}
        detecting = _sites(elements, "detect")
        if not detecting:
            return Setting(betas=betas)
        weights = self.weights(detecting)
        on_clean, on_other = self._scored.anomalous
        clean, other = (
            joint_score(weights, side.margins) for side in (self._scored.clean, self._scored.counterfactual)
        )
        anomalous = other[on_other]
        benign = np.where(on_clean, -np.inf, clean).max(axis=1)
        alone = self._alone
        threshold = calibrate({"joint": benign}, {"joint": anomalous}, alone.rate, lowest=alone.lowest)["joint"]
        lower = reach(anomalous, threshold, strength.missed_in(alone.kind))
        return Setting(betas=betas, joint=JointSetting(weights, threshold, lower))


def _rows(fitted: ScoredPart, seed: int) -> tuple[dict[str, Array], NDArray[np.bool_]]:
    """Scores of columns `[columns]` by site, and which of them are anomalous.

    All suspects, on either side, and some innocent columns of every input; those that no query sees are left out.
    """
    rng = np.random.default_rng(seed)
    suspects = fitted.part.suspects
    assert suspects is not None, "the suspects were found before"
    chosen: list[tuple[Mapping[str, Array], NDArray[np.bool_], NDArray[np.bool_]]] = []
    for side, anomalous in zip((fitted.clean, fitted.counterfactual), fitted.anomalous, strict=True):
        seen = next(iter(side.margins.values())) > -MAX_REACH
        benign = seen & ~suspects
        rank = np.where(benign, rng.random(benign.shape), np.inf).argsort(axis=1).argsort(axis=1)
        chosen.append((side.margins, (seen & suspects) | (benign & (rank < BENIGN)), anomalous))
    rows = {site: np.concatenate([margins[site][mask] for margins, mask, _ in chosen]) for site in chosen[0][0]}
    return rows, np.concatenate([anomalous[mask] for _, mask, anomalous in chosen])
