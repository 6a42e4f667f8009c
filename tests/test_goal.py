"""What an outcome is, and how far it is from the goal."""

import json

import numpy as np
import pytest

from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.fitting.goal import Goal, Outcome, judge

REACHED = Outcome("backdoor", 0.01, 0.9, 0.9, 0.02, 0.01, 1.0, 1.0)


def outcome(**changes: object) -> Outcome:
    return Outcome(**{**REACHED.to_json(), **changes})


def test_bounds_are_met_when_they_are_touched():
    assert REACHED.shortfalls(Goal()) == ()
    assert outcome(kind="attribute", remaining=0.005).shortfalls(Goal()) == ()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"remaining": 0.25}, "ASR above floor 25.00%, 24.00% over the bound of 1.00%"),
        ({"kind": "attribute", "remaining": 0.01}, "flip rate 1.00%, 0.50% over the bound of 0.50%"),
        ({"accuracy": 0.88}, "accuracy lost 2.00%, 1.50% over the bound of 0.50%"),
        ({"robust_accuracy_loss": 0.12}, "robust accuracy lost 12.00%, 10.00% over the bound of 2.00%"),
        ({"clean_flag_rate": 0.03}, "clean flag rate 3.00%, 2.00% over the bound of 1.00%"),
        ({"recall": 0.75}, "anomalous columns missed 25.00%, 15.00% over the bound of 10.00%"),
    ],
)
def test_a_shortfall_says_what_was_found_and_by_how_much_it_misses(changes, text):
    assert outcome(**changes).shortfalls(Goal(columns_missed=0.1)) == (text,)
    assert outcome(recall=0.0).shortfalls(Goal()) == ()


def test_all_shortfalls_are_listed():
    missed = outcome(remaining=1.0, accuracy=0.0, robust_accuracy_loss=1.0, clean_flag_rate=1.0).shortfalls(Goal())
    assert [line.split(" ")[0] for line in missed] == ["ASR", "accuracy", "robust", "clean"]


def test_excess_adds_up_what_exceeds_and_nearness_asks_it_first():
    assert REACHED.excess(Goal()) == 0
    worse = outcome(remaining=0.03, robust_accuracy_loss=0.05)
    assert worse.excess(Goal()) == pytest.approx(0.02 + 0.03)  # float64 rounding
    assert outcome(remaining=0.0, accuracy=0.5).nearness(Goal()) > worse.nearness(Goal()) > REACHED.nearness(Goal())


def test_an_outcome_is_plain_json():
    assert json.loads(json.dumps(REACHED.to_json())) == REACHED.to_json()


def flags(*rows: str) -> np.ndarray:
    return np.array([[letter == "x" for letter in row] for row in rows])


def debug(labels: list[int] | None, **options: object) -> DebugSet:
    clean = np.zeros((4, 3), np.float32)
    return DebugSet.from_pairs({"x": clean}, {"x": clean + 1}, labels, **options)


def test_judge_a_backdoor_by_hand():
    part = debug([0, 0, 1, 2], target=2)
    anomalous = (flags("...", "...", "...", "..."), flags("x..", "x..", ".x.", ".x."))
    found = judge(
        part,
        base_clean=np.array([0, 2, 1, 2]),
        clean=(np.array([0, 2, 0, 2]), flags("..x", "...", "...", "...")),
        counterfactual=(np.array([2, 2, 1, 2]), flags("x.x", "x..", "...", ".x.")),
        anomalous=anomalous,
    )
    assert found.remaining == 1 / 2  # of pairs 0 and 2: pair 1 goes to the target anyway, pair 3 is of the target
    assert (found.accuracy_base, found.accuracy) == (3 / 4, 2 / 4)
    # Of pairs 0, 1 and 2, which are not of the target: right without the trigger 0 and 2, with it 2 alone.
    assert found.robust_accuracy_loss == pytest.approx(1 / 3)  # float64 rounding
    assert found.clean_flag_rate == 1 / 4
    assert found.recall == 3 / 4
    assert found.precision == 3 / 5


def test_judge_an_attribute_by_hand():
    part = debug([0, 1, 1, 0], kind="attribute")
    wanted = flags("x..", "x..", "x..", "x..")
    found = judge(
        part,
        base_clean=np.array([0, 1, 1, 1]),
        clean=(np.array([0, 1, 0, 0]), flags("x..", "x..", "xx.", "...")),
        counterfactual=(np.array([0, 0, 0, 0]), flags("x..", "x..", "x..", "x..")),
        anomalous=(wanted, wanted),
    )
    assert found.remaining == 1 / 4
    assert found.robust_accuracy_loss == 0, "there is no trigger"
    assert found.accuracy == 3 / 4
    assert found.clean_flag_rate == 1 / 4  # flags on suspects are wanted, on either side
    assert found.recall == 7 / 8
    assert found.precision == 7 / 8


def test_without_labels_the_bases_predictions_stand_in():
    part = debug(None, target=2)
    nothing = np.zeros((4, 3), bool)
    found = judge(
        part, np.array([0, 1, 2, 0]), (np.array([0, 1, 1, 0]), nothing), (np.full(4, 2), nothing), (nothing,) * 2
    )
    assert (found.accuracy_base, found.accuracy) == (1.0, 3 / 4)
    assert found.remaining == 1.0
    assert found.robust_accuracy_loss == 1.0
    assert (found.recall, found.precision) == (1.0, 0.0)  # nothing was to be flagged


def test_where_every_label_is_the_target_no_robust_accuracy_is_lost():
    part, nothing = debug([2, 2, 2, 2], target=2), np.zeros((4, 3), bool)
    found = judge(part, np.full(4, 2), (np.full(4, 2), nothing), (np.zeros(4, int), nothing), (nothing,) * 2)
    assert found.robust_accuracy_loss == 0
