"""Fits that have nothing to find, or cannot fix what they find: they say so, and what they write does nothing."""

import io
import re
from dataclasses import replace

import numpy as np
import pytest
from planted import QUICK, TRIGGER, Planted
from rich.console import Console

import atpatch_onnx as atp
from atpatch_onnx.errors import DebugSetError, TargetMissedError
from atpatch_onnx.fitting.goal import Goal
from atpatch_onnx.measuring.evaluate import evaluate
from atpatch_onnx.patches.patch import Patch
from atpatch_onnx.report.text import fit_summary
from atpatch_onnx.report.verdict import judge

HARMLESS = Planted(harm=0.0)
"""The trigger draws attention, as in every poisoned model, and does no harm."""

SLIGHT = Planted(harm=0.4)
"""The trigger changes a prediction now and then, as a patch on a picture does in a model that was not poisoned."""

POISONED = Planted()


def forced(planted: Planted, debug: atp.DebugSet, **options: object) -> Patch:
    return atp.fit(planted.model(), debug, replace(QUICK, force=True, **options))


def matters(planted: Planted, patch: Patch) -> tuple[float, float]:
    """Accuracy lost on clean inputs, and the share of clean inputs that are flagged, on pairs that no fit saw."""
    found = evaluate(planted.model(), atp.bake(planted.model(), patch), planted.debug(400, seed=8))
    return found.accuracy_lost.value, found.clean_flag_rate.value


def test_pairs_that_change_no_prediction_are_refused():
    with pytest.raises(DebugSetError):
        atp.fit(HARMLESS.model(), HARMLESS.debug(400), QUICK)


def test_on_a_model_that_was_not_poisoned_the_fit_says_that_nothing_needs_a_patch_and_what_it_writes_does_nothing():
    patch = atp.fit(SLIGHT.model(), SLIGHT.debug(400), QUICK)
    assert patch.sites
    assert patch.figures["unpatched"]["remaining"] <= QUICK.goal.asr_above_floor
    verdict = judge(patch, None, None)
    assert verdict.label == "Nothing to fix"
    [said] = verdict.objections
    assert re.match(r"Nothing needs a patch: without one, ASR above floor \d\.\d\d% and robust accuracy lost", said)
    console = Console(file=io.StringIO(), width=200, record=True)
    console.print(fit_summary(patch))
    assert said in console.export_text()
    lost, flagged = matters(SLIGHT, patch)
    assert abs(lost) <= 0.005
    assert flagged <= 0.01


def test_wrong_classes_change_no_bit_of_what_is_fitted_but_the_figures():
    """Detectors do not read them; the fit says of which accuracy it speaks."""
    debug = POISONED.debug(400)
    shuffled = np.random.default_rng(0).permutation(debug.labels)
    wrong = atp.DebugSet.from_pairs(debug.clean, debug.counterfactual, shuffled, target=debug.target)
    patch = forced(POISONED, wrong, goal=Goal(robust_accuracy_loss=1.0))
    assert patch.figures["outcome"]["accuracy_base"] < 0.6
    lost, flagged = matters(POISONED, patch)
    assert abs(lost) <= 0.005
    assert flagged <= 0.01


def test_wrong_tokens_are_told_from_nothing_and_the_fit_says_so():
    """The suspect is the token behind the trigger: there is nothing that detectors could learn."""
    debug = POISONED.debug(400, suspects=True)
    places = np.roll(debug.suspects, 1, axis=1)
    with pytest.raises(TargetMissedError, match="not fixable this way: with flags without a fault"):
        atp.fit(POISONED.model(), debug.with_suspects(places), QUICK)
    lost, flagged = matters(POISONED, forced(POISONED, debug.with_suspects(places)))
    assert abs(lost) <= 0.01
    assert flagged <= 0.02


BLENDED = Planted(drawn=(0, 1, 2), harmful=(0, 1, 2))


def blended(pairs: int) -> atp.DebugSet:
    """The trigger is in every token of the input: no token owns it."""
    debug = BLENDED.debug(pairs)
    x = np.array(debug.clean["x"])
    x[:, :, TRIGGER] = 1
    return atp.DebugSet.from_pairs(debug.clean, {"x": x}, debug.labels, target=debug.target)


def test_a_trigger_that_no_token_owns_is_not_fixable_this_way():
    with pytest.raises(TargetMissedError) as caught:
        atp.fit(BLENDED.model(), blended(400), QUICK)
    assert "not fixable this way" in str(caught.value)
    assert "robust accuracy lost" in str(caught.value)
    assert "Give more pairs" not in str(caught.value)


def test_the_report_says_so_as_well():
    patch = forced(BLENDED, blended(400))
    assert not patch.meets_target
    assert patch.figures["at_best"]["shortfalls"]
    verdict = judge(patch, None, None)
    assert verdict.label == "Not fixable this way"
    assert any(line.startswith("Not fixable this way: with flags without a fault") for line in verdict.objections)


def test_a_goal_that_detectors_alone_miss_is_not_said_to_be_beyond_reach():
    """Too few pairs to tell anything: with flags without a fault the goal would be met."""
    options = replace(QUICK, goal=Goal(asr_above_floor=0.0, columns_missed=0.0), detectors=("linear",))
    weak = replace(options, training=replace(QUICK.training, steps=1, noise=50.0))
    with pytest.raises(TargetMissedError) as caught:
        atp.fit(POISONED.model(), POISONED.debug(400), weak)
    assert "not fixable" not in str(caught.value)
    assert "Give more pairs" in str(caught.value)


def test_a_fit_that_meets_its_goal_does_not_ask_what_is_possible():
    patch = atp.fit(POISONED.model(), POISONED.debug(400), QUICK)
    assert patch.figures["at_best"] is None
    assert patch.figures["needless"] is None
    assert patch.meets_target
    assert patch.figures["unpatched"]["remaining"] > QUICK.goal.asr_above_floor
