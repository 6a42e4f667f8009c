"""The fit on models whose truth is known: which sites can detect, which must redistribute."""

import json
import re
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from models import run, same_bits
from planted import QUICK, Planted, fitted

from atpatch_onnx.baking.bake import bake
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.errors import (
    AtPatchError,
    DebugSetError,
    FitError,
    NoSiteError,
    PatchMismatchError,
    RunError,
    TargetMissedError,
)
from atpatch_onnx.fitting import detector as detector_module
from atpatch_onnx.fitting import preparation
from atpatch_onnx.fitting.detector import train_detector
from atpatch_onnx.fitting.fit import fit
from atpatch_onnx.fitting.goal import Goal
from atpatch_onnx.fitting.options import BETAS, FitOptions
from atpatch_onnx.fitting.search import Search
from atpatch_onnx.fitting.switchboard import Setting, Trial
from atpatch_onnx.graph import fingerprint
from atpatch_onnx.matching import find_sites
from atpatch_onnx.matching.hidden import find_hidden_layers
from atpatch_onnx.measuring.evaluate import evaluate
from atpatch_onnx.measuring.verify import verify
from atpatch_onnx.patches.patch import Features, LayerEdit, Patch
from atpatch_onnx.running import sessions as runtime

TRUTHS = {
    "one-site": (Planted(), [(1,)], (1,)),
    "carry": (Planted(drawn=(0,), harmful=(1, 2)), [(0,)], (1, 2)),
    "several-could-detect": (Planted(drawn=(0, 1, 2), harmful=(1,)), [(0,), (1,)], (1,)),
    "first-and-last": (Planted(drawn=(0,), harmful=(0, 3), layers=4), [(0,)], (0, 3)),
    "fused": (Planted(form="attention", drawn=(1,), harmful=(2,)), [(1,)], (2,)),
    "packed-masked": (Planted(form="packed", masked=True, tokens=12), [(1,)], (1,)),
    "masked-free": (Planted(masked=True, free=True, tokens=12, drawn=(1,), harmful=(1, 2)), [(1,)], (1, 2)),
    "fused-masked-free": (Planted(form="attention", masked=True, free=True, tokens=12), [(1,)], (1,)),
    "attribute": (Planted(kind="attribute", harm=1.0), [(1,)], (1,)),
    "attribute-carry": (Planted(kind="attribute", harm=8.0, drawn=(0,), harmful=(1, 2), form="packed"), [(0,)], (1, 2)),
}

truths = pytest.mark.parametrize("name", TRUTHS)


def roles(patch: Patch) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the detecting and of the redistributing sites."""
    return (
        tuple(site.site for site in patch.sites if site.detector),
        tuple(site.site for site in patch.sites if site.redistribution),
    )


@truths
def test_it_finds_the_planted_sites(name):
    planted, detecting, redistributing = TRUTHS[name]
    patch = fitted(planted)
    found = roles(patch)
    assert found[0] in [tuple(planted.sites[i] for i in option) for option in detecting]
    assert found[1] == tuple(planted.sites[i] for i in redistributing)
    assert patch.meets_target
    assert patch.figures["shortfalls"] == []
    assert patch.base == fingerprint(planted.model())


def predicted(logits: np.ndarray) -> np.ndarray:
    return logits.argmax(axis=1)


def missed(debug: DebugSet, base: np.ndarray, clean: np.ndarray, other: np.ndarray) -> bool:
    """Whether predictions miss the goal of what is left, or of accuracy, by loops."""
    if debug.kind == "backdoor":
        counted = [i for i in range(len(debug)) if debug.labels[i] != debug.target and base[i] != debug.target]
        left, bound = np.mean([other[i] == debug.target for i in counted]), Goal().asr_above_floor
    else:
        left, bound = np.mean([a != b for a, b in zip(clean, other, strict=True)]), Goal().flip_rate
    lost = np.mean(base == debug.labels) - np.mean(clean == debug.labels)
    return bool(left > bound or lost > Goal().accuracy_loss)


def test_with_all_defaults_too():
    planted = Planted(layers=2)
    assert roles(fitted(planted, FitOptions())) == roles(fitted(Planted()))


@truths
def test_the_result_is_1_minimal(name):
    """Without any one element the goal is missed: by a trial of this test's own, judged by a loop."""
    planted, _, _ = TRUTHS[name]
    patch, model = fitted(planted), planted.model()
    by_name = {site.name: site for site in find_sites(model)}
    trial = Trial(model, [(by_name[entry.site], entry) for entry in patch.sites], "logits")
    thresholds = {s.site: s.detector.threshold for s in patch.sites if s.detector}
    betas = {s.site: float(s.redistribution.beta.item()) for s in patch.sites if s.redistribution}
    part = planted.debug().split(seed=0).validation
    base = predicted(trial.run(part.clean, Setting()).logits)

    def misses(setting: Setting) -> bool:
        sides = (predicted(trial.run(side, setting).logits) for side in (part.clean, part.counterfactual))
        return missed(part, base, *sides)

    assert not misses(Setting(thresholds, betas))
    for left_out in thresholds:
        assert misses(Setting({s: t for s, t in thresholds.items() if s != left_out}, betas)), left_out
    for left_out in betas:
        assert misses(Setting(thresholds, {s: b for s, b in betas.items() if s != left_out})), left_out


