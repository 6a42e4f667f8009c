"""A scored part: what a setting does is read off without running what it leaves alone."""

import numpy as np
import pytest
from planted import Planted

from atpatch_onnx.collect import collect
from atpatch_onnx.detector import train_detector
from atpatch_onnx.options import FitOptions
from atpatch_onnx.patch import Redistribution, SitePatch
from atpatch_onnx.predictions import classes
from atpatch_onnx.preparation import prepare
from atpatch_onnx.probe import choose_features
from atpatch_onnx.scored import ScoredPart
from atpatch_onnx.search import Calibration
from atpatch_onnx.training import Training
from atpatch_onnx.trial import Setting, Trial


@pytest.fixture(scope="module")
def scored() -> tuple[Trial, ScoredPart]:
    planted = Planted()
    model = planted.model()
    prepared = prepare(model, planted.debug(480), FitOptions())
    kinds = {site: choose_features(site) for site in prepared.sites}
    entries = [
        (
            columns.site,
            SitePatch(
                columns.site.name,
                train_detector(columns, Training(steps=100)),
                Redistribution(np.ones((1, 1, 1), np.float32), columns.neutral),
            ),
        )
        for columns in collect(model, kinds, prepared.parts.fit)
    ]
    trial = Trial(model, entries, prepared.output)
    return trial, ScoredPart(trial, prepared.parts.validation)


def test_nothing_switched_on_is_the_base(scored):
    _, part = scored
    outcome = part.outcome(Setting())
    assert outcome.accuracy == outcome.accuracy_base
    assert outcome.clean_flag_rate == outcome.recall == 0
    assert outcome.remaining > 0.9


def test_an_outcome_is_that_of_running_everything(scored):
    trial, part = scored
    thresholds = Calibration.of(part, 0.01).thresholds(list(part.clean.margins))
    setting = Setting(thresholds, dict.fromkeys(thresholds, 0.5))
    outcome = part.outcome(setting)
    everything = trial.run(part.part.counterfactual, setting)
    off_target = part.part.labels != part.part.target
    kept = off_target & (classes(part.clean.logits) != part.part.target)
    assert outcome.remaining == (classes(everything.logits)[kept] == part.part.target).mean()
    assert outcome.recall == everything.flags[part.anomalous[1]].mean()
    assert outcome.recall > 0.9
