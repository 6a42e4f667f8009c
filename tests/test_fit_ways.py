"""The ways of a fit on models whose truth is known: what is tried, in which order, with which options."""

import re
from dataclasses import replace

import numpy as np
import pytest
from planted import QUICK, Planted, fitted
from test_fit import TRUTHS, roles

from atpatch_onnx.baking.bake import bake
from atpatch_onnx.errors import (
    AtPatchError,
    FitError,
    PatchMismatchError,
    TargetMissedError,
)
from atpatch_onnx.fitting import detector as detector_module
from atpatch_onnx.fitting.detector import train_detector
from atpatch_onnx.fitting.fit import fit
from atpatch_onnx.fitting.goal import Goal, Outcome
from atpatch_onnx.fitting.search import Search
from atpatch_onnx.fitting.switchboard import Switchboard
from atpatch_onnx.graph import fingerprint
from atpatch_onnx.matching import find_sites
from atpatch_onnx.matching.hidden import find_hidden_layers
from atpatch_onnx.measuring.verify import verify
from atpatch_onnx.patches.patch import LayerEdit, Patch
from atpatch_onnx.running import sessions as runtime


def test_the_lowest_thresholds_are_below_the_balanced_ones_and_meet_the_goal():
    planted = Planted()
    balanced, lowest = fitted(planted), fitted(planted, replace(QUICK, thresholds="lowest"))
    assert lowest.meets_target
    (one,), (other,) = ([s.detector.threshold for s in p.sites if s.detector] for p in (balanced, lowest))
    assert other < one


@pytest.mark.parametrize("name", ["one-site", "attribute-carry", "several-could-detect"])
def test_all_sites_redistribute_where_that_is_asked_for(name):
    """The first one then has to detect, or those before the first detector would have no flags."""
    planted, *_ = TRUTHS[name]
    patch = fitted(planted, replace(QUICK, redistribute="all"))
    detecting, redistributing = roles(patch)
    assert redistributing == planted.sites
    assert detecting[0] == planted.sites[0]
    assert patch.meets_target
    assert find_sites(bake(planted.model(), patch))


LATE = Planted(drawn=(2,), harmful=(0,), harm=400)
"""The harm is done before the trigger is drawn to: no patch can undo it."""


def test_each_part_is_scored_once_for_each_kind_of_detectors(monkeypatch):
    scored, score = [], Switchboard.scores
    monkeypatch.setattr(
        Switchboard, "scores", lambda self, inputs, **run: scored.append(run["stage"]) or score(self, inputs, **run)
    )
    patch = fit(LATE.model(), LATE.debug(), replace(QUICK, force=True))
    assert [one["detectors"] for one in patch.figures["tried"]] == ["linear", "hidden"]
    sides = ("clean inputs", "counterfactuals")
    assert scored == [
        f"{step}, {kind}, {side}"
        for kind in ("linear", "hidden")
        for step in ("calibrating", "validating")
        for side in sides
    ]


def trained_with(monkeypatch: pytest.MonkeyPatch, *blind: str) -> list[str]:
    """The kinds that detectors are trained of from now on; the `blind` ones see nothing."""
    asked: list[str] = []

    def train(tokens, training, *, hidden, seed=0):
        kind = "hidden" if hidden else "linear"
        asked.append(kind)
        found = train_detector(tokens, training, hidden=hidden, seed=seed)
        return replace(found, weights=0 * found.weights) if kind in blind else found

    monkeypatch.setattr(detector_module, "train_detector", train)
    return asked


def test_a_hidden_layer_is_tried_only_where_linear_detectors_miss_the_goal(monkeypatch):
    planted = Planted()
    usual = roles(fitted(planted))
    asked = trained_with(monkeypatch)
    assert fit(planted.model(), planted.debug(), QUICK).figures["detectors"] == "linear"
    assert asked == ["linear"] * planted.layers
    asked = trained_with(monkeypatch, "linear")
    patch = fit(planted.model(), planted.debug(), QUICK)
    assert asked == ["linear"] * planted.layers + ["hidden"] * planted.layers
    assert patch.figures["detectors"] == "hidden"
    assert [bool(one["shortfalls"]) for one in patch.figures["tried"]] == [True, False]
    assert not any(site.detector.is_linear for site in patch.sites if site.detector)
    assert patch.meets_target
    assert roles(patch) == usual
    with pytest.raises(TargetMissedError):
        fit(planted.model(), planted.debug(), replace(QUICK, detectors=("linear",)))


