"""Several patches as one: in order, of one model, and each where it may stand."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import Net, draw_patch, run
from test_edits import NET, edit, layers, patch_of

from atpatch_onnx import graph
from atpatch_onnx.bake import bake
from atpatch_onnx.composition import compose
from atpatch_onnx.edits import edited
from atpatch_onnx.errors import PatchMismatchError
from atpatch_onnx.patch import LayerEdit, Patch

NUMBERS = st.floats(-4, 4, width=32)


def single(layer: str, factor: float, constant: float) -> LayerEdit:
    return LayerEdit(layer, np.array([2]), np.array([factor], np.float32), np.array([constant], np.float32))


def test_a_single_patch_stays_what_it_is():
    patch = draw_patch(NET.model())
    assert compose([patch]) is patch


@given(first=st.tuples(NUMBERS, NUMBERS), second=st.tuples(NUMBERS, NUMBERS))
def test_the_later_edit_of_a_unit_edits_what_the_earlier_one_made(first, second):
    layer = layers(NET)[0]
    both = compose([patch_of(NET, single(layer, *one)) for one in (first, second)])
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
    both = compose([patch_of(NET, edit(layers(NET)[0], 0)), draw_patch(base)])
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
        (lambda: [draw_patch(NET.model()), draw_patch(Net(mlp=3).model())], "patches of one model"),
    ],
    ids=["none", "one-site-twice", "two-models"],
)
def test_patches_that_do_not_go_together_are_refused(patches, message):
    with pytest.raises(PatchMismatchError, match=message):
        compose(patches())
