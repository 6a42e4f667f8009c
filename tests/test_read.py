"""The probe: what detectors will see, beside the base's own outputs."""

from dataclasses import replace

import numpy as np
import pytest
from models import Net, same_bits
from planted import HEADS, Planted

from atpatch_onnx.baking.features import choose_features, shares_in_one, suitable_features
from atpatch_onnx.baking.functions import LANDMARKS, SUMMARIES
from atpatch_onnx.baking.read import features_output, map_output, probe, values_output
from atpatch_onnx.errors import BakeError
from atpatch_onnx.matching import find_sites
from atpatch_onnx.patches.patch import Features
from atpatch_onnx.running.sessions import Session

FORMS = ("softmax", "attention", "packed")


@pytest.mark.parametrize(
    ("planted", "features"),
    [
        (Planted(), Features.WHOLE),
        (Planted(form="packed"), Features.WHOLE),
        (Planted(masked=True), Features.LANDMARKS),
        (Planted(free=True), Features.LANDMARKS),
        (Planted(form="attention", masked=True), Features.LANDMARKS),
    ],
)
def test_whole_columns_only_where_the_map_has_one_unmasked_size(planted, features):
    assert {choose_features(site) for site in find_sites(planted.model())} == {features}


def test_large_maps_and_who_asks_are_read_at_the_landmarks():
    site = find_sites(Planted().model())[0]
    large = replace(site, queries=500, keys=500)
    assert choose_features(large) is Features.LANDMARKS
    assert suitable_features(replace(large, masked=True)) == (Features.LANDMARKS, Features.SUMMARY)
    for wanted in Features:
        assert choose_features(large, wanted) is wanted
    masked = replace(large, masked=True)
    assert choose_features(masked, Features.LANDMARKS) is Features.LANDMARKS
    for other in (replace(masked, self_attention=False), replace(masked, parts=4)):
        assert choose_features(other, Features.LANDMARKS) is Features.SUMMARY, "rows of which no query is known"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_landmarks_are_rows_of_the_map_in_units_of_the_uniform_share(form, masked):
    planted = Planted(form=form, masked=masked)
    model, (inputs, _, _) = planted.model(), planted.inputs(5)
    sites = find_sites(model)
    found = Session(probe(model, dict.fromkeys(sites, Features.LANDMARKS), maps=sites)).run(inputs)
    for site in sites:
        P = found[map_output(site)]
        share = P * np.count_nonzero(P, axis=-1, keepdims=True)
        features = found[features_output(site)].reshape(5, HEADS, LANDMARKS, planted.tokens)
        for sample in range(5):
            real = np.flatnonzero(inputs["mask"][sample]) if masked else np.arange(planted.tokens)
            rows = real[np.rint(np.linspace(0, len(real) - 1, LANDMARKS)).astype(int)]
            unit = shares_in_one(site, Features.LANDMARKS)
            assert unit == (1 if masked else planted.tokens)
            np.testing.assert_allclose(unit * features[sample], share[sample][:, rows], rtol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("masked", [False, True])
def test_maps_values_and_features_stand_beside_the_bases_outputs(form, masked):
    planted = Planted(form=form, masked=masked)
    model, (inputs, _, _) = planted.model(), planted.inputs(5)
    sites = find_sites(model)
    kinds = {sites[0]: Features.WHOLE, sites[1]: Features.SUMMARY}
    found = Session(probe(model, kinds, maps=sites[1:])).run(inputs)
    assert same_bits(found.pop("logits"), Session(model).run(inputs)["logits"])
    shapes = {name: array.shape for name, array in found.items()}
    assert shapes == {
        features_output(sites[0]): (5, HEADS * planted.tokens, planted.tokens),
        values_output(sites[0]): (5, HEADS, planted.tokens, planted.depth),
        features_output(sites[1]): (5, HEADS * len(SUMMARIES), planted.tokens),
        values_output(sites[1]): (5, HEADS, planted.tokens, planted.depth),
        map_output(sites[1]): (5, HEADS, planted.tokens, planted.tokens),
        map_output(sites[2]): (5, HEADS, planted.tokens, planted.tokens),
    }
    maps = found[map_output(sites[1])]
    # float32 rounding of a softmax over eight keys
    np.testing.assert_allclose(maps.sum(axis=-1), 1, atol=1e-6)
    if masked:
        assert (maps.transpose(0, 3, 1, 2)[inputs["mask"] == 0] == 0).all()


def test_the_trigger_is_drawn_to_where_it_is_planted():
    planted = Planted(drawn=(1,))
    model, (inputs, _, positions) = planted.model(), planted.inputs(20)
    sites = find_sites(model)
    session = Session(probe(model, {}, maps=sites))
    for site in sites:
        before, after = (
            session.run(side)[map_output(site)].mean(axis=(1, 2))[positions].mean()
            for side in (inputs, planted.changed(inputs, positions))
        )
        # e^8 against seven keys of about e^0; elsewhere nothing changes but rounding
        assert after > 0.9 if site.index == 1 else after == pytest.approx(before, abs=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_summaries_of_real_tokens_do_not_change_when_a_sequence_is_lengthened(form):
    planted = Planted(form=form, masked=True, free=True, tokens=11)
    model, (inputs, _, _) = planted.model(), planted.inputs(9)
    kinds = dict.fromkeys(find_sites(model), Features.SUMMARY)
    session = Session(probe(model, kinds))
    real = inputs["mask"] == 1
    assert (real.sum(axis=1) < 11).any()
    longer = {
        # what stands at padded positions must not matter either
        "x": np.concatenate([inputs["x"], np.full((9, 6, planted.width), 3, np.float32)], axis=1),
        "mask": np.concatenate([inputs["mask"], np.zeros((9, 6), np.int64)], axis=1),
    }
    short, long = session.run(inputs), session.run(longer)
    for site in kinds:
        name = features_output(site)
        before, after = (array.transpose(0, 2, 1) for array in (short[name], long[name]))
        # float32 rounding: sums over 17 instead of 11 positions are added in another order; shares are up to 11
        np.testing.assert_allclose(after[:, :11][real], before[real], rtol=2e-5, atol=2e-5)
        assert (after[:, 11:] == 0).all()  # a column that no query sees has no features
        assert (before[~real] == 0).all()


def test_summaries_do_not_change_with_batch_mates():
    planted = Planted(masked=True, free=True, tokens=11)
    model, (inputs, _, _) = planted.model(), planted.inputs(6)
    kinds = dict.fromkeys(find_sites(model), Features.SUMMARY)
    session = Session(probe(model, kinds))
    together = session.run(inputs)
    for row in range(6):
        length = int(inputs["mask"][row].sum())
        alone = session.run({name: array[[row], :length] for name, array in inputs.items()})
        for site in kinds:
            name = features_output(site)
            # float32 rounding: fewer positions, added in another order
            np.testing.assert_allclose(together[name][row, :, :length], alone[name][0], rtol=2e-5, atol=2e-5)


def test_a_model_of_an_old_opset_is_refused():
    model = Net(opset=15).model()
    sites = find_sites(model)
    model.graph.opset_imports[""] = 14
    with pytest.raises(BakeError, match="opset 15 or later"):
        probe(model, dict.fromkeys(sites, Features.SUMMARY))
