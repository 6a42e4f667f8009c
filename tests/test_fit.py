"""The fit on models whose truth is known: which sites can detect, which must redistribute."""

import json
import re
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from models import run, same_bits, with_outputs
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
from atpatch_onnx.fitting.goal import Goal, Outcome
from atpatch_onnx.fitting.options import FitOptions
from atpatch_onnx.fitting.search import Search
from atpatch_onnx.fitting.switchboard import Setting, Switchboard
from atpatch_onnx.graph import fingerprint
from atpatch_onnx.matching import find_sites
from atpatch_onnx.matching.hidden import find_hidden_layers
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.measuring.verify import verify
from atpatch_onnx.patches.patch import LayerEdit, Patch, SitePatch
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
        tuple(site.site for site in patch.sites if site.neutral),
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
    board = Switchboard(model, _detecting(by_name, patch), "logits")
    thresholds = {s.site: s.detector.threshold for s in patch.sites if s.detector}
    redistributing = roles(patch)[1]
    part = planted.debug().split(seed=0).validation
    base = predicted(board.run(part.clean, Setting()).logits)

    def misses(setting: Setting) -> bool:
        sides = (predicted(board.run(side, setting).logits) for side in (part.clean, part.counterfactual))
        return missed(part, base, *sides)

    assert not misses(Setting(thresholds, redistributing))
    for left_out in thresholds:
        assert misses(Setting({s: t for s, t in thresholds.items() if s != left_out}, redistributing)), left_out
    for left_out in redistributing:
        assert misses(Setting(thresholds, tuple(s for s in redistributing if s != left_out))), left_out


def _detecting(by_name: dict[str, AttentionSite], patch: Patch) -> list[tuple[AttentionSite, SitePatch]]:
    """The sites of a patch for a switchboard, on which each one has a detector and a neutral token."""
    detector = next(entry.detector for entry in patch.sites if entry.detector)
    neutral = next(entry.neutral for entry in patch.sites if entry.neutral)
    return [
        (by_name[entry.site], replace(entry, detector=entry.detector or detector, neutral=entry.neutral or neutral))
        for entry in patch.sites
    ]


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
        "robust_accuracy_loss": 0.02,
        "columns_missed": 1.0,
    }
    first, second, third = figures["sites"]
    assert figures["reading"] == "keys"
    assert figures["detectors"] == "linear"
    assert figures["tried"] == [{"detectors": "linear", "shortfalls": []}]
    assert (first["site"], first["detects"], first["redistributes"]) == (planted.sites[0], True, False)
    assert (second["detects"], second["redistributes"]) == (False, True)
    assert first["separation"] == pytest.approx(1.0, abs=1e-3)  # nearly every pair of columns is ranked rightly
    assert first["gap"] > 0 > second["gap"]
    assert first["threshold"] == fitted(planted).sites[0].detector.threshold
    assert set(first["without"]) == {"detect"}
    assert set(second["without"]) == set(third["without"]) == {"redistribute"}
    assert first["without"]["detect"]["remaining"] == 1.0
    assert all(site["without"]["redistribute"]["remaining"] > 0.5 for site in (second, third))


def test_the_neutral_token_is_the_mean_over_clean_inputs():
    planted = Planted()
    neutral, model = fitted(planted).sites[0].neutral, planted.model()
    site = find_sites(model)[1]
    inputs = planted.debug().split(seed=0).fit.clean
    for place, array in ((site.key, neutral.key), (site.value, neutral.value)):
        tokens = run(with_outputs(model, [place.value]), inputs)[place.value]
        mean = tokens.mean(axis=(0, 1), dtype=np.float64).reshape(place.heads, place.depth)
        # float32 numbers, summed in float64; here no token is a sink
        np.testing.assert_allclose(array, mean, rtol=1e-5, atol=1e-6)


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
        ({"detectors": ()}, "option detectors"),
        ({"detectors": ("linear", "linear")}, "option detectors"),
        ({"detectors": ("linear", "deep")}, "option detectors: expected some of 'linear' and 'hidden', each once"),
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
    assert {"finding the suspect tokens", "training detectors, linear", "delta debugging, settings tried"} < set(stages)
    for told in stages.values():
        assert [done for done, _ in told] == sorted({done for done, _ in told})
