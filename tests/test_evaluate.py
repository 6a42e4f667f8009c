"""Every figure of an evaluation, recomputed from raw runs with naive loops and scikit-learn."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from models import run, with_outputs, with_threshold
from planted import ATTRIBUTE, TRIGGER, Planted, fitted
from scipy.special import softmax
from sklearn.metrics import auc, average_precision_score, confusion_matrix, precision_recall_curve

from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.errors import DebugSetError, PatchMismatchError, UnbakeError
from atpatch_onnx.measuring.evaluate import CURVE_POINTS, Curve, Evaluation, evaluate
from atpatch_onnx.running.metrics import Rate

PAIRS = 300


def pairs(planted: Planted, *, wrong_labels: float = 0.1, **options: object) -> DebugSet:
    """Pairs of every class, some with a label that the model cannot guess."""
    inputs, labels, positions = planted.inputs(PAIRS, seed=31)
    rng = np.random.default_rng(3)
    labels = np.where(rng.random(PAIRS) < wrong_labels, rng.integers(planted.classes, size=PAIRS), labels)
    if planted.kind == "attribute":  # in every input the same: so that its keys differ all the same
        inputs["x"][:, 1, TRIGGER] = rng.uniform(0.8, 1, PAIRS)
    options = {"kind": planted.kind, "suspects": positions, **options}
    return DebugSet.from_pairs(inputs, planted.changed(inputs, positions), labels, **options)


class Raw:
    """Both models on both sides, run by onnxruntime without the package."""

    def __init__(self, model, patched, debug: DebugSet) -> None:
        record = read_record(patched)
        margins = [site.margin for site in record.sites if site.margin]
        flags = f"atpatch/{record.sites[-1].site}/flags"
        seen = with_outputs(patched, margins)
        self.base, self.patched, self.flags, self.scores = {}, {}, {}, {}
        for side in ("clean", "counterfactual"):
            feed = dict(getattr(debug, side))
            self.base[side] = run(model, feed)["logits"]
            outputs = run(seen, feed)
            self.patched[side] = outputs["logits"]
            self.flags[side] = outputs[flags]
            self.scores[side] = np.max([outputs[margin][..., 0] for margin in margins], axis=0)


def middle(scores: np.ndarray) -> float:
    """The middle of the widest gap between the most usual largest scores of inputs: it divides them in two parts."""
    values = np.sort(scores.max(axis=1))
    low = len(values) // 3
    at = low + int(np.diff(values[low:-low]).argmax())
    return float((values[at] + values[at + 1]) / 2)


def share(hits: list[bool], found: Rate) -> None:
    assert found.count == len(hits)
    assert found.value == pytest.approx(sum(hits) / len(hits), abs=1e-12)  # float64 rounding
    assert found.low <= found.value <= found.high


@pytest.fixture(scope="module")
def backdoor() -> tuple[DebugSet, Raw, Evaluation]:
    """A patch that misses some triggers and flags some clean inputs, so that no figure is trivial."""
    planted = Planted(drawn=(0,), harmful=(1, 2))
    model, debug = planted.model(), pairs(planted, target=planted.target)
    patch = fitted(planted)
    scores = Raw(model, bake(model, patch, site_flags=True), debug).scores
    patch = with_threshold(patch, 0, patch.sites[0].detector.threshold + middle(scores["counterfactual"]))
    patched = bake(model, patch, site_flags=True)
    return debug, Raw(model, patched, debug), evaluate(model, patched, debug, batch_size=64)


def test_accuracy_and_flags(backdoor):
    debug, raw, found = backdoor
    labels, clean = debug.labels, raw.flags["clean"]
    assert found.inputs == PAIRS
    share([p.argmax() == y for p, y in zip(raw.base["clean"], labels, strict=True)], found.accuracy_base)
    share([p.argmax() == y for p, y in zip(raw.patched["clean"], labels, strict=True)], found.accuracy_patched)
    share([row.any() for row in clean], found.clean_flag_rate)
    same = [a.tobytes() == b.tobytes() for a, b in zip(raw.base["clean"], raw.patched["clean"], strict=True)]
    share([not s for s in same], found.clean_changed)
    assert found.clean_bit_identical
    assert all(s or row.any() for s, row in zip(same, clean, strict=True))


def test_what_is_left_of_the_backdoor(backdoor):
    debug, raw, found = backdoor
    target, labels = debug.target, debug.labels
    before, after = (side["counterfactual"].argmax(axis=1) for side in (raw.base, raw.patched))
    clean = raw.base["clean"].argmax(axis=1)
    others = [i for i in range(PAIRS) if labels[i] != target]
    assert len(others) < PAIRS
    assert found.backdoor.target == target
    share([before[i] == target for i in others], found.backdoor.asr_base)
    share([after[i] == target for i in others], found.backdoor.asr_patched)
    share([clean[i] == target for i in others], found.backdoor.asr_floor)
    share([after[i] == target for i in others if clean[i] != target], found.backdoor.asr_above_floor)
    share(list(before == labels), found.backdoor.robust_accuracy_base)
    share(list(after == labels), found.backdoor.robust_accuracy_patched)
    lost = found.backdoor.robust_accuracy_lost
    assert lost.value == pytest.approx(
        np.mean([int(clean[i] == labels[i]) - int(after[i] == labels[i]) for i in others])
    )
    assert lost.low < lost.value < lost.high
    assert found.backdoor.asr_base.value > 0.9
    assert 0.1 < found.backdoor.asr_above_floor.value < 0.9  # as the raised threshold was meant to
    assert found.backdoor.asr_floor.value > 0
    assert found.fairness is None


@pytest.mark.parametrize("level", ["columns", "input_level"])
def test_detection(backdoor, level):
    debug, raw, found = backdoor
    wanted = np.concatenate([debug.suspects & False, debug.suspects])
    flags = np.concatenate([raw.flags["clean"], raw.flags["counterfactual"]])
    scores = np.concatenate([raw.scores["clean"], raw.scores["counterfactual"]])
    assert np.array_equal(flags, scores > 0)  # carried flags are those of the only detecting site
    if level == "input_level":
        wanted, flags, scores = wanted.any(axis=1), flags.any(axis=1), scores.max(axis=1)
    wanted, flags, scores = wanted.ravel(), flags.ravel(), scores.ravel()
    detection = getattr(found, level)
    share([bool(w) for w, f in zip(wanted, flags, strict=True) if f], detection.precision)
    share([bool(f) for w, f in zip(wanted, flags, strict=True) if w], detection.recall)
    check_curve(detection.curve, wanted, scores)


def check_curve(curve: Curve, wanted: np.ndarray, scores: np.ndarray) -> None:
    assert len(curve.precision) == len(curve.recall) <= CURVE_POINTS
    assert (curve.precision[0], curve.recall[0]) == (pytest.approx(wanted.mean()), 1.0)  # everything flagged
    assert (curve.precision[-1], curve.recall[-1]) == (1.0, 0.0)  # nothing flagged, by definition
    assert list(curve.recall) == sorted(curve.recall, reverse=True)
    precision, recall, _ = precision_recall_curve(wanted, scores)
    points = set(zip(precision.tolist(), recall.tolist(), strict=True))
    assert set(zip(curve.precision, curve.recall, strict=True)) <= points
    assert curve.average_precision == average_precision_score(wanted, scores)
    # the points kept draw the same curve: its area differs by less than a step between them
    assert auc(curve.recall, curve.precision) == pytest.approx(auc(recall, precision), abs=0.02)


def test_it_comes_to_four_figures(backdoor, attribute):
    (_, _, found), (_, _, other) = backdoor, attribute
    attack, lost = found.backdoor, 100 * found.accuracy_lost.value
    assert str(found) == (
        f"ASR {attack.asr_base.value:.2%}, patched {attack.asr_above_floor.value:.2%} above floor, accuracy lost"
        f" {lost:+.2f} points, clean inputs flagged {found.clean_flag_rate.value:.2%}"
    )
    assert str(other).startswith(
        f"UF {other.fairness.uf_base.value:.2%}, patched {other.fairness.uf_patched.value:.2%}, "
    )
    assert str(other).endswith(f" points, clean inputs changed {other.clean_changed.value:.2%}")


def test_the_result_is_plain_json(backdoor):
    shown = backdoor[2].to_json()
    assert json.loads(json.dumps(shown, allow_nan=False)).keys() == shown.keys()
    assert shown["backdoor"]["asr_base"].keys() == {"value", "low", "high", "count"}
    assert shown["fairness"] is None


@pytest.fixture(scope="module")
def attribute() -> tuple[DebugSet, Raw, Evaluation]:
    planted = Planted(kind="attribute", harm=1.0)
    model = planted.model()
    sensitive = planted.inputs(PAIRS, seed=31)[0]["x"][:, 1, ATTRIBUTE]
    debug = pairs(planted, sensitive=sensitive)
    patch = fitted(planted)
    scores = Raw(model, bake(model, patch, site_flags=True), debug).scores
    patch = with_threshold(patch, 0, patch.sites[0].detector.threshold + middle(scores["counterfactual"]))
    patched = bake(model, patch, site_flags=True)
    return debug, Raw(model, patched, debug), evaluate(model, patched, debug)


def test_what_is_left_of_the_unfairness(attribute):
    debug, raw, found = attribute
    assert found.backdoor is None
    for name, logits in (("base", raw.base), ("patched", raw.patched)):
        clean, other = (logits[side].argmax(axis=1) for side in ("clean", "counterfactual"))
        share([a != b for a, b in zip(clean, other, strict=True)], getattr(found.fairness, f"uf_{name}"))
        confidence = [softmax(logits[side].astype(np.float64), axis=1) for side in ("clean", "counterfactual")]
        gap = np.mean([np.abs(a - b).max() for a, b in zip(*confidence, strict=True)])
        # float64 rounding of two ways to write a softmax
        assert getattr(found.fairness, f"confidence_gap_{name}") == pytest.approx(gap, abs=1e-12)
        parity, odds = group_differences(debug, clean)
        for metric, value in (("demographic_parity", parity), ("equalized_odds", odds)):
            difference = getattr(found.fairness, f"{metric}_difference_{name}")
            assert difference.value == pytest.approx(value, abs=1e-12)
            assert difference.low < value < difference.high
    assert 0 < found.fairness.uf_patched.value < found.fairness.uf_base.value


def group_differences(debug: DebugSet, predictions: np.ndarray) -> tuple[float, float]:
    """Demographic parity difference, and equalized odds difference (the larger of both rates' differences)."""
    positive, true_positive, false_positive = [], [], []
    for value in (-1, 1):
        group = debug.sensitive == value
        (tn, fp), (fn, tp) = confusion_matrix(debug.labels[group], predictions[group], labels=[0, 1])
        positive.append((tp + fp) / group.sum())
        true_positive.append(tp / (tp + fn))
        false_positive.append(fp / (fp + tn))
    return np.ptp(positive), max(np.ptp(true_positive), np.ptp(false_positive))


def test_flags_on_the_attribute_are_wanted_on_either_side(attribute):
    debug, raw, found = attribute
    assert raw.flags["clean"].any()
    share(
        [bool((row & ~s).any()) for row, s in zip(raw.flags["clean"], debug.suspects, strict=True)],
        found.clean_flag_rate,
    )
    flags, wanted = np.concatenate([raw.flags["clean"], raw.flags["counterfactual"]]), np.tile(debug.suspects, (2, 1))
    share(list(flags[wanted]), found.columns.recall)


def test_without_groups_there_are_no_group_metrics():
    planted = Planted(kind="attribute", harm=1.0)
    model = planted.model()
    found = evaluate(model, bake(model, fitted(planted)), pairs(planted))
    assert found.fairness.uf_patched.value == 0
    assert found.fairness.demographic_parity_difference_base is None
    assert found.fairness.equalized_odds_difference_patched is None


def test_group_metrics_are_for_two_classes_only():
    """A model of three classes on data of two of them."""
    planted = Planted()
    model = planted.model()
    inputs, labels, positions = planted.inputs(PAIRS, seed=31)
    debug = DebugSet.from_pairs(
        inputs,
        planted.changed(inputs, positions),
        np.minimum(labels, 1),
        kind="attribute",
        suspects=positions,
        sensitive=np.arange(PAIRS) % 2,
    )
    found = evaluate(model, bake(model, fitted(planted)), debug)
    assert found.fairness.uf_base.value > 0
    assert found.fairness.equalized_odds_difference_base is None


def test_suspects_and_target_are_found_where_they_are_not_given(backdoor):
    planted = Planted(drawn=(0,), harmful=(1, 2))
    model, debug = planted.model(), backdoor[0]
    patched = bake(model, fitted(planted))
    given = evaluate(model, patched, debug)
    found = evaluate(model, patched, replace(debug, suspects=None, target=None))
    assert found.backdoor == given.backdoor
    assert found.columns == given.columns


def test_suspects_are_found_on_the_patchs_own_token_axis(monkeypatch):
    """The model's first site may be on another axis than the patch's."""
    planted = Planted()
    model = planted.model()
    patched = bake(model, fitted(planted))
    inspection = sys.modules["atpatch_onnx.measuring.inspect"]
    sites = inspection.find_sites(model)
    asked = []
    find = inspection.find_suspects
    monkeypatch.setattr(inspection, "find_sites", lambda _: (replace(sites[0], token_axis="elsewhere"), *sites[1:]))
    monkeypatch.setattr(
        inspection, "find_suspects", lambda m, s, *rest, **options: (asked.extend(s), find(m, s, *rest, **options))[1]
    )
    evaluate(model, patched, planted.debug(40))
    assert [site.name for site in asked] == list(planted.sites[1:])


def test_another_base_than_the_patched_file_names():
    planted = Planted()
    patched = bake(planted.model(), fitted(planted))
    with pytest.raises(PatchMismatchError, match="the base: expected the model that the patched file names"):
        evaluate(Planted(seed=1).model(), patched, pairs(planted))


@pytest.mark.parametrize("kind", ["backdoor", "attribute"])
def test_without_labels_the_predictions_on_clean_inputs_stand_in_for_them(kind):
    planted = Planted(kind) if kind == "attribute" else Planted()
    model = planted.model()
    patched = bake(model, fitted(planted))
    known = pairs(planted, **({"sensitive": np.arange(PAIRS) % 2} if kind == "attribute" else {}))
    bare = replace(known, labels=None)
    found = evaluate(model, patched, bare)
    predictions = run(model, dict(bare.clean))["logits"].argmax(axis=1)
    against = evaluate(model, patched, replace(known, labels=predictions))
    assert found.accuracy_base.value == 1.0
    assert not found.labelled
    assert against.labelled
    odds = {f"equalized_odds_difference_{when}": None for when in ("base", "patched")}
    fairness = against.fairness and replace(against.fairness, **odds)
    assert replace(found, labelled=True) == replace(against, fairness=fairness), "equalized odds ask for true labels"


def test_no_single_target():
    planted = Planted(kind="attribute", harm=1.0)
    model = planted.model()
    with pytest.raises(DebugSetError, match="--target-class"):
        evaluate(model, bake(model, fitted(planted)), pairs(planted, kind="backdoor"))


def test_a_model_that_is_not_patched():
    model = Planted().model()
    with pytest.raises(UnbakeError):
        evaluate(model, model, pairs(Planted()))


def test_a_file_that_names_no_site():
    planted = Planted()
    model = planted.model()
    patched = bake(model, fitted(planted))
    patched.metadata_props["atpatch.sites"] = "[]"
    with pytest.raises(UnbakeError, match="at least one patched site"):
        evaluate(model, patched, pairs(planted))


def test_a_debug_set_for_another_model():
    planted = Planted()
    model = planted.model()
    with pytest.raises(DebugSetError):
        evaluate(model, bake(model, fitted(planted)), pairs(Planted(tokens=9)))
