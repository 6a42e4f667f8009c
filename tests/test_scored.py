"""A scored part: what a setting does is read off without running what it leaves alone."""

from dataclasses import replace

import numpy as np
import pytest
from planted import Planted

from atpatch_onnx.baking.features import choose_features
from atpatch_onnx.fitting.calibrate import Calibration, JointCalibration, Strength
from atpatch_onnx.fitting.collect import collect
from atpatch_onnx.fitting.detector import train_detector
from atpatch_onnx.fitting.goal import Goal
from atpatch_onnx.fitting.options import FitOptions
from atpatch_onnx.fitting.preparation import prepare
from atpatch_onnx.fitting.scored import AT_ONCE, ScoredPart
from atpatch_onnx.fitting.search import Search
from atpatch_onnx.fitting.switchboard import Setting, Trial
from atpatch_onnx.fitting.training import Training
from atpatch_onnx.patches.patch import Redistribution, SitePatch
from atpatch_onnx.running.predictions import classes


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
    thresholds = Calibration.of(part, FitOptions()).thresholds(list(part.clean.margins))
    setting = Setting(thresholds, dict.fromkeys(thresholds, 0.5))
    outcome = part.outcome(setting)
    everything = trial.run(part.part.counterfactual, setting)
    off_target = part.part.labels != part.part.target
    kept = off_target & (classes(part.clean.logits) != part.part.target)
    assert outcome.remaining == (classes(everything.logits)[kept] == part.part.target).mean()
    assert outcome.recall == everything.flags[part.anomalous[1]].mean()
    assert outcome.recall > 0.9


def test_a_joint_outcome_is_that_of_running_everything(scored):
    trial, part = scored
    sites = list(part.clean.margins)
    alone = Calibration.of(part, FitOptions())
    elements = [("detect", sites[0]), ("detect", sites[1]), *(("redistribute", site) for site in sites)]
    setting = JointCalibration(alone, part, part, seed=0).setting(
        elements, Strength(dict.fromkeys(sites, 0.5), missed=0.01)
    )
    outcome = part.outcome(setting)
    flags = setting.flags(part.counterfactual.margins)
    assert flags.any()
    everything = trial.second_pass(part.part.counterfactual, flags, setting)
    off_target = part.part.labels != part.part.target
    kept = off_target & (classes(part.clean.logits) != part.part.target)
    assert outcome.remaining == (classes(everything)[kept] == part.part.target).mean()
    assert outcome.recall == flags[part.anomalous[1]].mean()
    assert outcome.recall > 0.9


SETTINGS = ("nothing", "all sites", "too high", "too low", "joint")


def setting_of(part: ScoredPart, name: str) -> Setting:
    sites = list(part.clean.margins)
    alone = Calibration.of(part, FitOptions())
    elements = [(role, site) for site in sites for role in ("detect", "redistribute")]
    strength = Strength(dict.fromkeys(sites, 0.5), missed=0.3)
    if name == "nothing":
        return Setting()
    if name == "joint":
        return JointCalibration(alone, part, part, seed=0).setting(elements, strength)
    setting = alone.setting(elements, strength)
    shift = {"too high": 0.6, "too low": -0.6}.get(name, 0.0)
    return replace(setting, thresholds={site: at + shift for site, at in setting.thresholds.items()})


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_still_possible_is_never_worse_than_what_comes(scored, name):
    """And it comes to that: at last everything has been run."""
    _, part = scored
    setting, goal, possible = setting_of(part, name), Goal(columns_missed=0.0), []
    outcome = part.outcome_unless(setting, lambda best: possible.append(best) or False)
    assert possible[-1] == outcome == part.outcome(setting)
    nearness = [best.nearness(goal) for best in possible]
    assert nearness == sorted(nearness)
    assert (len(possible) > 1) == (name not in ("nothing", "too high")), "where nothing is flagged, nothing is run"


def test_what_is_hopeless_is_not_run_to_the_end(scored, monkeypatch):
    trial, part = scored
    run, counted = trial.run, []
    monkeypatch.setattr(
        trial, "run", lambda inputs, *args, **more: counted.append(len(inputs["x"])) or run(inputs, *args, **more)
    )
    setting = replace(setting_of(part, "all sites"), betas={})  # flags, and repairs nothing
    assert part.outcome_unless(setting, lambda best: best.remaining > 0.2) is None
    assert counted == [AT_ONCE * 32]
    assert part.outcome(setting).remaining > 0.9
    assert sum(counted[1:]) > 100


