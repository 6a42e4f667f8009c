"""Several patches as one: in order, of one model, and each where it may stand."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import Net, draw_patch, run
from test_edits import NET, edit, layers, patch_of

from atpatch_onnx import graph
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.edits import edited
from atpatch_onnx.errors import PatchMismatchError
from atpatch_onnx.patches.compose import compose
from atpatch_onnx.patches.patch import LayerEdit, Patch

NUMBERS = st.floats(-4, 4, width=32)


def single(layer: str, factor: float, constant: float) -> LayerEdit:
    return LayerEdit(layer, np.array([2]), np.array([factor], np.float32), np.array([constant], np.float32))


def test_a_single_patch_stays_what_it_is():
    patch = draw_patch(NET.model())
    assert compose([patch]) is patch


@given(first=st.tuples(NUMBERS, NUMBERS), second=st.tuples(NUMBERS, NUMBERS))
def test_the_later_edit_of_a_unit_edits_what_the_earlier_one_made(first, second):
    layer = layers(NET)[0]
    patches = [
        patch_of(NET, single(layer, *one)).with_figures({"place": place}) for place, one in enumerate((first, second))
    ]
    both = compose(patches)
    (found,) = both.edits
    h = np.float64(1.5)
    expected = (h * first[0] + first[1]) * second[0] + second[1]
    assert h * found.factor[0] + found.constant[0] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_edits_of_several_layers_and_sites_come_together():
    base, (first, second) = NET.model(), layers(NET)
    sites = draw_patch(base)
    one, other = patch_of(NET, edit(second, 4, constant=1)), patch_of(NET, edit(first, 0), edit(second, 1))
    both = compose([one, other, sites])
    assert {entry.layer: entry.units.tolist() for entry in both.edits} == {first: [0], second: [1, 4]}
    assert both.sites == sites.sites
    assert [entry["id"] for entry in both.figures["composed"]] == [one.id, other.id, sites.id]
    feed = NET.feed(np.random.default_rng(0))
    expected = run(edited(base, both.edits), feed)
    for name, array in run(bake(base, [one, other, sites]), feed).items():
        if name in expected:
            np.testing.assert_array_equal(array, expected[name])


def test_a_composition_is_a_patch_like_others(tmp_path):
    base = NET.model()
    both = compose([patch_of(NET, edit(layers(NET)[0], 0)), draw_patch(base, threshold=0.25)])
    both.save(tmp_path / "both.safetensors")
    again = Patch.load(tmp_path / "both.safetensors")
    assert again.id == both.id
    assert graph.fingerprint(bake(base, again)) == graph.fingerprint(bake(base, both))


def test_what_was_fitted_after_another_stands_behind_it():
    neurons = patch_of(NET, edit(layers(NET)[0], 0))
    attention = replace(draw_patch(NET.model()), after=(neurons.id,))
    assert compose([neurons, attention]).after == ()
    for patches in ([attention], [attention, neurons]):
        with pytest.raises(PatchMismatchError, match=f"Give patch {neurons.id} first"):
            compose(patches)


@pytest.mark.parametrize(
    ("patches", "message"),
    [
        (list, "at least one"),
        (lambda: [draw_patch(NET.model()), draw_patch(NET.model(), 1)], "two at "),
        (lambda: [draw_patch(NET.model())] * 2, "expected each once"),
        (
            lambda: [patch_of(NET, single(layers(NET)[0], 3e30, c)) for c in (0.0, 1.0)],
            "edits whose product is a float32",
        ),
        (lambda: [draw_patch(NET.model()), draw_patch(Net(mlp=3).model())], "patches of one model"),
    ],
    ids=["none", "one-site-twice", "one-patch-twice", "overflow", "two-models"],
)
def test_patches_that_do_not_go_together_are_refused(patches, message):
    with pytest.raises(PatchMismatchError, match=message):
        compose(patches())


MET = {"method": "isolation", "meets_target": True, "shortfalls": [], "goal": {"clean_flag_rate": 0.5}}
MISSED = {"meets_target": False, "shortfalls": ["ASR above floor 80.00%"], "goal": {"clean_flag_rate": 0.01}}


def test_patches_that_do_not_know_of_each_other_meet_their_goal_if_all_do():
    attention = draw_patch(NET.model()).with_figures(MISSED)
    neurons = patch_of(NET, edit(layers(NET)[0], 0)).with_figures(MET)
    for patches in ([attention, neurons], [neurons, attention]):
        both = compose(patches)
        assert not both.meets_target
        assert both.figures["shortfalls"] == MISSED["shortfalls"]
        assert both.figures["goal"] == MISSED["goal"], "that of the attention, which live traffic is held against"
        assert "method" not in both.figures


def test_one_that_was_fitted_after_the_others_speaks_for_all():
    neurons = patch_of(NET, edit(layers(NET)[0], 0)).with_figures(MISSED)
    attention = replace(draw_patch(NET.model()).with_figures({"meets_target": True}), after=(neurons.id,))
    assert compose([neurons, attention]).meets_target
