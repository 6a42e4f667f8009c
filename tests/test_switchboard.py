"""The switchboard: switched off it is the base; under a setting it is what gets baked."""

from dataclasses import replace

import numpy as np
import pytest
from models import draw_site_patch, same_bits
from planted import Planted

from atpatch_onnx.baking.bake import bake
from atpatch_onnx.fitting.switchboard import Setting, Switchboard
from atpatch_onnx.graph import fingerprint
from atpatch_onnx.matching import find_sites
from atpatch_onnx.patches.patch import Patch
from atpatch_onnx.running.sessions import Session

CASES = [
    (Planted(), "linear"),
    (Planted(masked=True, free=True, tokens=12), "hidden"),
    (Planted(form="attention"), "hidden"),
    (Planted(form="packed", masked=True), "linear"),
]


def ids(case: tuple[Planted, str]) -> str:
    planted, kind = case
    return f"{planted.form}{'-masked' * planted.masked}-{kind}"


@pytest.fixture(params=CASES, ids=ids)
def case(request):
    planted, kind = request.param
    model = planted.model()
    rng = np.random.default_rng(0)
    entries = [(site, draw_site_patch(site, rng, threshold=0.0, kind=kind)) for site in find_sites(model)]
    return model, entries, Switchboard(model, entries, "logits"), planted.inputs(40)[0]


def some_threshold(scores: np.ndarray, share: float = 0.1) -> float:
    """A threshold in the widest gap around the given share of scores: no flag hangs by a rounding error."""
    values = np.unique(scores)
    at = int(len(values) * (1 - share))
    around = np.diff(values[at - 10 : at + 10])
    best = at - 10 + int(around.argmax())
    return float((values[best] + values[best + 1]) / 2)


def test_with_everything_off_it_is_the_base(case):
    model, entries, board, inputs = case
    result = board.run(inputs, Setting())
    assert same_bits(result.logits, Session(model).collect(inputs)["logits"])
    assert not result.flags.any()
    assert set(result.margins) == {site.name for site, _ in entries}
    assert all(np.isneginf(margin).all() for margin in result.margins.values())


def test_flags_without_redistribution_leave_the_base_as_it_is(case):
    model, _, board, inputs = case
    result = board.run(inputs, Setting(thresholds={"layer1.attention": 0.0}))
    assert result.flags.any()
    assert same_bits(result.logits, Session(model).collect(inputs)["logits"])


def test_scores_are_those_of_the_base(case):
    model, _, board, inputs = case
    result = board.scores(inputs)
    assert same_bits(result.logits, Session(model).collect(inputs)["logits"])
    for name, margin in result.margins.items():
        alone = board.run(inputs, Setting(thresholds={name: 0.25})).margins
        # float32 rounding of one subtraction, of scores of the size of ten
        np.testing.assert_allclose(alone[name], margin - np.float32(0.25), atol=1e-5)


def test_what_a_setting_flags_of_the_scores_is_what_a_run_flags_at_the_first_site(case):
    _, entries, board, inputs = case
    name = entries[0][0].name
    scores = board.scores(inputs).margins
    setting = Setting({name: some_threshold(scores[name])}, tuple(site.name for site, _ in entries))
    flags = board.run(inputs, setting).flags
    assert 0 < flags.mean() < 1
    assert np.array_equal(setting.flags(scores), flags)
    assert not Setting().flags(scores).any()


SETTINGS = [
    {"detect": (0,), "redistribute": (0, 1, 2)},
    {"detect": (1,), "redistribute": (2,)},
    {"detect": (0, 2), "redistribute": (1, 2)},
    {"detect": (2,), "redistribute": (2,)},
]


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_a_setting_does_what_the_baked_patch_does(case, setting):
    """The search tries exactly what will be served."""
    model, entries, board, inputs = case
    raw = board.scores(inputs).margins
    names = [site.name for site, _ in entries]
    thresholds = {names[i]: float(np.float32(some_threshold(raw[names[i]]))) for i in setting["detect"]}
    redistributing = tuple(names[i] for i in setting["redistribute"])
    result = board.run(inputs, Setting(thresholds, redistributing))
    chosen = []
    for site, entry in entries:
        detector = None
        if site.name in thresholds:
            detector = replace(entry.detector, threshold=thresholds[site.name])
        neutral = entry.neutral if site.name in redistributing else None
        if detector or neutral:
            chosen.append(replace(entry, detector=detector, neutral=neutral))
    patch = Patch(fingerprint(model), tuple(chosen))
    baked = Session(bake(model, patch, conditional=True, site_flags=True)).collect(inputs)
    last = [name for name in baked if name.endswith("/flags")][-1]
    assert result.flags.any()
    assert not result.flags.all(axis=1).all()
    assert np.array_equal(baked[last], result.flags)
    base = Session(model).collect(inputs)["logits"]
    assert not np.array_equal(result.logits, base)
    # the same nodes in one graph and in the other; an optimizer may fold a constant that is an input there
    np.testing.assert_allclose(baked["logits"], result.logits, rtol=1e-5, atol=1e-5)


def test_flags_are_carried_to_later_sites_only(case):
    model, entries, board, inputs = case
    names = [site.name for site, _ in entries]
    threshold = some_threshold(board.scores(inputs).margins[names[1]])
    base = Session(model).collect(inputs)["logits"]
    before = board.run(inputs, Setting({names[1]: threshold}, (names[0],)))
    assert same_bits(before.logits, base)  # the first site redistributes and has no flags yet
    after = board.run(inputs, Setting({names[1]: threshold}, (names[2],)))
    changed = (after.logits != base).any(axis=1)
    assert changed.any()
    assert not (changed & ~after.flags.any(axis=1)).any()


def test_settings_are_equal_by_what_they_switch_on():
    """The search remembers them."""
    one, other = Setting({"a": 0.5}, ("a",)), Setting({"a": 0.25}, ("a",))
    assert {one: 1, Setting({"a": 0.5}, ("a",)): 2} == {one: 2}
    assert len({one, other, Setting({"a": 0.5})}) == 3