@truths
def test_it_holds_on_inputs_that_the_fit_never_saw(name):
    planted, _, _ = TRUTHS[name]
    model = planted.model()
    patched = bake(model, fitted(planted), site_flags=True)
    inputs, labels, positions = planted.inputs(500, seed=77)
    changed = planted.changed(inputs, positions)
    before = {side: run(model, feed) for side, feed in (("clean", inputs), ("other", changed))}
    after = {side: run(patched, feed) for side, feed in (("clean", inputs), ("other", changed))}
    base, clean, other = (predicted(r["logits"]) for r in (before["clean"], after["clean"], after["other"]))

    flags = [name for name in after["clean"] if name.endswith("/flags")][-1]
    wanted = np.concatenate([positions if planted.kind == "attribute" else positions & False, positions])
    found = np.concatenate([after[side][flags] for side in ("clean", "other")])
    assert (found & wanted).sum() / wanted.sum() >= 0.99
    assert (found & wanted).sum() / found.sum() >= 0.99
    assert np.mean(clean == labels) >= np.mean(base == labels)
    if planted.kind == "backdoor":
        counted = (labels != planted.target) & (base != planted.target)
        assert np.mean(predicted(before["other"]["logits"])[counted] == planted.target) >= 0.98
        assert np.mean(other[counted] == planted.target) <= 0.01
        assert np.mean(other == labels) >= 0.98
        unflagged = ~after["clean"]["atpatch/flagged"][:, 0]
        assert unflagged.mean() >= 0.98
        assert same_bits(before["clean"]["logits"][unflagged], after["clean"]["logits"][unflagged])
    else:
        assert np.mean(base != predicted(before["other"]["logits"])) > 0.1
        assert np.mean(clean != other) <= 0.005


def test_an_attribute_spends_no_budget_on_its_own_column():
    """The attribute stands in every input and is flagged in every one: no false flag."""
    planted = TRUTHS["attribute"][0]
    outcome = fitted(planted).figures["outcome"]
    assert outcome["recall"] == 1.0
    assert outcome["clean_flag_rate"] == 0.0
    assert outcome["remaining"] == 0.0
    assert outcome["accuracy"] > outcome["accuracy_base"]  # here the attribute only misleads


def test_the_same_seed_gives_the_same_bytes():
    planted = Planted()
    again = fit(planted.model(), planted.debug(), QUICK)
    assert again.to_bytes() == fitted(planted).to_bytes()
    assert again.id == fitted(planted).id