@pytest.mark.parametrize("blind", ["linear", "hidden"])
def test_where_all_miss_the_goal_the_nearest_is_written(monkeypatch, blind):
    planted = Planted()
    trained_with(monkeypatch, blind)
    out_of_reach = replace(QUICK, goal=Goal(accuracy_loss=-0.5), force=True)
    patch = fit(planted.model(), planted.debug(), out_of_reach)
    assert not patch.meets_target
    assert patch.figures["detectors"] != blind
    assert patch.figures["outcome"]["remaining"] <= 0.01


LITTLE_HELP = re.compile(r"ASR above floor (99|100)\.\d\d%, (98|99)\.\d\d% over the bound of 1\.00%")


def test_a_missed_goal_says_by_how_much():
    with pytest.raises(TargetMissedError) as raised:
        fitted(LATE)
    assert raised.value.where == "the validation part"
    assert LITTLE_HELP.search(raised.value.found)
    assert "--force" in raised.value.advice


def test_force_gives_a_patch_that_says_so(tmp_path):
    patch = fitted(LATE, replace(QUICK, force=True, detectors=("linear",)))
    assert not patch.meets_target
    assert LITTLE_HELP.fullmatch(patch.figures["shortfalls"][0])
    found = Outcome(**patch.figures["outcome"])
    assert patch.figures["shortfalls"] == list(found.shortfalls(Goal()))
    base = replace(found, remaining=1.0, accuracy=found.accuracy_base, robust_accuracy_loss=1.0, clean_flag_rate=0.0)
    assert found.excess(Goal()) <= base.excess(Goal())  # what hardly helps harms no more than that
    patch.save(tmp_path / "p.safetensors")
    assert not Patch.load(tmp_path / "p.safetensors").meets_target
    bake(LATE.model(), patch)


def test_force_changes_nothing_where_the_goal_is_met():
    assert fitted(Planted(), replace(QUICK, force=True)).id == fitted(Planted()).id


def test_a_stricter_goal_is_missed_where_the_default_is_met():
    planted = TRUTHS["attribute"][0]
    goal = Goal(accuracy_loss=-0.5)  # half of the inputs more right than before
    with pytest.raises(TargetMissedError, match="accuracy lost"):
        fitted(planted, replace(QUICK, goal=goal))


def test_the_target_is_inferred():
    planted = Planted()
    patch = fit(planted.model(), planted.debug(target=False), QUICK)
    assert patch.figures["target"] == planted.target
    assert patch.id == fitted(planted).id


def test_without_one_target_class_a_backdoor_is_refused():
    planted = Planted(kind="attribute", harm=1.0)
    debug = replace(planted.debug(), kind="backdoor")
    with pytest.raises(FitError, match="changed predictions that go to several"):
        fit(planted.model(), debug)


def test_without_labels_the_bases_predictions_stand_in():
    planted = Planted()
    patch = fit(planted.model(), replace(planted.debug(), labels=None), QUICK)
    assert patch.meets_target
    assert patch.figures["outcome"]["accuracy_base"] == 1.0


def test_a_fit_after_neuron_edits_is_of_the_edited_model_and_needs_them(monkeypatch):
    planted = Planted(mlp=4)
    model = planted.model()
    (layer, *_) = find_hidden_layers(model)
    edit = LayerEdit(layer.name, np.array([1]), np.zeros(1, np.float32), np.full(1, 0.25, np.float32))
    neurons = Patch(fingerprint(model), (), {}, (edit,))
    patch = fit(model, planted.debug(), QUICK, after=[neurons])
    assert patch.base == fingerprint(model)
    assert patch.after == (neurons.id,)
    assert patch.meets_target
    assert verify(model, bake(model, [neurons, patch]), planted.debug(40)).passed
    with pytest.raises(PatchMismatchError, match=f"Give patch {neurons.id} first"):
        bake(model, patch)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda patch: replace(patch, base="sha256:0"), "expected patches of this model"),
        (lambda patch: fitted(Planted()), "expected patches of hidden units"),
    ],
    ids=["another-model", "attention"],
)
def test_what_a_fit_cannot_come_after(change, message):
    model = Planted(mlp=4).model()
    edit = LayerEdit("layer0.mlp.hidden", np.array([1]), np.zeros(1, np.float32), np.zeros(1, np.float32))
    with pytest.raises(AtPatchError, match=message):
        fit(model, Planted().debug(), QUICK, after=[change(Patch(fingerprint(model), (), {}, (edit,)))])


