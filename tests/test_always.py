"""A fix that is always on: the tokens of a protected attribute are neutral in every input, and nothing is detected."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
import safetensors
from models import FORMS, Net, draw_patch, run, same_bits
from planted import Planted
from test_bake import tolerance
from test_replace import CLOSE, oracle

import atpatch_onnx as atp
from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.kernels import kernels
from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.errors import FitError, PatchFileError, PatchMismatchError
from atpatch_onnx.measuring.evaluate import evaluate
from atpatch_onnx.patches.patch import Patch, Places

ALWAYS = atp.FitOptions(always=True)
LEANING = Planted(kind="attribute", harm=8.0, drawn=(0,), harmful=(1, 2))
PLACE = 1
"""Where the attribute's token stands."""

NETS = {
    "decomposed": Net(tokens=5),
    "decomposed, grouped": Net(tokens=5, opset=17, heads=4, kv_heads=2),
    "decomposed, fixed batch": Net(tokens=5, batch=3),
    "decomposed, half": Net(tokens=5, half=True),
    "op": Net(tokens=5, opset=23, form="attention"),
    "op, packed": Net(tokens=5, opset=23, form="packed"),
}

nets = pytest.mark.parametrize("net", NETS.values(), ids=NETS.keys())


def marks(*places: int, tokens: int = 5) -> Places:
    found = np.zeros(tokens, np.float32)
    found[list(places)] = 1
    return Places(found)


def always(patch: Patch, *places: int, tokens: int = 5) -> Patch:
    """A drawn patch that names these tokens at its first site, and carries them on."""
    first, *others = patch.sites
    sites = (replace(first, detector=marks(*places, tokens=tokens)), *(replace(one, detector=None) for one in others))
    return replace(patch, sites=sites)


@pytest.fixture(scope="module")
def fixed() -> Patch:
    return atp.fit(LEANING.model(), LEANING.debug(400), ALWAYS)


# Fitting


def test_a_fit_names_the_attributes_token_at_the_first_site_and_makes_it_neutral_at_all(fixed):
    first, *others = fixed.sites
    assert [entry.site for entry in fixed.sites] == list(LEANING.sites)
    assert isinstance(first.detector, Places)
    assert np.flatnonzero(first.detector.marks).tolist() == [PLACE]
    assert all(entry.detector is None for entry in others)
    assert all(entry.neutral is not None for entry in fixed.sites)
    assert fixed.figures["detectors"] == "place"
    assert fixed.figures["meets_target"]
    assert fixed.figures["outcome"]["remaining"] == 0
    assert fixed.figures["outcome"]["recall"] == fixed.figures["outcome"]["precision"] == 1


def test_the_same_fit_gives_the_same_patch(fixed):
    assert atp.fit(LEANING.model(), LEANING.debug(400), ALWAYS).to_bytes() == fixed.to_bytes()


def test_tokens_that_differ_in_some_pairs_are_neutral_in_all():
    """Several attributes at once: each pair changes one of them."""
    debug = LEANING.debug(400)
    suspects = np.zeros((400, LEANING.tokens), bool)
    suspects[:, PLACE], suspects[::3, 4] = True, True
    patch = atp.fit(LEANING.model(), debug.with_suspects(suspects), replace(ALWAYS, force=True))
    assert np.flatnonzero(patch.sites[0].detector.marks).tolist() == [PLACE, 4]


def test_pairs_that_flip_nothing_are_enough():
    """A proof is asked for whether or not a prediction changes on these pairs."""
    planted = replace(LEANING, harm=0.0)
    patch = atp.fit(planted.model(), planted.debug(400), ALWAYS)
    assert np.flatnonzero(patch.sites[0].detector.marks).tolist() == [PLACE]
    with pytest.raises(atp.errors.DebugSetError, match="pairs whose prediction changes"):
        atp.fit(planted.model(), planted.debug(400))


def test_inputs_that_differ_in_length_are_refused():
    planted = replace(LEANING, free=True, masked=True)
    with pytest.raises(FitError, match=r"the same number of tokens in every input.*found as many as the input has"):
        atp.fit(planted.model(), planted.debug(400), ALWAYS)


def test_a_trigger_that_clean_inputs_lack_is_not_fixed_by_places_and_the_fit_says_so():
    planted = Planted()
    with pytest.raises(atp.errors.TargetMissedError, match=r"ASR above floor 100\.00%"):
        atp.fit(planted.model(), planted.debug(400), ALWAYS)


