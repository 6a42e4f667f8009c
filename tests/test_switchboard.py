"""The trial graph: switched off it is the base; under a setting it is what gets baked."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from models import draw_site_patch, same_bits
from planted import Planted

from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.emission import Emission
from atpatch_onnx.baking.functions import local_functions
from atpatch_onnx.fitting.switchboard import Setting, Trial
from atpatch_onnx.graph import fingerprint, opset_version
from atpatch_onnx.matching import find_sites
from atpatch_onnx.patches.patch import Patch
from atpatch_onnx.running.sessions import Session

CASES = [
    Planted(),
    Planted(masked=True, free=True, tokens=12),
    Planted(form="attention"),
    Planted(form="packed", masked=True),
]


def ids(planted: Planted) -> str:
    return f"{planted.form}{'-masked' * planted.masked}"


@pytest.fixture(params=CASES, ids=ids)
def case(request):
    planted = request.param
    model = planted.model()
    rng = np.random.default_rng(0)
    entries = [(site, draw_site_patch(site, rng, threshold=0.0)) for site in find_sites(model)]
    return model, entries, Trial(model, entries, "logits"), planted.inputs(40)[0]


def some_threshold(scores: np.ndarray, share: float = 0.1) -> float:
    """A threshold in the widest gap around the given share of scores: no flag hangs by a rounding error."""
    values = np.unique(scores[scores > -4])
    at = int(len(values) * (1 - share))
    around = np.diff(values[at - 10 : at + 10])
    best = at - 10 + int(around.argmax())
    return float((values[best] + values[best + 1]) / 2)


def test_with_everything_off_it_is_the_base(case):
    model, entries, trial, inputs = case
    result = trial.run(inputs, Setting())
    assert same_bits(result.logits, Session(model).collect(inputs)["logits"])
    assert not result.flags.any()
    assert set(result.margins) == {site.name for site, _ in entries}
    assert all((margin <= -8).all() for margin in result.margins.values())


def test_flags_without_redistribution_leave_the_base_as_it_is(case):
    model, _, trial, inputs = case
    result = trial.run(inputs, Setting(thresholds={"layer1.attention": 0.0}))
    assert result.flags.any()
    assert same_bits(result.logits, Session(model).collect(inputs)["logits"])


def test_scores_are_those_of_the_base(case):
    model, _, trial, inputs = case
    result = trial.scores(inputs)
    assert same_bits(result.logits, Session(model).collect(inputs)["logits"])
    for name, margin in result.margins.items():
        alone = trial.run(inputs, Setting(thresholds={name: 0.25})).margins
        seen = margin > -4
        # float32 rounding of one subtraction
        np.testing.assert_allclose(alone[name][seen], margin[seen] - np.float32(0.25), atol=1e-6)
        if "mask" in inputs:
            assert np.array_equal(seen, inputs["mask"] == 1)


def test_in_reach_are_other_columns_of_flagged_inputs_only(case):
    _, entries, trial, inputs = case
    name = entries[0][0].name
    scores = trial.scores(inputs).margins[name]
    thresholds = {name: some_threshold(scores, 0.05)}
    lower = some_threshold(scores, 0.5)
    strict = trial.run(inputs, Setting(thresholds)).flags
    wide = trial.run(inputs, Setting(thresholds, reaches={name: thresholds[name] - lower})).flags
    flagged = strict.any(axis=1)
    assert 0 < flagged.mean() < 1
    assert np.array_equal(wide, flagged[:, None] & (scores > lower))
    assert wide.sum() > strict.sum()


SETTINGS = [
    {"detect": (0,), "redistribute": (0, 1, 2)},
    {"detect": (1,), "redistribute": (2,)},
    {"detect": (0, 2), "redistribute": (1, 2)},
    {"detect": (0,), "redistribute": (0, 1, 2), "reach": 0.1},
    {"detect": (2,), "redistribute": (2,)},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_setting_does_what_the_baked_patch_does(case, setting):
    """The search tries exactly what will be served."""
    model, entries, trial, inputs = case
    raw = trial.scores(inputs).margins
    names = [site.name for site, _ in entries]
    thresholds = {names[i]: float(np.float32(some_threshold(raw[names[i]]))) for i in setting["detect"]}
    reaches = dict.fromkeys(thresholds, setting.get("reach", 0.0))
    betas = {names[i]: 0.5 for i in setting["redistribute"]}
    result = trial.run(inputs, Setting(thresholds, betas, reaches))
    chosen = []
    for site, entry in entries:
        detector = None
        if site.name in thresholds:
            detector = replace(entry.detector, threshold=thresholds[site.name], reach=reaches[site.name])
        redistribution = entry.redistribution if site.name in betas else None
        if detector or redistribution:
            chosen.append(replace(entry, detector=detector, redistribution=redistribution))
    patch = Patch(fingerprint(model), tuple(chosen))
    baked = Session(bake(model, patch, emission=Emission.CONDITIONAL, site_flags=True)).collect(inputs)
    last = [name for name in baked if name.endswith("/flags")][-1]
    assert result.flags.any()
    assert not result.flags.all(axis=1).any()
    assert np.array_equal(baked[last], result.flags)
    # the same functions in one graph and in the other; an optimizer may fold a constant that is an input there
    np.testing.assert_allclose(baked["logits"], result.logits, rtol=1e-5, atol=1e-5)


def test_flags_are_carried_to_later_sites_only(case):
    model, entries, trial, inputs = case
    names = [site.name for site, _ in entries]
    threshold = some_threshold(trial.scores(inputs).margins[names[1]])
    base = Session(model).collect(inputs)["logits"]
    before = trial.run(inputs, Setting({names[1]: threshold}, {names[0]: 0.0}))
    assert same_bits(before.logits, base)  # the first site redistributes and has no flags yet
    after = trial.run(inputs, Setting({names[1]: threshold}, {names[2]: 0.0}))
    changed = (after.logits != base).any(axis=1)
    assert changed.any()
    assert not (changed & ~after.flags.any(axis=1)).any()


def test_benign_attention_may_be_a_profile(case):
    """A profile of one number everywhere is that number; another profile does something else."""
    _, entries, trial, inputs = case
    site = entries[0][0]
    thresholds = {site.name: some_threshold(trial.scores(inputs).margins[site.name])}
    even = np.full((site.heads, site.queries if isinstance(site.queries, int) else 1, 1), 0.5, np.float32)
    tilted = even.copy()
    tilted[0] = 0.0
    uniform, as_profile, other = (
        trial.run(inputs, Setting(thresholds, {site.name: beta})).logits for beta in (0.5, even, tilted)
    )
    assert same_bits(uniform, as_profile)
    assert not np.array_equal(uniform, other)


def test_another_arithmetic_may_stand_in(case):
    """`instead` exchanges a function: where Y is selected whatever is flagged, flagged inputs are the base's."""
    model, entries, trial, inputs = case
    name = entries[0][0].name
    setting = Setting({name: some_threshold(trial.scores(inputs).margins[name])}, {name: 0.0})
    unselected = handing_on(local_functions(opset_version(model))["SelectFlagged"], "Y")
    idle = Trial(model, entries, "logits", instead=[unselected]).run(inputs, setting)
    base = Session(model).collect(inputs)["logits"]
    assert idle.flags.any()
    assert same_bits(idle.logits, base)
    assert np.abs(trial.run(inputs, setting).logits - base).max() > 1e-3


def handing_on(function: ir.Function, name: str) -> ir.Function:
    """A function of the same name and inputs that hands this input on."""
    inputs = [ir.Value(name=value.name) for value in function.inputs]
    node = ir.node("Identity", [value for value in inputs if value.name == name])
    graph = ir.Graph(inputs, node.outputs, nodes=[node], opset_imports=function.opset_imports)
    return ir.Function(function.domain, function.name, graph=graph, attributes=[])
