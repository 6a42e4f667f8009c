"""Suspects, and the keys that detectors are trained on, against naive recomputation."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from models import run
from planted import HEADS, Planted

from atpatch_onnx.baking.maps import map_outputs, with_maps
from atpatch_onnx.baking.probe import key_output, probe, value_output
from atpatch_onnx.debugset import DebugSet, InputSpec
from atpatch_onnx.errors import DebugSetError, FitError, NoSiteError
from atpatch_onnx.fitting import collect as collecting
from atpatch_onnx.fitting.collect import anomalous_columns, collect, find_suspects, input_specs
from atpatch_onnx.fitting.sampled import MAX_BENIGN
from atpatch_onnx.matching import find_sites
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.running.sessions import Session

SHAPES = [
    Planted(form=form, masked=masked, free=free, tokens=12 if masked else 8)
    for form in ("softmax", "attention", "packed")
    for masked in (False, True)
    for free in (False, True)
]


def rounding(found: np.ndarray, expected: np.ndarray) -> None:
    # float32: batches of other sizes may take other kernels
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
    ids=["apart", "masked", "attribute", "fused"],
)
def test_tokens_are_those_of_a_naive_loop(planted):
    debug, model = planted.debug(30, suspects=True), planted.model()
    sites = find_sites(model)
    session = Session(probe(model, sites))
    clean, other = session.run(debug.clean), session.run(debug.counterfactual)
    attribute = debug.kind == "attribute"
    for tokens in collect(model, sites, debug, batch_size=7):
        keys = [side[key_output(tokens.site)] for side in (clean, other)]
        marked, plain = debug.suspects, ~debug.suspects
        if attribute:
            rounding(tokens.anomalous, np.concatenate([keys[0][marked], keys[1][marked]]))
            assert tokens.hard.shape == (0, HEADS * planted.depth)
        else:
            rounding(tokens.anomalous, keys[1][marked])
            rounding(tokens.hard, keys[0][marked])
        wanted = sum(min(MAX_BENIGN, int(count)) for count in plain.sum(axis=1)) * 2
        assert len(tokens.benign) == wanted
        everything = np.concatenate([side[plain] for side in keys])
        nearest = np.abs(tokens.benign[:, None] - everything[None]).max(axis=2).min(axis=1)
        assert nearest.max() < 1e-4  # each is one of the benign tokens; rounding as above

        kept = np.ones_like(marked) if not attribute else plain
        kept &= ~unseen_or_sinks(model, tokens.site, debug.clean)
        assert tokens.left_out == (~kept & (plain if attribute else True)).sum()
        for output, neutral in ((key_output, tokens.neutral.key), (value_output, tokens.neutral.value)):
            array = clean[output(tokens.site)]
            rows = [array[b, j] for b in range(30) for j in range(planted.tokens) if kept[b, j]]
            assert neutral.shape == (HEADS, planted.depth)
            mean = np.mean(rows, axis=0, dtype=np.float64).reshape(neutral.shape)
            # float32 numbers, summed in float64: the mean's rounding is that of float32
            np.testing.assert_allclose(neutral, mean, rtol=1e-5, atol=1e-6)


def unseen_or_sinks(model: ir.Model, site: AttentionSite, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Tokens that no query sees, and those that draw four times an even share of a sample's attention, by loops."""
    name = map_outputs([site])[site.name]
    P = run(with_maps(model, [site], []), inputs)[name].astype(np.float64)
    found = np.zeros((len(P), P.shape[3]), bool)
    for b in range(len(P)):
        drawn = P[b].mean(axis=(0, 1))
        found[b] = (drawn == 0) | (drawn > 4 / (drawn > 0).sum())
    return found


def test_padding_and_sinks_stay_out_of_the_neutral_token():
    """The trigger draws all attention: were it taken for benign, it would be a sink."""
    planted = Planted(masked=True, tokens=12)
    model, debug = planted.model(), planted.debug(30, suspects=True)
    site = find_sites(model)[1]
    swapped = DebugSet.from_pairs(
        {name: debug.counterfactual[name] for name in ("x", "mask")},
        {"x": debug.clean["x"], "mask": debug.clean["mask"]},
        suspects=np.zeros_like(debug.suspects) | (np.arange(12) == 0),
    )
    (tokens,) = collect(model, [site], swapped)
    padding = int((debug.clean["mask"] == 0).sum())
    assert tokens.left_out == padding + len(debug)
    trigger = HEADS * [planted.draw * planted.depth**0.5]
    assert (np.abs(tokens.neutral.key[:, 0] - trigger) > 0.9 * planted.draw).all(), "none of the trigger is in it"


def test_the_same_seed_gives_the_same_tokens_and_another_other_benign_ones():
    planted = Planted(tokens=12)
    debug, model = planted.debug(20, suspects=True), planted.model()
    sites = find_sites(model)[:1]
    (one,), (same,), (other,) = (collect(model, sites, debug, seed=seed) for seed in (0, 0, 1))
    for name in ("anomalous", "hard", "benign"):
        assert np.array_equal(getattr(one, name), getattr(same, name))
    for name in ("key", "value"):
        assert np.array_equal(getattr(one.neutral, name), getattr(same.neutral, name))
    assert np.array_equal(one.anomalous, other.anomalous)
    assert one.benign.shape == other.benign.shape
    assert not np.array_equal(one.benign, other.benign)


def test_a_full_store_keeps_anomalous_tokens(monkeypatch):
    """Clean inputs come first; they must not use up what triggered ones need."""
    planted = Planted()
    debug, model = planted.debug(64, suspects=True), planted.model()
    row = HEADS * planted.depth * 4
    monkeypatch.setattr(collecting, "MAX_BYTES", 60 * row)
    (tokens,) = collect(model, find_sites(model)[1:2], debug, batch_size=4)
    counts = [len(getattr(tokens, name)) for name in ("anomalous", "hard", "benign")]
    assert sum(counts) <= 60
    assert min(counts) >= 15, counts


def test_a_full_store_keeps_benign_tokens_of_both_sides(monkeypatch):
    planted = Planted()
    debug, model = planted.debug(64, suspects=True), planted.model()
    other = {"x": debug.counterfactual["x"] + np.float32(0.5)}  # every key of one side differs from all of the other
    debug = DebugSet.from_pairs(debug.clean, other, suspects=debug.suspects)
    site = find_sites(model)[1]
    row = HEADS * planted.depth * 4
    monkeypatch.setattr(collecting, "MAX_BYTES", 60 * row)
    session = Session(probe(model, [site]))
    sides = [
        {key.tobytes() for key in session.run(inputs)[key_output(site)].reshape(-1, HEADS * planted.depth)}
        for inputs in (debug.clean, debug.counterfactual)
    ]
    (kept,) = collect(model, [site], debug, batch_size=len(debug))
    of_clean = [key.tobytes() in sides[0] for key in kept.benign]
    assert all(own or key.tobytes() in sides[1] for own, key in zip(of_clean, kept.benign, strict=True))
    assert 0 < sum(of_clean) < len(of_clean)


def test_another_length_than_that_of_the_suspects_is_refused():
    planted = Planted(free=True)
    debug, model = planted.debug(20).with_suspects(np.ones((20, 5), bool)), planted.model()
    with pytest.raises(
        FitError, match=r"site layer0\.attention: expected 5 tokens, as the suspects have positions; found 8"
    ):
        collect(model, find_sites(model), debug)


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
    assert outputs == [key_output(sites[0]), value_output(sites[0])]
    assert nodes < sum(1 for _ in model.graph) / 3
    assert len(model.graph.outputs) == 1, "the model itself is left as it is"
