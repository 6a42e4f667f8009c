"""Examples from a small random net under random patches; pairs differ in their last token."""

import numpy as np
import pytest
from models import ALWAYS, NEVER, Net, draw_patch, fire_on_some, run, with_outputs

from atpatch_onnx.baking.bake import bake
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.errors import DebugSetError, RunError, UnbakeError
from atpatch_onnx.measuring import examples
from atpatch_onnx.measuring.examples import Story, gather_examples
from atpatch_onnx.running.predictions import classes

TOKENS = 6


@pytest.fixture(scope="module")
def net():
    return Net(tokens=TOKENS, layers=2)


@pytest.fixture(scope="module")
def debug(net):
    """Every pair differs in its last token, strongly enough to change some predictions."""
    rng = np.random.default_rng(3)
    clean = net.feed(rng, batch=90, tokens=TOKENS)["x"]
    other = clean.copy()
    other[:, -1] = 6 * rng.normal(size=other[:, -1].shape)
    suspects = np.zeros((90, TOKENS), bool)
    suspects[:, -1] = True
    labels = classes(run(net.model(), {"x": clean})["logits"])
    return DebugSet.from_pairs({"x": clean}, {"x": other}, labels, suspects=suspects, target=0)


def patched(net, threshold=NEVER, **options):
    model = net.model()
    return model, bake(model, draw_patch(model, threshold=threshold, **options))


def firing(net, debug):
    """A patch that flags some columns of some inputs."""
    model = net.model()
    return model, bake(model, fire_on_some(model, draw_patch(model, detects=(True, False)), debug.counterfactual, 0.1))


def test_a_patch_that_never_fires_repairs_nothing(net, debug):
    base, silent = patched(net)
    found = gather_examples(base, silent, debug)
    stories = [example.story for example in found]
    assert stories == [Story.MISSED, Story.UNTOUCHED]
    for example in found:
        assert example.clean.identical
        assert example.counterfactual.identical
        assert example.counterfactual.base == example.counterfactual.patched
        for view in (*example.clean.sites, *example.counterfactual.sites):
            np.testing.assert_array_equal(view.before, view.after)


def test_a_patch_that_always_fires_raises_false_alarms(net, debug):
    base, alarmed = patched(net, ALWAYS)
    stories = {example.story for example in gather_examples(base, alarmed, debug)}
    assert Story.FALSE_ALARM in stories
    assert Story.UNTOUCHED not in stories


def test_an_example_says_what_the_models_say(net, debug):
    base, fixed = firing(net, debug)
    found = gather_examples(base, fixed, debug, count=6)
    assert found
    assert any(example.counterfactual.flags.any() for example in found)
    for example in found:
        assert example.label == debug.labels[example.pair]
        for side, inputs, wanted in (
            (example.clean, debug.clean, []),
            (example.counterfactual, debug.counterfactual, [TOKENS - 1]),
        ):
            sample = {"x": inputs["x"][[example.pair]]}
            np.testing.assert_array_equal(side.inputs["x"], sample["x"][0])
            before, after = run(base, sample)["logits"], run(fixed, sample)["logits"]
            assert side.base.label == classes(before)[0]
            assert side.patched.label == classes(after)[0]
            chance = np.exp(before[0]) / np.exp(before[0]).sum()
            np.testing.assert_allclose(side.base.confidence, chance.max(), rtol=1e-5)  # float32 against float64
            assert list(np.flatnonzero(side.anomalous)) == wanted
            assert len(side.sites) == 2


def test_the_stories_are_true(net, debug):
    base, fixed = firing(net, debug)
    found = gather_examples(base, fixed, debug, count=8)
    assert {example.story for example in found} == set(Story)
    for example in found:
        flips = example.clean.base.label != example.counterfactual.base.label
        still = example.clean.patched.label != example.counterfactual.patched.label
        match example.story:
            case Story.REPAIRED:
                assert flips
                assert not still
            case Story.MISSED:
                assert still
            case Story.FALSE_ALARM:
                assert (example.clean.flags & ~example.clean.anomalous).any()
            case Story.UNTOUCHED:
                assert example.clean.identical
                assert not example.clean.flags.any()


