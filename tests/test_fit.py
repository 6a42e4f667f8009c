"""The fit on models whose truth is known: which sites can detect, which must redistribute."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from models import run, same_bits, with_outputs
from planted import QUICK, Planted, fitted

from atpatch_onnx.baking.bake import bake
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.fitting.fit import fit
from atpatch_onnx.fitting.goal import Goal
from atpatch_onnx.fitting.options import FitOptions
from atpatch_onnx.fitting.switchboard import Setting, Switchboard
from atpatch_onnx.graph import fingerprint
from atpatch_onnx.matching import find_sites
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.patches.patch import Patch, SitePatch

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


FIT_AGAIN = """
import hashlib
from planted import QUICK, Planted
from atpatch_onnx.fitting.fit import fit
planted = Planted()
print(hashlib.sha256(fit(planted.model(), planted.debug(), QUICK).to_bytes()).hexdigest())
"""


@pytest.mark.slow
def test_the_same_bytes_in_other_processes():
    """Whatever the number of threads and the seed of Python's hashes."""
    digests = set()
    for threads, hash_seed in (("1", "0"), ("2", "1"), ("2", "random")):
        paths = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        environment = {"OMP_NUM_THREADS": threads, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": paths}
        command = [sys.executable, "-c", FIT_AGAIN]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **environment})
        digests.add(done.stdout)
    assert len(digests) == 1, digests


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
        "flags_per_million": None,
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
