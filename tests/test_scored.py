"""A scored part: what a setting does is read off without running what it leaves alone."""

from dataclasses import replace

import pytest
from planted import Planted

from atpatch_onnx.fitting.calibrate import Calibration
from atpatch_onnx.fitting.collect import collect
from atpatch_onnx.fitting.fit import train
from atpatch_onnx.fitting.goal import Goal
from atpatch_onnx.fitting.options import FitOptions, Training
from atpatch_onnx.fitting.preparation import prepare
from atpatch_onnx.fitting.scored import AT_ONCE, ScoredPart
from atpatch_onnx.fitting.search import Search
from atpatch_onnx.fitting.switchboard import Setting, Switchboard
from atpatch_onnx.running.predictions import classes


@pytest.fixture(scope="module")
def scored() -> tuple[Switchboard, ScoredPart]:
    planted = Planted()
    model = planted.model()
    prepared = prepare(model, planted.debug(480), FitOptions())
    tokens = collect(model, prepared.sites, prepared.parts.fit)
    entries = train(tokens, "linear", FitOptions(training=Training(steps=100)))
    board = Switchboard(model, entries, prepared.output)
    return board, ScoredPart(board, prepared.parts.validation)


def test_nothing_switched_on_is_the_base(scored):
    _, part = scored
    outcome = part.outcome(Setting())
    assert outcome.accuracy == outcome.accuracy_base
    assert outcome.clean_flag_rate == outcome.recall == 0
    assert outcome.remaining > 0.9


def test_an_outcome_is_that_of_running_everything(scored):
    board, part = scored
    thresholds = Calibration.of(part, FitOptions()).thresholds(list(part.clean.margins))
    setting = Setting(thresholds, tuple(thresholds))
    outcome = part.outcome(setting)
    everything = board.run(part.part.counterfactual, setting)
    off_target = part.part.labels != part.part.target
    kept = off_target & (classes(part.clean.logits) != part.part.target)
    assert outcome.remaining == (classes(everything.logits)[kept] == part.part.target).mean()
    assert outcome.recall == everything.flags[part.anomalous[1]].mean()
    assert outcome.recall > 0.9


SETTINGS = ("nothing", "all sites", "too high", "too low")


def setting_of(part: ScoredPart, name: str) -> Setting:
    if name == "nothing":
        return Setting()
    elements = [(role, site) for site in part.clean.margins for role in ("detect", "redistribute")]
    setting = Calibration.of(part, FitOptions()).setting(elements)
    scale = max(float(scores.std()) for scores in part.counterfactual.margins.values())
    shift = {"too high": 100 * scale, "too low": -scale}.get(name, 0.0)
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
    board, part = scored
    run, counted = board.run, []
    monkeypatch.setattr(
        board, "run", lambda inputs, *args, **more: counted.append(len(inputs["x"])) or run(inputs, *args, **more)
    )
    setting = replace(setting_of(part, "all sites"), redistributing=())  # flags, and repairs nothing
    assert part.outcome_unless(setting, lambda best: best.remaining > 0.2) is None
    assert counted == [AT_ONCE * 32]
    assert part.outcome(setting).remaining > 0.9
    assert sum(counted[1:]) > 100


@pytest.mark.parametrize("goal", [Goal(), Goal(asr_above_floor=0.0, accuracy_loss=-0.02), Goal(columns_missed=0.001)])
def test_giving_up_early_changes_nothing_that_is_found(scored, monkeypatch, goal):
    _, part = scored
    options = FitOptions(goal=goal)

    def found():
        search = Search(part, Calibration.of(part, options), options, lambda *_: None)
        return search.run(), search.attempts

    early = found()
    monkeypatch.setattr(part, "outcome_unless", lambda setting, hopeless: part.outcome(setting))
    run_to_the_end = ScoredPart.outcome_unless
    monkeypatch.setattr(part, "outcome", lambda setting: run_to_the_end(part, setting, lambda best: False))
    assert found() == early


def test_a_calibration_spends_half_of_its_budget_at_most(scored):
    _, part = scored
    sites = list(part.clean.margins)
    options = FitOptions(goal=Goal(clean_flag_rate=0.1), thresholds="lowest")
    setting = Calibration.of(part, options).setting([("detect", site) for site in sites])
    flagged = setting.flags(part.clean.margins).any(axis=1).mean()
    assert 0 < flagged <= 0.05


def test_a_site_that_is_drawn_to_the_trigger_tells_it_and_others_do_not(scored):
    _, part = scored
    calibration = Calibration.of(part, FitOptions())
    first, second, _ = part.clean.margins
    assert calibration.separation(second) > 0.999
    assert calibration.separation(first) < 0.9
    assert calibration.gap(second) > 0 > calibration.gap(first)
