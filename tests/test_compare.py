"""The ladder of fixes: each is made, measured on pairs that no fit saw, and one is recommended for a reason."""

import json

import pytest
from planted import QUICK, Planted

from atpatch_onnx.fitting.goal import Goal
from atpatch_onnx.matching.hidden import find_hidden_layers
from atpatch_onnx.measuring.compare import HELD_OUT, Fix, Ladder, compare
from atpatch_onnx.measuring.evaluate import Backdoor, Evaluation
from atpatch_onnx.neurons import IsolationOptions, RepairOptions
from atpatch_onnx.running.metrics import Difference, Rate

GUILTY = Planted(mlp=4, guilty=True)
PAIRS = 720


@pytest.fixture(scope="module")
def ladder() -> Ladder:
    return compare(GUILTY.model(), GUILTY.debug(PAIRS), QUICK)


def named(ladder: Ladder, name: str) -> Fix:
    return next(fix for fix in ladder.fixes if fix.name == name)


def test_every_fix_is_measured_on_the_pairs_that_were_held_out(ladder):
    assert ladder.pairs == PAIRS * HELD_OUT
    for fix in ladder.fixes:
        if fix.evaluation is not None:
            assert fix.evaluation.inputs == ladder.pairs
            assert sum(fix.patches[-1].figures["pairs"].values()) == PAIRS - ladder.pairs
            assert fix.time > 0


@pytest.mark.parametrize("name", ["IDNN", "CARE"])
def test_the_guilty_unit_is_edited_and_the_backdoor_is_gone(ladder, name):
    fix, layer = named(ladder, name), find_hidden_layers(GUILTY.model())[1]
    assert fix.evaluation.backdoor.asr_base.value > 0.99
    assert not fix.outcome.shortfalls(ladder.goal)
    (patch,) = fix.patches
    assert (layer.name, 0) in [(edit.layer, edit.units[0]) for edit in patch.edits]


def test_so_does_attention_and_nothing_is_left_to_do_behind_an_edit(ladder):
    assert named(ladder, "AtPatch").outcome.remaining <= 0.02
    behind = named(ladder, "IDNN + AtPatch")
    assert behind.patches == ()
    assert behind.evaluation is None
    assert "Is the trigger stamped before normalisation" in behind.failure


def test_what_is_recommended_meets_the_goal_and_the_reason_says_so(ladder):
    assert not ladder.recommended.outcome.shortfalls(ladder.goal)
    assert ladder.reason.startswith(f"{ladder.recommended.name} meets the goal on {ladder.pairs} held-out pairs")
    said = ladder.to_json()
    assert json.loads(json.dumps(said)) == said
    assert said["recommended"] == ladder.recommended.name


def test_attention_behind_an_edit_that_does_not_help():
    """The harm is not done by a unit: IDNN cannot repair it, and the attention is patched in the edited model."""
    planted = Planted(mlp=4)
    isolation = IsolationOptions(most=2, candidates=4, inputs=32)
    repairing = RepairOptions(units=2, candidates=4, inputs=16, search_inputs=32, particles=5, iterations=3)
    found = compare(
        planted.model(),
        planted.debug(),
        QUICK,
        unseen=planted.debug(100, seed=9),
        isolation=isolation,
        repairing=repairing,
    )
    alone, behind = named(found, "IDNN"), named(found, "IDNN + AtPatch")
    assert alone.outcome.shortfalls(found.goal)
    assert not behind.outcome.shortfalls(found.goal)
    assert behind.patches[0] is alone.patches[0]
    assert behind.patches[1].after == (alone.patches[0].id,)
    assert behind.seconds > alone.seconds
    assert found.recommended is named(found, "AtPatch"), "which leaves clean inputs as they are"


# Recommendations, from figures alone


def fix(name: str, left: float, *, changed: float = 0.0, accuracy: float = 0.9, robust: float = 0.9) -> Fix:
    def rate(value: float) -> Rate:
        return Rate(value, value, value, 1000)

    def difference(value: float) -> Difference:
        return Difference(value, value - 0.01, value + 0.01)

    attack = Backdoor(0, rate(1), rate(left), rate(0), rate(left), rate(0), rate(robust), difference(0.9 - robust))
    lost = difference(0.9 - accuracy)
    found = Evaluation(1000, rate(0.9), rate(accuracy), lost, rate(0), rate(changed), None, None, None, attack, None)
    return Fix(name, (), 1.0, found, 1.0)


def ladder_of(*fixes: Fix) -> Ladder:
    return Ladder("backdoor", Goal(), 1000, fixes)


def test_of_those_that_meet_the_goal_the_one_that_changes_least():
    found = ladder_of(fix("A", 0.001, changed=1.0), fix("B", 0.005, changed=0.01), fix("C", 0.2))
    assert found.recommended.name == "B"
    assert found.reason == (
        "B meets the goal on 1000 held-out pairs and changes 1.00% of clean inputs; "
        "of the others that do, none changes fewer: A."
    )


def test_where_none_does_the_nearest():
    found = ladder_of(fix("A", 0.5), fix("B", 0.02), fix("C", 0.0, accuracy=0.5))
    assert found.recommended.name == "B"
    assert "None meets the goal" in found.reason
    assert "ASR above floor 2.00%, 1.00% over the bound of 1.00%" in found.reason


def test_accuracy_under_attack_counts_too():
    found = ladder_of(fix("A", 0.0, robust=0.8), fix("B", 0.005, changed=0.5))
    assert found.recommended.name == "B"
    assert found.shortfalls(found.fixes[0]) == ["robust accuracy lost 10.00%, 8.00% over the bound of 2.00%"]


def test_where_no_fix_could_be_made_the_reasons_are_given():
    found = ladder_of(Fix("A", (), 1.0, None, None, "no hidden layer"), Fix("B", (), 1.0, None, None, "no site"))
    assert found.recommended is None
    assert found.reason == "No fix could be made: A: no hidden layer; B: no site"
    assert found.to_json()["recommended"] is None