def test_it_reads_a_model_from_its_path(tmp_path):
    planted = Planted()
    (tmp_path / "model.onnx").write_bytes(planted.proto().SerializeToString())
    assert fit(tmp_path / "model.onnx", planted.debug(), QUICK).id == fitted(planted).id


def test_another_seed_meets_the_goal_as_well():
    planted = Planted()
    other = fitted(planted, replace(QUICK, seed=1))
    assert other.meets_target
    assert roles(other) == roles(fitted(planted))
    assert other.id != fitted(planted).id


def test_figures_say_what_was_found():
    planted = TRUTHS["carry"][0]
    figures = fitted(planted).figures
    assert json.loads(json.dumps(figures)) == figures
    assert figures["kind"] == "backdoor"
    assert figures["target"] == planted.target
    assert figures["pairs"] == {"fit": 240, "calibration": 120, "validation": 120}
    assert figures["goal"] == {
        "asr_above_floor": 0.01,
        "flip_rate": 0.005,
        "accuracy_loss": 0.005,
        "clean_flag_rate": 0.01,
        "columns_missed": 1.0,
    }
    first, second, third = figures["sites"]
    assert (first["site"], first["detects"], first["redistributes"], first["beta"]) == (
        planted.sites[0],
        True,
        False,
        None,
    )
    assert (second["detects"], second["redistributes"], second["beta"]) == (False, True, 1.0)
    assert first["separation"] == pytest.approx(1.0, abs=1e-3)  # nearly every pair of columns is ranked rightly
    assert first["gap"] > 0 > second["gap"]
    assert first["threshold"] == fitted(planted).sites[0].detector.threshold
    assert set(first["without"]) == {"detect"}
    assert set(second["without"]) == set(third["without"]) == {"redistribute"}
    assert first["without"]["detect"]["remaining"] == 1.0
    assert all(site["without"]["redistribute"]["remaining"] > 0.5 for site in (second, third))


def test_the_neutral_value_is_the_mean_over_clean_inputs():
    planted = Planted()
    neutral = fitted(planted).sites[0].redistribution.neutral
    values = run_values(planted, planted.debug().split(seed=0).fit.clean)
    # float32 values, summed in float64
    np.testing.assert_allclose(neutral, values.mean(axis=(0, 2), dtype=np.float64), rtol=1e-5, atol=1e-6)


def run_values(planted: Planted, inputs: dict[str, np.ndarray]) -> np.ndarray:
    from models import with_outputs

    model = planted.model()
    name = find_sites(model)[1].value
    return run(with_outputs(model, [name]), inputs)[name]


def test_own_values_need_less_benign_attention():
    """The paper's form: at beta 1 the trigger's own value still does its harm, so beta must shrink."""
    planted = Planted()
    neutral, own = fitted(planted), fitted(planted, replace(QUICK, value="own"))
    assert own.figures["value"] == "own"
    assert own.sites[0].redistribution.neutral is None
    assert own.meets_target
    assert roles(own) == roles(neutral)
    assert neutral.sites[0].redistribution.beta.item() == 1.0
    assert own.sites[0].redistribution.beta.item() <= 0.1
    at_one = fitted(planted, replace(QUICK, value="own", betas=(1.0,), force=True))
    assert not at_one.meets_target
    assert at_one.figures["outcome"]["remaining"] > neutral.figures["outcome"]["remaining"]


def test_benign_attention_is_the_largest_that_meets_the_goal():
    planted = Planted()
    beta = fitted(planted, replace(QUICK, value="own")).sites[0].redistribution.beta.item()
    larger = min(b for b in BETAS if b > np.float32(beta) + 1e-6)
    with pytest.raises(TargetMissedError):
        fitted(planted, replace(QUICK, value="own", betas=(larger,)))


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
"""The harm is done before the trigger is drawn to: no patch can undo it whose sites decide alone."""


