"""Suspects, and the columns that detectors are trained on, against naive recomputation."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from planted import HEADS, Planted

from atpatch_onnx.baking.features import choose_features, shares_in_one
from atpatch_onnx.baking.read import features_output, probe, values_output
from atpatch_onnx.debugset import DebugSet, InputSpec
from atpatch_onnx.errors import DebugSetError, FitError, NoSiteError
from atpatch_onnx.fitting import collect as collecting
from atpatch_onnx.fitting.collect import MAX_BENIGN, anomalous_columns, collect, find_suspects, input_specs
from atpatch_onnx.matching import find_sites
from atpatch_onnx.patches.patch import Features
from atpatch_onnx.running.sessions import Session

SHAPES = [
    Planted(form=form, masked=masked, free=free, tokens=12 if masked else 8)
    for form in ("softmax", "attention", "packed")
    for masked in (False, True)
    for free in (False, True)
]


def rounding(found: np.ndarray, expected: np.ndarray) -> None:
    # float32: batches of other sizes may take other kernels; weights in units of the uniform share are up to 12
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("planted", SHAPES, ids=lambda p: f"{p.form}{'-masked' * p.masked}{'-free' * p.free}")
@pytest.mark.parametrize("kind", ["backdoor", "attribute"])
def test_suspects_are_the_planted_positions(planted, kind):
    planted = replace(planted, kind=kind, harm=1.0)
    inputs, labels, positions = planted.inputs(40)
    debug = DebugSet.from_pairs(inputs, planted.changed(inputs, positions), labels, kind=kind)
    model = planted.model()
    found = find_suspects(model, find_sites(model), debug, batch_size=7)
    assert np.array_equal(found.suspects, positions)


def test_a_token_that_holds_little_of_the_trigger_is_no_suspect():
    planted = Planted()
    inputs, labels, positions = planted.inputs(40)
    whole = planted.changed(inputs, positions)
    neighbours = np.roll(positions, 1, axis=1) & ~positions
    change = ((whole["x"] - inputs["x"]) * positions[:, :, None]).sum(axis=1, keepdims=True)  # of each input
    model = planted.model()
    for share, expected in ((0.1, positions), (0.9, positions | neighbours)):
        x = whole["x"] + share * change * neighbours[:, :, None]
        debug = DebugSet.from_pairs(inputs, {"x": x}, labels)
        assert np.array_equal(find_suspects(model, find_sites(model), debug).suspects, expected)


def test_suspects_that_are_given_are_kept():
    planted = Planted()
    debug, model = planted.debug(20, suspects=True), planted.model()
    assert find_suspects(model, find_sites(model), debug) is debug


def test_suspects_of_another_token_axis_are_refused():
    planted = Planted()
    model = planted.model()
    debug = planted.debug(20).with_suspects(np.ones((20, 5), bool))
    with pytest.raises(DebugSetError, match=r"expected 8 token positions, as at site layer0\.attention; found 5"):
        find_suspects(model, find_sites(model), debug)


def test_pairs_whose_values_do_not_differ_have_no_suspects():
    planted = Planted()
    inputs, _, positions = planted.inputs(20)
    changed = {"x": inputs["x"].copy()}
    changed["x"][:, :, -1] += 1e-6  # a feature that no value reads
    assert positions.any()
    model = planted.model()
    with pytest.raises(DebugSetError, match="found none in any pair"):
        find_suspects(model, find_sites(model), DebugSet.from_pairs(inputs, changed))


def test_without_sites_there_is_nowhere_to_look():
    planted = Planted()
    with pytest.raises(NoSiteError):
        find_suspects(planted.model(), (), planted.debug(20))


@pytest.mark.parametrize("kind", ["backdoor", "attribute"])
def test_what_should_be_flagged_on_either_side(kind):
    debug = Planted(kind=kind).debug(20, suspects=True)
    clean, other = anomalous_columns(debug)
    assert np.array_equal(other, debug.suspects)
    assert np.array_equal(clean, debug.suspects if kind == "attribute" else np.zeros_like(debug.suspects))


@pytest.mark.parametrize(
    "planted",
    [
        Planted(),
        Planted(masked=True, free=True),
        Planted(kind="attribute", form="packed"),
        Planted(form="attention", masked=True),
    ],
    ids=["whole", "masked", "attribute", "fused"],
)
def test_columns_are_those_of_a_naive_loop(planted):
    debug, model = planted.debug(30, suspects=True), planted.model()
    kinds = {site: choose_features(site) for site in find_sites(model)}
    session = Session(probe(model, kinds))
    clean, other = session.run(debug.clean), session.run(debug.counterfactual)
    mask = debug.clean.get("mask", np.ones(debug.suspects.shape, int)) == 1
    attribute = debug.kind == "attribute"
    for columns in collect(model, kinds, debug, batch_size=7):
        site = columns.site
        unit = np.float32(shares_in_one(site, kinds[site]))
        rows = [(side[features_output(site)] * unit).transpose(0, 2, 1) for side in (clean, other)]
        marked, plain = debug.suspects, mask & ~debug.suspects
        if attribute:
            rounding(columns.anomalous, np.concatenate([rows[0][marked], rows[1][marked]]))
            assert columns.hard.shape == (0, rows[0].shape[2])
        else:
            rounding(columns.anomalous, rows[1][marked])
            rounding(columns.hard, rows[0][marked])
        wanted = sum(min(MAX_BENIGN, int(count)) for count in plain.sum(axis=1)) * 2
        assert len(columns.benign) == wanted
        everything = np.concatenate([side[plain] for side in rows])
        nearest = np.abs(columns.benign[:, None] - everything[None]).max(axis=2).min(axis=1)
        assert nearest.max() < 1e-4  # each is one of the benign columns; rounding as above

        V = clean[values_output(site)]
        kept = [
            V[b, :, j]
            for b in range(30)
            for j in range(planted.tokens)
            if mask[b, j] and not (attribute and debug.suspects[b, j])
        ]
        assert columns.neutral.shape == (HEADS, planted.depth)
        # float32 values, summed in float64: the mean's rounding is that of float32
        np.testing.assert_allclose(columns.neutral, np.mean(kept, axis=0, dtype=np.float64), rtol=1e-5, atol=1e-6)


def test_the_same_seed_gives_the_same_columns_and_another_other_benign_ones():
    planted = Planted(tokens=12)
    debug, model = planted.debug(20, suspects=True), planted.model()
    kinds = {find_sites(model)[0]: Features.WHOLE}
    (one,), (same,), (other,) = (collect(model, kinds, debug, seed=seed) for seed in (0, 0, 1))
    for name in ("anomalous", "hard", "benign", "neutral"):
        assert np.array_equal(getattr(one, name), getattr(same, name))
    assert np.array_equal(one.anomalous, other.anomalous)
    assert one.benign.shape == other.benign.shape
    assert not np.array_equal(one.benign, other.benign)


def test_whole_columns_are_relative_to_the_uniform_share():
    """Where no noise and no trigger meets the keys the map is uniform: every weight is one share, at any length."""
    for tokens in (5, 11):
        planted = Planted(tokens=tokens, drawn=(2,))
        inputs, labels, positions = planted.inputs(10)
        inputs["x"][:, :, 2 + planted.classes : 5 + planted.classes] = 0
        debug = DebugSet.from_pairs(inputs, planted.changed(inputs, positions), labels, suspects=positions)
        model = planted.model()
        (columns,) = collect(model, {find_sites(model)[0]: Features.WHOLE}, debug)
        assert columns.anomalous.shape == (10, HEADS * tokens)
        for rows in (columns.anomalous, columns.hard, columns.benign):
            np.testing.assert_allclose(rows, 1, rtol=1e-6)  # float32: one over tokens, times tokens


def test_a_full_store_keeps_anomalous_columns(monkeypatch):
    """Clean inputs come first; they must not use up what triggered ones need."""
    planted = Planted()
    debug, model = planted.debug(64, suspects=True), planted.model()
    kinds = {find_sites(model)[1]: Features.WHOLE}
    row = HEADS * planted.tokens * 4
    monkeypatch.setattr(collecting, "MAX_BYTES", 60 * row)
    (columns,) = collect(model, kinds, debug, batch_size=4)
    counts = [len(getattr(columns, name)) for name in ("anomalous", "hard", "benign")]
    assert sum(counts) <= 60
    assert min(counts) >= 15, counts


def test_a_full_store_keeps_benign_columns_of_both_sides(monkeypatch):
    planted = Planted()
    debug, model = planted.debug(64, suspects=True), planted.model()
    site = find_sites(model)[1]
    row = HEADS * planted.tokens * 4
    monkeypatch.setattr(collecting, "MAX_BYTES", 60 * row)
    session = Session(probe(model, {site: Features.WHOLE}))
    sides = [
        {
            column.tobytes()
            for columns in session.collect(inputs, [features_output(site)]).values()
            for column in rows(columns)
        }
        for inputs in (debug.clean, debug.counterfactual)
    ]
    (kept,) = collect(model, {site: Features.WHOLE}, debug, batch_size=4)
    uniform = np.float32(planted.tokens)
    of_clean = [column.tobytes() in sides[0] for column in kept.benign / uniform]
    assert 0 < sum(of_clean) < len(of_clean)


def rows(features: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(features.transpose(0, 2, 1).reshape(-1, features.shape[1]))


def test_maps_of_another_length_than_the_suspects_are_refused():
    planted = Planted(free=True)
    debug, model = planted.debug(20).with_suspects(np.ones((20, 5), bool)), planted.model()
    kinds = dict.fromkeys(find_sites(model), Features.SUMMARY)
    with pytest.raises(
        FitError, match=r"site layer0\.attention: expected 5 keys, as the suspects have positions; found 8"
    ):
        collect(model, kinds, debug)


def test_what_a_debug_set_has_to_bring():
    model = Planted(masked=True, free=True, batch=4).model()
    weight = next(iter(model.graph.initializers.values()))
    model.graph.inputs.append(weight)  # a weight that is listed among the inputs, as before IR version 4
    assert input_specs(model) == {
        "x": InputSpec("x", np.dtype(np.float32), (4, "tokens", 12)),
        "mask": InputSpec("mask", np.dtype(np.int64), (4, "tokens")),
    }
    bare = ir.Model(ir.Graph([ir.Value(name="y")], [], nodes=[]), ir_version=10)
    assert input_specs(bare)["y"].shape == ()


def test_suspects_are_found_without_running_what_lies_behind_the_first_site(monkeypatch):
    planted, built = Planted(), []
    model, construct = planted.model(), Session.__init__

    def counted(self, model, **options):
        built.append((sum(1 for _ in model.graph), [output.name for output in model.graph.outputs]))
        construct(self, model, **options)

    monkeypatch.setattr(Session, "__init__", counted)
    sites = find_sites(model)
    find_suspects(model, sites, planted.debug(20))
    ((nodes, outputs),) = built
    assert outputs == [values_output(sites[0])]
    assert nodes < sum(1 for _ in model.graph) / 3
    assert len(model.graph.outputs) == 1, "the model itself is left as it is"