def test_maps_are_the_mean_over_heads_before_and_after(net, debug):
    base, fixed = firing(net, debug)
    example = next(e for e in gather_examples(base, fixed, debug, count=6) if e.counterfactual.flags.any())
    sample = {"x": debug.counterfactual["x"][[example.pair]]}
    for number, view in enumerate(example.counterfactual.sites):
        assert view.before.shape == view.after.shape == (TOKENS, TOKENS)
        for model, shown in ((base, view.before), (fixed, view.after)):
            [map_] = run(with_outputs(model, [f"layer{number}/map"]), sample)[f"layer{number}/map"]
            np.testing.assert_allclose(shown, map_.mean(axis=0), rtol=1e-6)  # the mean is taken in float64
            np.testing.assert_allclose(shown.sum(axis=1), 1, rtol=1e-5)  # float32 sums
    view = example.counterfactual.sites[0]
    flagged = example.counterfactual.flags
    assert np.abs(view.after - view.before)[:, flagged].max() > 0.01
    np.testing.assert_allclose(view.received_before, view.before.mean(axis=0), rtol=1e-5)


def test_padding_neither_receives_nor_counts():
    P = np.zeros((4, 4), np.float32)
    P[:, :2] = 0.5
    P[2:, :2] = (0.9, 0.1)  # rows of padding queries
    view = examples.SiteView("site", P, P)
    np.testing.assert_array_equal(view.visible, [True, True, False, False])
    np.testing.assert_array_equal(view.received_before, [0.5, 0.5, 0, 0])


def test_the_same_pairs_every_time_and_no_more_than_asked(net, debug):
    base, fixed = firing(net, debug)
    for count in (1, 2, 3, 5):
        first, second = (gather_examples(base, fixed, debug, count=count) for _ in range(2))
        assert len(first) <= count
        assert [(e.pair, e.story) for e in first] == [(e.pair, e.story) for e in second]
        assert len({e.pair for e in first}) == len(first)


def test_batches_do_not_matter(net, debug):
    base, fixed = firing(net, debug)
    one, many = (gather_examples(base, fixed, debug, batch_size=size) for size in (1, 64))
    assert [(e.pair, e.story) for e in one] == [(e.pair, e.story) for e in many]


def test_only_the_first_pairs_are_looked_at(net, debug, monkeypatch):
    monkeypatch.setattr(examples, "SCAN", 10)
    base, fixed = firing(net, debug)
    assert all(example.pair < 10 for example in gather_examples(base, fixed, debug, count=50))


def test_suspects_are_found_where_none_are_named(net, debug):
    unnamed = DebugSet.from_pairs(debug.clean, debug.counterfactual, debug.labels, target=0)
    base, fixed = firing(net, debug)
    found = gather_examples(base, fixed, unnamed)
    assert found
    assert all(list(np.flatnonzero(example.counterfactual.anomalous)) == [TOKENS - 1] for example in found)


def test_an_attribute_is_anomalous_on_both_sides(net, debug):
    attribute = DebugSet.from_pairs(debug.clean, debug.counterfactual, suspects=debug.suspects, kind="attribute")
    base, fixed = firing(net, debug)
    found = gather_examples(base, fixed, attribute)
    assert found
    for example in found:
        assert example.label is None
        assert example.clean.anomalous[-1]


def test_files_do_as_well(net, debug, tmp_path):
    from atpatch_onnx import graph

    base, fixed = firing(net, debug)
    graph.save(base, tmp_path / "base.onnx")
    graph.save(fixed, tmp_path / "patched.onnx")
    found = gather_examples(tmp_path / "base.onnx", tmp_path / "patched.onnx", debug)
    assert [e.pair for e in found] == [e.pair for e in gather_examples(base, fixed, debug)]


def test_what_does_not_fit_is_refused(net, debug):
    base, fixed = patched(net)
    with pytest.raises(UnbakeError):
        gather_examples(base, base, debug)
    with pytest.raises(RunError):
        gather_examples(base, fixed, debug, output="nothing")
    wrong = DebugSet.from_pairs({"y": debug.clean["x"]}, {"y": debug.counterfactual["x"]}, debug.labels)
    with pytest.raises(DebugSetError):
        gather_examples(base, fixed, wrong)