def test_a_joint_decision_undoes_what_is_seen_too_late():
    planted = LATE
    patch = fitted(planted)
    assert patch.figures["decision"] == "joint"
    assert patch.meets_target
    detecting, redistributing = roles(patch)
    assert detecting == planted.sites[2:]
    assert redistributing == planted.sites[:1]
    assert patch.joint.weights.tolist() == [1.0]
    model, unseen = planted.model(), planted.debug(200, seed=9)
    patched = bake(model, patch)
    left = evaluate(model, patched, unseen).backdoor
    assert left.asr_base.value > 0.95
    assert left.asr_above_floor.value <= 0.01
    result = verify(model, patched, unseen)
    assert result.passed, result.failures


def test_a_joint_decision_is_made_only_where_it_is_needed_or_asked_for():
    assert fitted(Planted()).joint is None
    assert fitted(Planted()).figures["decision"] == "alone"
    joint = fitted(Planted(), replace(QUICK, decisions=("joint",)))
    assert joint.figures["decision"] == "joint"
    assert joint.meets_target
    assert roles(joint) == roles(fitted(Planted()))


def test_each_part_is_scored_once_however_many_ways_to_decide_are_tried(monkeypatch):
    scored, score = [], Trial.scores
    monkeypatch.setattr(
        Trial, "scores", lambda self, inputs, **run: scored.append(run["stage"]) or score(self, inputs, **run)
    )
    patch = fit(LATE.model(), LATE.debug(), replace(QUICK, losses=("contrastive",)))
    assert patch.figures["decision"] == "joint"
    assert [stage.split(",")[0] for stage in scored[::2]] == ["calibrating", "validating", "weighing"]


def test_a_joint_decision_of_a_protected_attribute():
    planted = Planted(kind="attribute", harm=1.0)
    patch = fitted(planted, replace(QUICK, decisions=("joint",), redistribute="all"))
    assert patch.meets_target
    assert patch.joint.reach == 0
    assert roles(patch)[1] == planted.sites
    model, unseen = planted.model(), planted.debug(100, seed=9)
    result = verify(model, bake(model, patch), unseen)
    assert result.passed, result.failures


def trained_with(monkeypatch: pytest.MonkeyPatch, *blind: str) -> list[str]:
    """The losses that detectors are trained with from now on; those of the `blind` ones see nothing."""
    asked: list[str] = []

    def train(columns, training, loss="contrastive", *, seed=0):
        asked.append(loss)
        found = train_detector(columns, training, loss, seed=seed)
        return replace(found, weight_1=0 * found.weight_1) if loss in blind else found

    monkeypatch.setattr(detector_module, "train_detector", train)
    return asked


def test_another_loss_is_tried_only_where_the_first_misses_the_goal(monkeypatch):
    planted = Planted()
    usual = roles(fitted(planted))
    asked = trained_with(monkeypatch)
    assert fit(planted.model(), planted.debug(), QUICK).figures["loss"] == "contrastive"
    assert asked == ["contrastive"] * planted.layers
    asked = trained_with(monkeypatch, "contrastive")
    patch = fit(planted.model(), planted.debug(), QUICK)
    assert asked == ["contrastive"] * planted.layers + ["logistic"] * planted.layers
    assert patch.figures["loss"] == "logistic"
    assert patch.meets_target
    assert roles(patch) == usual
    with pytest.raises(TargetMissedError):
        fit(planted.model(), planted.debug(), replace(QUICK, losses=("contrastive",), decisions=("alone",)))


def test_summaries_are_tried_only_where_landmarks_miss_the_goal(monkeypatch):
    planted = Planted(masked=True)
    patch = fit(planted.model(), planted.debug(), QUICK)
    assert {site.detector.features for site in patch.sites if site.detector} == {Features.LANDMARKS}

    asked: list[tuple[Features, str]] = []

    def train(columns, training, loss="contrastive", *, seed=0):
        asked.append((columns.features, loss))
        found = train_detector(columns, training, loss, seed=seed)
        return replace(found, weight_1=0 * found.weight_1) if columns.features is Features.LANDMARKS else found

    monkeypatch.setattr(detector_module, "train_detector", train)
    patch = fit(planted.model(), planted.debug(), QUICK)
    sites = planted.layers
    assert asked == [(Features.LANDMARKS, "contrastive")] * sites + [(Features.SUMMARY, "contrastive")] * sites
    assert {site.detector.features for site in patch.sites if site.detector} == {Features.SUMMARY}
    assert patch.meets_target


