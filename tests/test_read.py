"""How detectors see tokens: by their keys, wherever a tensor holds them, in the graph and in what a fit collects."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from form_nets import FORMS as FORM_NETS
from fused_nets import fused_model
from laid_out import DEPTH, FEATURES, HEADS, MAPS, PLACES, TOKENS, around, laid_out
from models import Net, draw_patch, margins, run, same_bits, with_outputs
from nudge import entries

from atpatch_onnx.baking.probe import key_output, mass_output, probe, value_output
from atpatch_onnx.baking.read import in_order, in_place, own_bias, read_features, read_scores, read_threshold
from atpatch_onnx.errors import BakeError
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.matching import find_sites
from atpatch_onnx.matching.sites import AttentionSite, Place
from atpatch_onnx.measuring.drawn import draw_detector
from atpatch_onnx.running.sessions import Session

ROUNDING = {"rtol": 1e-5, "atol": 1e-5}
"""float32: sums of six products, and of sixteen units, of values of the size of one."""

places = pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
dtypes = pytest.mark.parametrize("dtype", ["FLOAT", "FLOAT16"])
BIAS = np.random.default_rng(9).normal(size=3 * FEATURES).astype(np.float32)


def site_at(place: Place, parts: int = 1) -> AttentionSite:
    return replace(find_sites(Net().model())[0], key=place, parts=parts)


def drawn_keys(dtype: str = "FLOAT") -> np.ndarray:
    keys = np.random.default_rng(0).normal(size=(MAPS, HEADS, TOKENS, DEPTH))
    return keys.astype(ir.DataType[dtype].numpy())


def feed_of(keys: np.ndarray, place: Place, parts: int = 1) -> dict[str, np.ndarray]:
    samples = np.zeros((MAPS // parts, 1), np.float32)
    margin = np.zeros((MAPS, TOKENS, 1), np.float32)
    return {"x": samples, "tensor": laid_out(keys, place, np.random.default_rng(1)), "margin": margin}


def by_token(keys: np.ndarray) -> np.ndarray:
    """`[maps, tokens, features]`, heads first, as a fit collects them."""
    return np.ascontiguousarray(keys.transpose(0, 2, 1, 3).reshape(MAPS, TOKENS, FEATURES))


@places
def test_these_places_hold_what_is_laid_out_there(place: Place) -> None:
    """By another's reading: the tensors of these tests are not read by what made them."""
    keys = drawn_keys()
    assert same_bits(entries(feed_of(keys, place)["tensor"], place, MAPS), keys)


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("parts", [1, 2])
@dtypes
@pytest.mark.parametrize("biased", [False, True], ids=["", "own bias"])
def test_features_are_the_keys_of_each_sample(name: str, parts: int, dtype: str, biased: bool) -> None:
    keys = drawn_keys(dtype)
    wanted = by_token(keys).astype(np.float32)
    place = replace(PLACES[name], dtype=dtype)
    if biased:
        place = replace(place, bias="bias", bias_start=FEATURES)
        wanted += BIAS[FEATURES : 2 * FEATURES]
    model = around(place, ir.DataType[dtype], BIAS if biased else None)
    at = Insertion(model.graph, "site")
    found = read_features(at, site_at(place, parts), place, "read")
    found.dtype = ir.DataType.FLOAT
    model.graph.outputs.append(found)
    (array,) = run(model, feed_of(keys, place, parts)).values()
    assert same_bits(array, wanted.reshape(MAPS // parts, parts * TOKENS, FEATURES))


@places
@dtypes
@pytest.mark.parametrize("kind", ["linear", "hidden"])
@pytest.mark.parametrize("biased", [False, True], ids=["", "own bias"])
def test_scores_are_the_detectors_for_each_token_of_each_map(place: Place, dtype: str, kind: str, biased: bool) -> None:
    keys = drawn_keys(dtype)
    place = replace(place, dtype=dtype)
    seen = by_token(keys).astype(np.float64)
    if biased:
        place = replace(place, bias="bias", bias_start=FEATURES)
        seen += BIAS[FEATURES : 2 * FEATURES]
    model = around(place, ir.DataType[dtype], BIAS if biased else None)
    detector = draw_detector(place, np.random.default_rng(2), kind, threshold=0.25)
    at, site = Insertion(model.graph, "site"), site_at(place)
    scores = in_order(at, site, read_scores(at, place, detector), "scores_in_order")
    threshold = read_threshold(model.graph, place, detector)
    assert (threshold.dtype, threshold.shape) == (np.float32, (1,)), "one weight, which a service may exchange"
    scores.dtype = ir.DataType.FLOAT
    model.graph.outputs.append(scores)
    (array,) = run(model, feed_of(keys, place)).values()
    assert array.shape == (MAPS, TOKENS, 1)
    np.testing.assert_allclose(array[..., 0] - threshold, detector.scores(seen) - 0.25, **ROUNDING)
    assert len(np.unique(array)) == MAPS * TOKENS, "every token has a separate score"


@pytest.mark.parametrize("name", PLACES)
def test_a_batch_of_none_is_read_where_the_number_of_tokens_is_known(name: str) -> None:
    """By it, tokens are told from maps that share an axis with them."""
    keys, place = drawn_keys(), PLACES[name]
    site = replace(site_at(place), keys=TOKENS)
    detector = draw_detector(place, np.random.default_rng(2))
    for samples in (MAPS, 0):
        model = around(place)
        at = Insertion(model.graph, "site")
        features = read_features(at, site, site.key, "read")
        scores = in_order(at, site, read_scores(at, place, detector), "scores_in_order")
        for value in (features, scores):
            value.dtype = ir.DataType.FLOAT
            model.graph.outputs.append(value)
        feed = {key: array[:samples] for key, array in feed_of(keys, place).items()}
        feed["tensor"] = laid_out(keys[:samples], place, np.random.default_rng(1))
        read, scored = run(model, feed, optimize=samples > 0).values()  # its FusedMatMul refuses a batch of none
        assert same_bits(read, by_token(keys)[:samples])
        np.testing.assert_allclose(scored[..., 0], detector.scores(by_token(keys))[:samples], **ROUNDING)
        assert "Shape" not in [node.op_type for node in model.graph]


@places
def test_features_stand_in_their_place_and_nothing_beside_them(place: Place) -> None:
    features = np.arange(1, FEATURES + 1, dtype=np.float32).reshape(HEADS, DEPTH)
    found = in_place(place, features)
    assert found.shape == place.sizes
    assert np.array_equal(found.reshape(-1)[place.columns], features)
    assert np.count_nonzero(found) == FEATURES
    assert place.whole is (found.size == FEATURES)


def test_an_operators_own_bias_is_cut_where_it_is_the_keys() -> None:
    place = PLACES["a projection"]
    graph = around(place, bias=BIAS).graph
    assert own_bias(graph, place) is None
    for start in (0, FEATURES, 2 * FEATURES):
        found = own_bias(graph, replace(place, bias="bias", bias_start=start))
        assert np.array_equal(found, BIAS[start : start + FEATURES].reshape(HEADS, DEPTH))


# Fused operators


FUSED = {
    "own bias": {
        "query": (3, TOKENS, FEATURES),
        "key": (3, TOKENS, FEATURES),
        "value": (3, TOKENS, FEATURES),
        "bias": (3 * FEATURES,),
    },
    "packed": {"query": (3, TOKENS, HEADS, 3, DEPTH)},
    "keys and values packed": {"query": (3, TOKENS, FEATURES), "key": (3, TOKENS, HEADS, 2, DEPTH)},
}


@pytest.mark.parametrize("name", FUSED)
def test_the_probe_hands_out_what_a_fused_operator_attends_with(name: str) -> None:
    rng = np.random.default_rng(4)
    feed = {key: rng.normal(size=shape).astype(np.float32) for key, shape in FUSED[name].items()}
    model = fused_model("MultiHeadAttention", feed, weights=("bias",) if "bias" in feed else (), num_heads=HEADS)
    (site,) = find_sites(model)
    if name == "own bias":
        bias = feed.pop("bias").reshape(3, FEATURES)
        wanted = [feed["key"] + bias[1], feed["value"] + bias[2]]
    else:
        stacked = feed["query"] if name == "packed" else feed["key"]
        first = stacked.shape[3] - 2
        wanted = [stacked[:, :, :, first + which].reshape(3, TOKENS, FEATURES) for which in (0, 1)]
    probed = probe(model, [site])
    names = [value.name for value in probed.graph.inputs]
    found = run(probed, {key: array for key, array in feed.items() if key in names})
    assert same_bits(found[key_output(site)], wanted[0])
    assert same_bits(found[value_output(site)], wanted[1])


@pytest.mark.parametrize("kind", ["linear", "hidden"])
def test_a_patched_operator_with_a_bias_has_the_margins_of_what_it_attends_with(kind: str) -> None:
    rng = np.random.default_rng(5)
    feed = {key: rng.normal(size=shape).astype(np.float32) for key, shape in FUSED["own bias"].items()}
    model = fused_model("MultiHeadAttention", feed, weights=("bias",), num_heads=HEADS)
    (site,) = find_sites(model)
    patch = draw_patch(model, kind=kind, threshold=0.1)
    detector = patch.sites[0].detector
    assert detector is not None
    keys = feed["key"] + feed.pop("bias")[FEATURES : 2 * FEATURES]
    found = margins(model, patch, 0, feed)
    assert found.shape == (3, site.keys)
    np.testing.assert_allclose(found, detector.scores(keys) - 0.1, **ROUNDING)


# The probe


@pytest.mark.parametrize("name", [name for name, form in FORM_NETS.items() if form.parts])
def test_the_probe_hands_out_tokens_sample_by_sample(name: str) -> None:
    """As the tensor has them; a sample's tokens are those of all its parts, one after the other."""
    form = FORM_NETS[name]
    model, feed = form.model(), form.feed(3)
    sites = find_sites(model)
    found = Session(probe(model, sites)).run(feed)
    assert list(found) == [output(site) for site in sites for output in (key_output, value_output)]
    for site in sites:
        names = dict.fromkeys([site.key.value, site.value.value])
        tensors = run(with_outputs(model, list(names), site.dtype), feed)
        tensors |= {key.removesuffix("/seen"): array for key, array in tensors.items()}
        for place, output in ((site.key, key_output), (site.value, value_output)):
            held = entries(tensors[place.value], place, 3 * form.parts).astype(np.float32)
            tokens = held.transpose(0, 2, 1, 3).reshape(3, -1, place.features)
            if form.half:  # where nobody asks for the tensor itself, kernels may hand it on unrounded
                np.testing.assert_allclose(found[output(site)], tokens, rtol=2**-10, atol=2**-10)
            else:
                assert same_bits(found[output(site)], np.ascontiguousarray(tokens))


def test_the_probe_computes_nothing_behind_the_last_site() -> None:
    model = Net(layers=3).model()
    first, second, _ = find_sites(model)
    kept = {node.name for node in probe(model, [first, second]).graph}
    assert "node/layer1/v/sum" in kept
    assert not [name for name in kept if name.startswith(("node/layer2", "node/logits", "node/layer1/map"))]
    assert {"node/logits", "node/layer2/map"} <= {node.name for node in model.graph}, "the model is left alone"


@pytest.mark.parametrize("opset", [15, 18])
def test_masses_are_each_tokens_share_of_all_attention(opset: int) -> None:
    net = Net(opset=opset, bias=True)
    model, feed = net.model(), net.feed(np.random.default_rng(0))
    feed["bias"][..., -1] = np.finfo(np.float32).min
    sites = find_sites(model)
    found = run(probe(model, sites, masses=True), feed)
    maps = run(with_outputs(model, ["layer0/map"]), feed)["layer0/map"]
    np.testing.assert_allclose(found[mass_output(sites[0])], maps.mean(axis=(1, 2)), **ROUNDING)
    for site in sites:
        mass = found[mass_output(site)]
        np.testing.assert_allclose(mass.sum(axis=1), 1, **ROUNDING)
        assert not mass[:, -1].any(), "nobody attends to the last token"


def test_an_op_hands_out_masses_too_and_windows_and_fused_operators_do_not() -> None:
    net = Net(opset=23, form="attention")
    model, feed = net.model(), net.feed(np.random.default_rng(0))
    sites = find_sites(model)
    ops = run(probe(model, sites, masses=True), feed)
    decomposed = Net(opset=23).model()
    others = run(probe(decomposed, find_sites(decomposed), masses=True), feed)
    for site in sites:
        np.testing.assert_allclose(ops[mass_output(site)], others[mass_output(site)], **ROUNDING)
    windows = FORM_NETS["windows in the batch"].model()
    assert {mass_output(site) for site in find_sites(windows)} == {None}
    outputs = probe(windows, find_sites(windows), masses=True).graph.outputs
    assert len(outputs) == 4, "keys and values alone"


def test_a_model_of_an_old_opset_is_refused() -> None:
    model = Net(opset=15).model()
    sites = find_sites(model)
    model.graph.opset_imports[""] = 12
    with pytest.raises(BakeError, match="opset 13 or later"):
        probe(model, sites)
