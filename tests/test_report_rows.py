from dataclasses import replace

import pytest
import reports as r

from atpatch_onnx.patches.patch import Patch
from atpatch_onnx.report.rows import (
    before_after,
    check_lines,
    edit_rows,
    facts,
    goal_rows,
    number,
    percent,
    reading,
    shown,
    site_rows,
)
from atpatch_onnx.report.verdict import Tone, judge, missed_goal

# Rows


def test_what_cannot_be_printed_is_spelt_out():
    assert shown("layer/0") == "layer/0"
    assert shown(r.HOSTILE) == "<script>alert(1)</script> & $x_{$ [red]\\u{1b}[31m\\u{202e}"
    assert shown("\ud800").encode() == b"\\u{d800}"


@pytest.mark.parametrize("value", [None, True, "0.5", float("nan"), float("inf"), [], {}])
def test_a_figure_that_is_no_number_is_none(value):
    assert number(value) is None
    assert percent(number(value)) == "-"


def test_a_backdoor_has_its_rows():
    names = {row.name: row for row in before_after(r.evaluation())}
    assert "Flip rate (UF)" not in names
    attack = names["Attack success rate (ASR)"]
    assert (attack.before, attack.after) == (r.rate(0.98), r.rate(0.005))
    assert names["ASR above floor"].before is None
    assert names["Floor: same share, no trigger"].before == r.rate(0.01)


def test_group_metrics_need_two_classes():
    names = [row.name for row in before_after(r.evaluation(kind="attribute"))]
    assert "Equalized odds difference" in names
    names = [row.name for row in before_after(r.evaluation(kind="attribute", binary=False))]
    assert "Equalized odds difference" not in names
    assert "Confidence gap" in names


def test_each_element_tells_what_is_left_and_missed_without_it():
    used, idle = site_rows(r.figures())
    assert [(e.role, e.left, e.missed) for e in used.elements] == [
        ("detect", 0.995, "ASR above floor"),
        ("redistribute", 0.31, "ASR above floor"),
    ]
    assert idle.elements == ()
    assert used.flag_rate == 0.004


def test_a_bound_other_than_the_attack_can_be_what_is_missed():
    figures = r.figures()
    figures["sites"][0]["without"]["detect"] = r.outcome(0.0, flag_rate=0.5)
    assert site_rows(figures)[0].elements[0].missed == "clean flag rate"
    figures["sites"][0]["without"]["detect"] = r.outcome(0.0, robust=0.3)
    assert site_rows(figures)[0].elements[0].missed == "robust accuracy lost"


def test_an_attribute_is_measured_by_its_flip_rate():
    goal = goal_rows(r.figures(kind="attribute"))[0]
    assert (goal.name, goal.bound, goal.reached, goal.met) == ("flip rate", 0.005, 0.002, True)
    assert "robust accuracy lost" not in [goal.name for goal in goal_rows(r.figures(kind="attribute"))]


def test_accuracy_under_attack_has_its_bound():
    goals = {goal.name: (goal.bound, goal.reached, goal.met) for goal in goal_rows(r.figures())}
    assert goals["robust accuracy lost"] == (0.02, 0.011, True)
    assert [goal.name for goal in goal_rows({**r.figures(), "goal": {"asr_above_floor": 0.1}})] == [
        "ASR above floor",
        "accuracy lost",
        "clean flag rate",
    ]


def test_what_detectors_read_and_why():
    assert reading({}) is None
    assert reading(r.figures()) == "one product with each token's key"
    missed = {"detectors": "linear", "shortfalls": ["ASR above floor 14.00%", r.HOSTILE]}
    figures = {**r.figures(), "detectors": "hidden", "tried": [missed, {"detectors": "hidden", "shortfalls": []}]}
    assert reading(figures) == (
        f"each token's key, by a hidden layer; linear ones missed ASR above floor 14.00%; {shown(r.HOSTILE)}"
    )


