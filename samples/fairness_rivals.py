"""What people would pick instead of a patch against leaning on an attribute, on the same rows.

| name | what it is | what it needs |
|---|---|---|
| `threshold` | fairlearn's ThresholdOptimizer behind the base, for demographic parity | the attribute of each input |
| `trees` | boosted trees, all attributes | training |
| `gradient` | fairlearn's ExponentiatedGradient around such trees, for demographic parity | training, twenty times |
| `without` | an FT-Transformer trained on the table without the attribute, by the base's recipe | training |
"""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin

from atpatch_onnx.running.predictions import confidences
from atpatch_onnx.running.sessions import Progress
from samples import tables
from samples.ft_transformer import predict as predict_logits
from samples.table_data import TableData

if TYPE_CHECKING:
    from samples.fairness import Predict, Setting

ROUNDS = 20
"""Of ExponentiatedGradient."""

Figures = Callable[["Setting", "Predict"], dict[str, Any]]


def measured(
    setting: "Setting", size: tables.Size, folder: Path, figures: Figures, progress: Progress
) -> dict[str, Any]:
    """The figures of each, by name; the reason instead where it cannot be made."""
    made: Mapping[str, Callable[[], Predict]] = {
        "threshold": lambda: thresholds(setting),
        "trees": lambda: trees(setting),
        "gradient": lambda: gradient(setting),
        "without": lambda: without(setting, size, folder, progress),
    }
    found: dict[str, Any] = {}
    for name, make in made.items():
        try:
            found[name] = figures(setting, make())
        except ValueError as error:  # such as groups that have one class only in the part that it is fitted on
            found[name] = {"refused": " ".join(str(error).split())}
    return found


class _Base(ClassifierMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn leaves them untyped
    """The base as an estimator of scikit-learn that was fitted before."""

    def __init__(self, logits: Callable[[NDArray[np.float32]], NDArray[np.float32]]) -> None:
        self.logits = logits
        self.classes_ = np.array([0, 1])

    def fit(self, X: Any, y: Any) -> "_Base":
        """Nothing is left to fit."""
        return self

    def predict_proba(self, X: Any) -> NDArray[np.float64]:
        """`[rows, 2]`."""
        return confidences(self.logits(np.asarray(X, np.float32)))


def thresholds(setting: "Setting") -> "Predict":
    """A threshold for each group, some of them drawn by chance; the same chance for the same row."""
    from fairlearn.postprocessing import ThresholdOptimizer

    from samples.fairness import logits

    table, rows = setting.table, setting.parts.debug
    found = ThresholdOptimizer(
        estimator=_Base(logits(setting.base)),
        constraints="demographic_parity",
        prefit=True,
        predict_method="predict_proba",
    )
    found.fit(table.rows[rows], table.labels[rows], sensitive_features=setting.groups(table.rows[rows]))
    return lambda rows: np.asarray(
        found.predict(rows, sensitive_features=setting.groups(rows), random_state=0), np.int64
    )


def _boosting(table: TableData) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(
        learning_rate=0.1,
        max_iter=60,
        categorical_features=[attribute.kind == "categorical" for attribute in table.attributes],
        early_stopping=False,
        random_state=0,
    )


def trees(setting: "Setting") -> "Predict":
    """Boosted trees on all attributes."""
    table, rows = setting.table, setting.parts.train
    found = _boosting(table).fit(table.rows[rows], table.labels[rows])
    return lambda rows: np.asarray(found.predict(rows), np.int64)


def guessed(setting: "Setting") -> dict[str, Any]:
    """How well trees tell each protected attribute by the columns that are not protected here, as JSON types.

    Of the evaluation part: the share of rows whose value is guessed, and that of the most frequent value.
    """
    table, parts = setting.table, setting.parts
    left = _left(setting)
    smaller = replace(table, attributes=tuple(table.attributes[place] for place in left), rows=table.rows[:, left])
    found = {}
    for name, column in zip(setting.protected, setting.columns, strict=True):
        train, unseen = table.rows[parts.train, column], table.rows[parts.evaluation, column]
        told = _boosting(smaller).fit(smaller.rows[parts.train], train).predict(smaller.rows[parts.evaluation])
        values, counts = np.unique(train, return_counts=True)
        most = values[counts.argmax()]
        found[name] = {"guessed": float((told == unseen).mean()), "most frequent": float((unseen == most).mean())}
    return found


def _left(setting: "Setting") -> list[int]:
    return [place for place in range(len(setting.table.attributes)) if place not in setting.columns]


def gradient(setting: "Setting") -> "Predict":
    """The same under the constraint of demographic parity; one of its trees answers, drawn by the same chance."""
    from fairlearn.reductions import DemographicParity, ExponentiatedGradient

    table, rows = setting.table, setting.parts.train
    found = ExponentiatedGradient(_boosting(table), DemographicParity(), max_iter=ROUNDS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fairlearn's own use of pandas
        found.fit(table.rows[rows], table.labels[rows], sensitive_features=setting.groups(table.rows[rows]))
    return lambda rows: np.asarray(found.predict(rows, random_state=0), np.int64)


def without(setting: "Setting", size: tables.Size, folder: Path, progress: Progress) -> "Predict":
    """A model that never saw the attribute."""
    table = setting.table
    left = _left(setting)
    smaller = replace(table, attributes=tuple(table.attributes[place] for place in left), rows=table.rows[:, left])
    model, _ = tables.trained(smaller, setting.parts.train, size.recipe, folder / "without", setting.seed, progress)
    return lambda rows: predict_logits(model, rows[:, left]).argmax(axis=1).astype(np.int64)