# Baking, held against float64


@nets
def test_the_named_tokens_are_neutral_in_every_input_and_the_rest_is_the_bases_own(net: Net):
    model, feed = net.model(), net.feed(np.random.default_rng(1), batch=3, tokens=5)
    patch = always(draw_patch(model), 1, 3)
    flags = np.zeros((3, 5), bool)
    flags[:, [1, 3]] = True
    wanted = oracle(net, feed, [flags] * net.layers, patch)
    close = tolerance(net) if net.half else CLOSE
    for conditional in (None, *FORMS):
        baked = atp.bake(model, patch, conditional=conditional, site_flags=True)
        for optimize in (True, False):
            found = run(baked, feed, optimize=optimize)
            np.testing.assert_allclose(found["hidden"], wanted, **close)
            assert found["atpatch/flagged"].tolist() == [[True]] * 3
            for site in read_record(baked).sites:
                assert np.array_equal(found[f"atpatch/{site.site}/flags"], flags)


@nets
def test_there_is_no_if_as_it_would_save_nothing(net: Net):
    baked = atp.bake(net.model(), always(draw_patch(net.model()), 1), conditional=True)
    assert not any(node.op_type == "If" for node in baked.graph)
    assert not read_record(baked).conditional


@nets
def test_unbaking_gives_the_base_back_byte_for_byte(net: Net):
    model = net.model()
    unbaked = atp.unbake(atp.bake(model, always(draw_patch(model), 0)))
    assert graphs.to_bytes(unbaked) == graphs.to_bytes(model)


def test_a_batch_of_none_passes():
    net = NETS["decomposed"]
    baked = atp.bake(net.model(), always(draw_patch(net.model()), 1))
    found = run(baked, {"x": np.zeros((0, 5, net.width), np.float32)})
    assert found["hidden"].shape == (0, 5, net.width)
    assert found["atpatch/flagged"].shape == (0, 1)


def test_the_value_of_the_attribute_changes_no_bit(fixed):
    baked, debug = atp.bake(LEANING.model(), fixed), LEANING.debug(60, seed=5)
    before, after = run(baked, debug.clean), run(baked, debug.counterfactual)
    for name, value in before.items():
        assert same_bits(after[name], value), name
    base = [run(LEANING.model(), side)["logits"].argmax(1) for side in (debug.clean, debug.counterfactual)]
    assert (base[0] != base[1]).mean() > 0.2, "the test is about something"


@pytest.mark.parametrize("net", [Net(), Net(tokens=6)], ids=["free", "another number"])
def test_places_of_other_inputs_are_refused(net: Net):
    patch = always(draw_patch(net.model()), 1)
    with pytest.raises(PatchMismatchError, match="5 tokens in each input, as the patch has places"):
        atp.bake(net.model(), patch)


# The file


def test_the_patch_file_holds_the_places(fixed, tmp_path):
    fixed.save(tmp_path / "fix.safetensors")
    again = Patch.load(tmp_path / "fix.safetensors")
    assert again.id == fixed.id
    assert np.array_equal(again.sites[0].detector.marks, fixed.sites[0].detector.marks)


@pytest.mark.parametrize("marks", [[0, 0, 0], [0, 2, 0], [0, np.nan, 1], [[0, 1]]], ids=str)
def test_places_that_mark_nothing_or_something_else_are_refused(marks, fixed, tmp_path):
    first, *others = fixed.sites
    wrong = replace(fixed, sites=(replace(first, detector=Places(np.array(marks, np.float32))), *others))
    (tmp_path / "fix.safetensors").write_bytes(wrong.to_bytes())
    with pytest.raises(PatchFileError):
        Patch.load(tmp_path / "fix.safetensors")


# Proving, measuring, serving


@pytest.fixture(scope="module")
def patched(fixed) -> ir.Model:
    return atp.bake(LEANING.model(), fixed)


def test_verify_passes_and_says_what_was_read_from_the_file(patched, fixed):
    found = atp.verify(LEANING.model(), patched, LEANING.debug(40, seed=3), patch=fixed)
    assert found.passed, found.failures
    assert any(check.name.startswith("scores at layer0.attention") for check in found.checks)