@pytest.mark.parametrize("blind", ["contrastive", "logistic"])
def test_where_all_miss_the_goal_the_nearest_is_written(monkeypatch, blind):
    planted = Planted()
    trained_with(monkeypatch, blind)
    out_of_reach = replace(QUICK, goal=Goal(accuracy_loss=-0.5), force=True)
    patch = fit(planted.model(), planted.debug(), out_of_reach)
    assert not patch.meets_target
    assert patch.figures["loss"] != blind
    assert patch.figures["outcome"]["remaining"] <= 0.01


LITTLE_HELP = re.compile(r"ASR above floor (99|100)\.\d\d%, (98|99)\.\d\d% over the bound of 1\.00%")


def test_a_missed_goal_says_by_how_much():
    with pytest.raises(TargetMissedError) as raised:
        fitted(LATE, replace(QUICK, decisions=("alone",)))
    assert raised.value.where == "the validation part"
    assert LITTLE_HELP.search(raised.value.found)
    assert "--force" in raised.value.advice


def test_force_gives_a_patch_that_says_so(tmp_path):
    patch = fitted(LATE, replace(QUICK, force=True, losses=("contrastive",), decisions=("alone",)))
    assert not patch.meets_target
    (shortfall,) = patch.figures["shortfalls"]
    assert LITTLE_HELP.fullmatch(shortfall)
    assert patch.figures["outcome"]["clean_flag_rate"] <= 0.01  # of what hardly helps, nothing that harms
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


@pytest.mark.parametrize("features", [Features.SUMMARY, Features.LANDMARKS])
@pytest.mark.parametrize("planted", [Planted(), Planted(masked=True, free=True)], ids=["fixed", "padded"])
def test_features_may_be_chosen(planted, features):
    patch = fitted(planted, replace(QUICK, features=features))
    assert patch.sites[0].detector.features is features
    assert patch.meets_target


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
    assert opened == ["before"] * 4  # predictions, suspects, columns, and the trial graph


def test_no_setting_is_tried_beyond_reason():
    """Delta debugging asks each subset once; there are 2^6 of detecting and redistributing at three sites."""
    assert fitted(TRUTHS["carry"][0]).figures["settings_tried"] <= 30


# What is refused


def test_too_few_pairs():
    planted = Planted()
    with pytest.raises(DebugSetError, match=r"at least 100 pairs to calibrate a clean flag rate of 0\.01; found 50 of"):
        fit(planted.model(), planted.debug(200))


def test_pairs_without_an_effect():
    planted = Planted()
    inputs, labels, _ = planted.inputs(400)
    changed = {"x": inputs["x"].copy()}
    changed["x"][:, :, -1] += 1
    with pytest.raises(DebugSetError, match="the same prediction on both sides of all 400 pairs"):
        fit(planted.model(), DebugSet.from_pairs(inputs, changed, labels))


@pytest.mark.parametrize("wrong", ["labels", "target"])
def test_classes_that_the_model_does_not_have(wrong):
    planted = Planted()
    debug = planted.debug()
    debug = replace(debug, labels=debug.labels + 3) if wrong == "labels" else debug.with_target(9)
    with pytest.raises(DebugSetError, match=f"the {wrong} of the debug set: expected classes of the model, 0 to 2"):
        fit(planted.model(), debug, QUICK)