@pytest.mark.parametrize("planted", [Planted(), Planted(masked=True, free=True)], ids=["fixed", "padded"])
def test_a_hidden_layer_may_be_asked_for(planted):
    patch = fitted(planted, replace(QUICK, detectors=("hidden",)))
    assert not patch.sites[0].detector.is_linear
    assert patch.meets_target
    model, unseen = planted.model(), planted.debug(100, seed=9)
    result = verify(model, bake(model, patch), unseen)
    assert result.passed, result.failures


def test_candidate_sites_may_be_named():
    planted = TRUTHS["several-could-detect"][0]
    patch = fitted(planted, replace(QUICK, sites=(planted.sites[1],)))
    assert roles(patch) == ((planted.sites[1],), (planted.sites[1],))
    assert [site["site"] for site in patch.figures["sites"]] == [planted.sites[1]]


def test_suspects_are_found_at_the_first_site_even_where_it_is_no_candidate():
    """Behind attention every token's value has seen the trigger: suspects found there would be all tokens."""
    planted = Planted()
    patch = fitted(planted, replace(QUICK, sites=planted.sites[1:]))
    assert patch.figures["outcome"]["precision"] > 0.9
    assert patch.figures["outcome"]["recall"] > 0.9
    assert roles(patch) == roles(fitted(planted))


def test_one_session_serves_the_whole_search(monkeypatch):
    planted = Planted(drawn=(0,), harmful=(1, 2))
    opened: list[str] = []
    searching = False
    construct, search = runtime.Session.__init__, Search.run

    def counted(self, *args, **options):
        opened.append("search" if searching else "before")
        construct(self, *args, **options)

    def searched(self):
        nonlocal searching
        searching = True
        try:
            return search(self)
        finally:
            searching = False

    monkeypatch.setattr(runtime.Session, "__init__", counted)
    monkeypatch.setattr(Search, "run", searched)
    patch = fit(planted.model(), planted.debug(), QUICK)
    assert patch.figures["settings_tried"] > 5
    assert opened == ["before"] * 4  # predictions, suspects, tokens, and the switchboard


def test_no_setting_is_tried_beyond_reason():
    """Delta debugging asks each subset once; there are 2^6 of detecting and redistributing at three sites."""
    assert fitted(TRUTHS["carry"][0]).figures["settings_tried"] <= 30


def test_progress_is_told_of_every_stage():
    stages: dict[str, list[tuple[int, int]]] = {}
    planted = Planted()
    fit(
        planted.model(),
        planted.debug(),
        QUICK,
        progress=lambda stage, done, total: stages.setdefault(stage, []).append((done, total)),
    )
    assert {"finding the suspect tokens", "training detectors, linear", "delta debugging, settings tried"} < set(stages)
    for told in stages.values():
        assert [done for done, _ in told] == sorted({done for done, _ in told})


def test_pairs_that_a_search_found_get_the_lowest_thresholds():
    """The tool chooses: what pairs say of themselves decides, and an option overrules it."""
    planted = Planted()
    found = replace(planted.debug(), found=True)

    def thresholds(patch: Patch) -> list[float]:
        return [site.detector.threshold for site in patch.sites if site.detector]

    lowest = fitted(planted, replace(QUICK, thresholds="lowest"))
    assert thresholds(fit(planted.model(), found, QUICK)) == thresholds(lowest)
    balanced = fit(planted.model(), found, replace(QUICK, thresholds="balanced"))
    assert thresholds(balanced) == thresholds(fitted(planted)) != thresholds(lowest)