def tampered(patched: ir.Model, name: str, array: np.ndarray) -> ir.Model:
    model = graphs.copy(patched)
    model.graph.initializers[name].const_value = ir.tensor(array.astype(np.float32), name=name)
    return model


@pytest.mark.parametrize("places", [[2], [0, PLACE], []], ids=str)
def test_other_places_in_the_file_are_found(places, patched, fixed):
    other = np.zeros((1, LEANING.tokens, 1))
    other[0, places] = 1
    found = atp.verify(LEANING.model(), tampered(patched, "atpatch/layer0.attention/places", other), patch=fixed)
    assert {check.name for check in found.failures} >= {"parameters"}


def test_a_place_that_is_half_marked_is_found_without_the_patch_as_well(patched):
    other = np.full((1, LEANING.tokens, 1), 0.25)
    found = atp.verify(LEANING.model(), tampered(patched, "atpatch/layer0.attention/places", other))
    assert not found.passed


def test_the_evaluation_counts_all_places_in_every_pair(fixed):
    """Pairs that change one of several attributes: the tokens of the others are no false flags."""
    both = replace(fixed, sites=(replace(fixed.sites[0], detector=marks(PLACE, 4, tokens=8)), *fixed.sites[1:]))
    debug = LEANING.debug(80, seed=4)
    suspects = np.zeros((80, LEANING.tokens), bool)
    suspects[:, PLACE], suspects[::2, 4] = True, True
    found = evaluate(LEANING.model(), atp.bake(LEANING.model(), both), debug.with_suspects(suspects))
    assert found.clean_flag_rate.value == 0
    assert found.columns.precision.value == found.columns.recall.value == 1
    assert found.fairness.uf_patched.value == 0 < found.fairness.uf_base.value


def test_a_session_switches_it_off_and_swaps_its_places(fixed, tmp_path):
    path = tmp_path / "patched.onnx"
    atp.save(atp.bake(LEANING.model(), fixed), path)
    debug = LEANING.debug(20, seed=6)
    first, *others = fixed.sites
    other = replace(fixed, sites=(replace(first, detector=marks(4, tokens=8)), *others))
    with atp.PatchedSession(path) as session:
        live = session.run(["logits"], dict(debug.clean))[0]
        for site in LEANING.sites:
            session.disable(site)
        base = run(LEANING.model(), debug.clean)["logits"]
        assert same_bits(session.run(["logits"], dict(debug.clean))[0], base)
        for site in LEANING.sites:
            session.enable(site)
        assert same_bits(session.run(["logits"], dict(debug.clean))[0], live)
        session.swap(other)
        wanted = run(atp.bake(LEANING.model(), other), debug.clean)["logits"]
        assert same_bits(session.run(["logits"], dict(debug.clean))[0], wanted)


def test_it_stands_beside_a_site_that_detects():
    """Flags are carried: a later site may name others by their keys. What it names depends on them: no proof then."""
    model = Net(tokens=5).model()
    drawn = draw_patch(model)
    both = replace(drawn, sites=(replace(drawn.sites[0], detector=marks(1)), drawn.sites[1]))
    feed = Net(tokens=5).feed(np.random.default_rng(0), 3, 5)
    found = run(atp.bake(model, both, site_flags=True), feed)
    first, second = (found[f"atpatch/{entry.site}/flags"] for entry in both.sites)
    assert first[:, 1].all()
    assert second[:, 1].all()
    failures = atp.verify(model, atp.bake(model, both)).failures
    assert [check.name for check in failures] == ["no path"]


def test_its_cost_is_counted_although_no_input_decides_it(fixed):
    """Marks spread over the samples and held against a threshold; then flags, and keys and values that are replaced."""
    first, *others = kernels(atp.bake(LEANING.model(), fixed)).sites
    assert (first.detecting, first.carrying) == (2, 0)
    assert all((site.detecting, site.carrying) == (0, 0) for site in others)
    assert all(site.redistributing == 3 for site in (first, *others))


def test_the_file_says_what_its_detector_goes_by(fixed, tmp_path):
    path = tmp_path / "fix.safetensors"
    fixed.save(path)
    with safetensors.safe_open(path, framework="numpy") as file:
        assert file.get_tensor("0/places").tolist() == [0, 1, 0, 0, 0, 0, 0, 0]
        assert '"detects": "place"' in file.metadata()["atpatch"]