@pytest.mark.parametrize(
    "figures",
    [
        {},
        {"sites": None, "goal": 3, "outcome": "x", "pairs": [], "shortfalls": 1, "meets_target": "no"},
        {"sites": [1, {}, {"site": 5, "detects": True, "without": {"detect": 7}}], "goal": {}, "outcome": []},
        {"sites": [{"site": "a", "redistributes": True, "without": []}], "kind": ["x"], "detectors": ["linear"]},
        {"detectors": "hidden", "tried": [3, {}, {"detectors": [], "shortfalls": [{}, 1]}, {"shortfalls": "no"}]},
        {"units": [3, {}, {"layer": 5, "unit": [], "factor": "x", "rank": "1", "lowers": None}], "composed": 3},
        {"composed": [3, {}, {"units": "x"}, {"units": [{}]}]},
        {"units": [{"factor": 10**400, "rank": 10**400}], "goal": {"accuracy_loss": 10**400}},
    ],
)
def test_foreign_figures_do_not_break_anything(figures):
    patch = Patch("base", (), figures)
    site_rows(figures)
    goal_rows(figures)
    facts(patch)
    edit_rows(figures)
    reading(figures)
    judge(patch, r.evaluation(), None)


def test_sites_that_pass_alike_share_a_line():
    lines = check_lines(r.verification())
    side = "clean inputs, no optimization"
    assert [name for _, name, _ in lines] == ["base", "unbake", f"scores at 2 sites, {side}", f"2 sites, {side}"]


def test_failures_come_first_and_alone():
    failed = "site layer1, clean inputs, no optimization"
    lines = check_lines(r.verification(failed))
    assert lines[0] == (False, failed, f"what was found of {failed}")
    names = ["base", "unbake", "scores at 2 sites, clean inputs, no optimization"]
    assert [name for _, name, _ in lines[1:]] == [*names, "site layer0, clean inputs, no optimization"]


# Verdict


def test_a_good_fix():
    verdict = judge(r.patch(), r.evaluation(), r.verification())
    assert (verdict.tone, verdict.label, verdict.objections) == (Tone.GOOD, "Fix holds", ())
    assert verdict.sentence == (
        "On 200 pairs, attack success falls from 98.0% to 0.5% (floor 1.0%), clean accuracy stays at 97.0%"
        " and inputs without a flag keep their outputs bit for bit."
    )


def test_failed_checks_outweigh_everything():
    verdict = judge(r.patch(met=False), r.evaluation(asr=0.3), r.verification("unbake"))
    assert (verdict.tone, verdict.label) == (Tone.BAD, "Do not ship")
    assert len(verdict.objections) == 3
    assert verdict.objections[0].startswith("unbake: ")


def test_changed_clean_outputs_are_a_failure():
    verdict = judge(r.patch(), r.evaluation(identical=False), r.verification())
    assert verdict.label == "Do not ship"
    assert "bit for bit" not in verdict.sentence


def test_a_missed_goal_is_loud():
    verdict = judge(r.patch(met=False), r.evaluation(), r.verification())
    assert (verdict.tone, verdict.label) == (Tone.BAD, "Goal missed")
    assert missed_goal({"meets_target": False}) == ("On the validation part the goal was missed.",)


def test_unseen_inputs_can_refute_the_validation():
    verdict = judge(r.patch(), r.evaluation(asr=0.3), r.verification())
    assert (verdict.tone, verdict.label) == (Tone.WARNING, "Look closer")
    assert verdict.objections == ("On the evaluated inputs: ASR above floor 30.00%, over the bound of 1.00%.",)
    verdict = judge(r.patch(), r.evaluation(robust=0.84), r.verification())
    assert (verdict.tone, verdict.label) == (Tone.WARNING, "Look closer")
    assert verdict.objections == ("On the evaluated inputs: robust accuracy lost 13.00%, over the bound of 2.00%.",)


def test_what_was_not_done_is_not_claimed():
    assert judge(r.patch(), r.evaluation(), None).label == "Not verified"
    verdict = judge(r.patch(), None, None)
    assert (verdict.tone, verdict.label) == (Tone.WARNING, "Not evaluated or verified")
    assert verdict.sentence == (
        "Nothing was measured on inputs that the fit never saw; ASR above floor 0.20% on its validation part."
    )


def test_an_attribute_speaks_of_flips():
    evaluation = replace(r.evaluation(kind="attribute"), accuracy_patched=r.rate(0.965))
    verdict = judge(r.patch(kind="attribute"), evaluation, r.verification())
    assert "the flip rate goes from 7.50% to 0.00%" in verdict.sentence
    assert "clean accuracy goes from 97.0% to 96.5%" in verdict.sentence