def spoiled(**changes) -> DebugSet:
    debug = Planted().debug()
    return DebugSet.from_pairs(
        *(
            {
                changes.get("name", "x"): side["x"].astype(changes.get("dtype", np.float32))[
                    :, : changes.get("tokens", 8)
                ]
            }
            for side in (debug.clean, debug.counterfactual)
        ),
        debug.labels,
    )


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"name": "pixels"}, "missing: 'x'"),
        ({"dtype": np.float64}, "expected dtype float32; found dtype float64"),
        ({"tokens": 7}, r"expected shape \[batch, 8, 12\]; found shape \[480, 7, 12\]"),
    ],
)
def test_inputs_that_do_not_fit_the_model(changes, text):
    with pytest.raises(DebugSetError, match=text):
        fit(Planted().model(), spoiled(**changes))


def test_nan_is_refused_before_there_is_a_debug_set():
    planted = Planted()
    inputs, labels, positions = planted.inputs(20)
    changed = planted.changed(inputs, positions)
    changed["x"][3, 2, 1] = np.nan
    with pytest.raises(DebugSetError, match=r"NaN|nan|finite"):
        DebugSet.from_pairs(inputs, changed, labels)


@pytest.mark.parametrize("sites", [("layer9.attention",), ("layer1.attention", "no"), ()])
def test_unknown_sites(sites):
    with pytest.raises(NoSiteError, match=r"layer0\.attention, layer1\.attention, layer2\.attention"):
        fit(Planted().model(), Planted().debug(), FitOptions(sites=sites))


def test_sites_of_two_token_axes_are_refused(monkeypatch):
    """Flags are carried along one token axis: sites of another would silently be left out."""
    names = Planted().sites

    def other_axis(model):
        first, *others = find_sites(model)
        return (first, *(replace(site, token_axis="elsewhere") for site in others))

    monkeypatch.setattr(preparation, "find_sites", other_axis)
    with pytest.raises(FitError, match="sites of one token axis") as raised:
        fit(Planted().model(), Planted().debug(), FitOptions(sites=names[:2]))
    assert "elsewhere" in raised.value.found


def test_a_model_without_attention():
    value = ir.Value(name="x", shape=ir.Shape(["n", 3]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.Node("", "Identity", [value])
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = "y", value.shape, value.type
    model = ir.Model(ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": 18}), ir_version=10)
    with pytest.raises(NoSiteError, match="found none that can be patched"):
        fit(model, Planted().debug())


def test_an_output_that_does_not_exist():
    with pytest.raises(RunError, match="an output named 'scores'; found logits"):
        fit(Planted().model(), Planted().debug(), FitOptions(output="scores"))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"value": "mean"}, "option value: expected 'neutral' or 'own'; found 'mean'"),
        ({"losses": ()}, "option losses"),
        (
            {"losses": ("contrastive", "hinge")},
            "option losses: expected some of 'contrastive' and 'logistic', each once",
        ),
        ({"betas": ()}, "option betas"),
        ({"betas": (1.0, 1.5)}, "option betas"),
        ({"betas": (0.0, 1.0)}, "option betas: expected numbers from 0 to 1, the largest first"),
        ({"missed": ()}, "option missed"),
        ({"missed": (0.1, 0.1)}, "option missed"),
        ({"thresholds": "highest"}, "option thresholds: expected 'balanced' or 'lowest'; found 'highest'"),
        ({"redistribute": "some"}, "option redistribute: expected 'needed' or 'all'; found 'some'"),
        ({"batch_size": 0}, "option batch_size"),
    ],
)
def test_options_that_mean_nothing(options, text):
    with pytest.raises(FitError, match=text):
        FitOptions(**options)


def test_progress_is_told_of_every_stage():
    stages: dict[str, list[tuple[int, int]]] = {}
    planted = Planted()
    fit(
        planted.model(),
        planted.debug(),
        QUICK,
        progress=lambda stage, done, total: stages.setdefault(stage, []).append((done, total)),
    )
    assert {"finding the suspect tokens", "training detectors, contrastive", "delta debugging, settings tried"} < set(
        stages
    )
    for told in stages.values():
        assert [done for done, _ in told] == sorted({done for done, _ in told})