@pytest.mark.parametrize("goal", [Goal(), Goal(asr_above_floor=0.0, accuracy_loss=-0.02), Goal(columns_missed=0.001)])
def test_giving_up_early_changes_nothing_that_is_found(scored, monkeypatch, goal):
    _, part = scored
    options = FitOptions(goal=goal, betas=(1.0, 0.3, 0.0))

    def found():
        search = Search(part, Calibration.of(part, options), options, lambda *_: None)
        return search.run(), search.attempts

    early = found()
    monkeypatch.setattr(part, "outcome_unless", lambda setting, hopeless: part.outcome(setting))
    run_to_the_end = ScoredPart.outcome_unless
    monkeypatch.setattr(part, "outcome", lambda setting: run_to_the_end(part, setting, lambda best: False))
    assert found() == early


def test_weights_of_a_joint_decision(scored):
    """None is negative, and their sum is 1; a site that sees nothing, or the wrong thing, has none."""
    _, part = scored
    sites = list(part.clean.margins)
    joint = JointCalibration(Calibration.of(part, FitOptions()), part, part, seed=0)
    weights = joint.weights(sites)
    assert sum(weights.values()) == pytest.approx(1)
    assert min(weights.values()) > 0
    assert joint.weights(sites[:1]) == {sites[0]: 1.0}
    first = sites[0]

    class Other:
        """The part with other scores at the first site."""

        def __init__(self, change):
            self.part, self.anomalous = part.part, part.anomalous
            self.clean, self.counterfactual = (
                replace(side, margins={**side.margins, first: change(side.margins[first])})
                for side in (part.clean, part.counterfactual)
            )

    for change in (lambda scores: 0 * scores, lambda scores: -scores):
        turned = JointCalibration(Calibration.of(part, FitOptions()), Other(change), part, seed=0).weights(sites)
        assert first not in turned
        assert sum(turned.values()) == pytest.approx(1)


def test_a_joint_decision_spends_one_budget(scored):
    _, part = scored
    sites = list(part.clean.margins)
    options = FitOptions(goal=Goal(clean_flag_rate=0.1), thresholds="lowest")
    joint = JointCalibration(Calibration.of(part, options), part, part, seed=0)
    setting = joint.setting([("detect", site) for site in sites], Strength({}, 1.0))
    flagged = setting.flags(part.clean.margins).any(axis=1).mean()
    assert 0 < flagged <= 0.05  # half of it
    assert setting.joint.reach == 0
    assert joint.setting([], Strength({}, 1.0)).joint is None


def test_no_threshold_is_lower_for_a_protected_attribute(scored):
    _, part = scored
    calibration = Calibration.of(part, FitOptions())
    detecting = [("detect", next(iter(part.clean.margins)))]
    assert max(calibration.setting(detecting, Strength({}, 0.0)).reaches.values()) > 0
    of_attribute = replace(calibration, kind="attribute")
    assert max(of_attribute.setting(detecting, Strength({}, 0.0)).reaches.values()) == 0


def test_the_search_lowers_thresholds_no_more_than_the_goal_asks_for(scored, monkeypatch):
    """Of a base that is repaired only where thresholds are lowered by so much."""
    _, part = scored
    options = FitOptions(goal=Goal(accuracy_loss=1, clean_flag_rate=1))
    calibration = Calibration.of(part, FitOptions())
    (first, *_) = part.clean.margins
    needed = {
        missed: calibration.setting([("detect", first)], Strength({}, missed)).reaches[first] for missed in (0.2, 0.02)
    }
    assert 0 < needed[0.2] < needed[0.02]
    outcome = part.outcome(Setting())

    def pretended(setting: Setting, hopeless):
        return replace(outcome, remaining=float(setting.reaches.get(first, 0.0) < needed[0.02]))

    monkeypatch.setattr(part, "outcome_unless", pretended)
    found = Search(part, calibration, replace(options, missed=(1.0, 0.2, 0.02, 0.01)), lambda *_: None).run()
    assert found.setting.reaches == {first: needed[0.02]}
