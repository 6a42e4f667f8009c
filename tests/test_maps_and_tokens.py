"""Maps and tokens that do not have an axis each, whole samples or windows: read and replaced as if they had."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
import pytest
from form_nets import DEPTH, HEADS, TOKENS, WIDTH, WINDOW, WINDOWS, Sketch
from models import FORMS, draw_patch, fire_on_some, run, same_bits, with_outputs
from nudge import assert_places, entries
from onnx import TensorProto, helper

from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.reference import attend, attention_map, replaced
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.matching import explain
from atpatch_onnx.measuring.rehearse import rehearse
from atpatch_onnx.measuring.verify import verify

SAMPLES = 3

MAPS_FIRST, TOKENS_FIRST, APART = ("nk", ""), ("kn", ""), ("n", "k", "")

ORDERS = {"maps outer": MAPS_FIRST, "tokens outer": TOKENS_FIRST, "apart": APART}


@dataclass(frozen=True)
class Layer:
    """One site."""

    keys: tuple[str, ...]
    """What the axes of its keys are where they are projected."""

    values: tuple[str, ...]
    cut: Callable[[Sketch, str], str]
    """`[batch, tokens, width]` as maps `[maps, tokens, width]`."""

    joined: Callable[[Sketch, str], str]
    tokens: int
    """Of a map; -1: not fixed."""

    maps: int
    """Of a sample; -1: not fixed."""

    length: tuple[int | str, ...] = (TOKENS,)

    def model(self) -> ir.Model:
        s = Sketch()
        s.nodes.append(helper.make_node("Identity", [self._attend(s)], ["out"], name="node/out"))
        tensor = helper.make_tensor_value_info
        inputs = [tensor("x", TensorProto.FLOAT, ("batch", *self.length, WIDTH))]
        made = helper.make_graph(s.nodes, "rows", inputs, [tensor("out", TensorProto.FLOAT, None)], s.weights)
        model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        return ir.from_proto(model)

    def _attend(self, s: Sketch) -> str:
        x = self.cut(s, "x")
        q, k, v = (self._projected(s, x, axes) for axes in (APART, self.keys, self.values))
        y = s.attend(q, s.transpose(k, 0, 1, 3, 2), v)
        return self.joined(s, s.reshape(s.transpose(y, 0, 2, 1, 3), 0, 0, WIDTH))

    def feed(self, samples: int = SAMPLES, seed: int = 1) -> dict[str, np.ndarray]:
        return {"x": np.random.default_rng(seed).normal(size=(samples, TOKENS, WIDTH)).astype(np.float32)}

    def _projected(self, s: Sketch, x: str, axes: tuple[str, ...]) -> str:
        """`[maps, heads, tokens, depth]`, projected where maps and tokens stand as `axes` says."""
        if axes == APART:
            return s.transpose(s.reshape(s.linear(x), 0, 0, HEADS, DEPTH), 0, 2, 1, 3)
        of_two = s.op("Slice", s.op("Shape", x), s.sizes(0), s.sizes(2))
        if axes == TOKENS_FIRST:
            x = s.transpose(x, 1, 0, 2)
            of_two = s.op("Gather", of_two, s.sizes(1, 0))
        y = s.linear(s.reshape(x, -1, WIDTH))
        y = s.op("Reshape", y, s.op("Concat", of_two, s.sizes(HEADS, DEPTH), axis=0))
        return s.transpose(y, *((0, 2, 1, 3) if axes == MAPS_FIRST else (1, 2, 0, 3)))


def whole(s: Sketch, x: str) -> str:
    return s.op("Identity", x)


def in_fours(s: Sketch, x: str) -> str:
    return s.reshape(x, -1, WINDOW, WIDTH)


def of_four(s: Sketch, y: str) -> str:
    """Joined again: four windows are a sample."""
    return s.reshape(y, -1, WINDOWS * WINDOW, WIDTH)


def in_four(s: Sketch, x: str) -> str:
    """Four windows of a sample, however long."""
    length = s.op("Div", s.op("Shape", x, start=1, end=2), s.sizes(WINDOWS))
    return s.op("Reshape", x, s.op("Concat", s.sizes(-1), length, s.sizes(WIDTH), axis=0))


def joined_four(s: Sketch, y: str) -> str:
    length = s.op("Mul", s.op("Shape", y, start=1, end=2), s.sizes(WINDOWS))
    return s.op("Reshape", y, s.op("Concat", s.sizes(-1), length, s.sizes(WIDTH), axis=0))


CUTS = {
    "whole": (whole, whole, TOKENS, 1, (TOKENS,)),
    "whole, any length": (whole, whole, -1, 1, ("length",)),
    "windows": (in_fours, of_four, WINDOW, WINDOWS, (TOKENS,)),
    "windows, any length": (in_four, joined_four, -1, WINDOWS, ("length",)),
}

LAYERS = {
    f"{cut}; keys {key}, values {value}": Layer(ORDERS[key], ORDERS[value], *CUTS[cut])
    for cut, key, value in itertools.product(CUTS, ORDERS, ORDERS)
    if (key, value) != ("apart", "apart")
}


@dataclass(frozen=True)
class OnAxes(Layer):
    """Windows on a separate axis, `[batch, windows, tokens, width]`, in the map as well."""

    def _attend(self, s: Sketch) -> str:
        q, k, v = (self._projected(s, "x", axes) for axes in (SPREAD, self.keys, self.values))
        return s.attend(q, s.transpose(k, 0, 1, 2, 4, 3), v)

    def feed(self, samples: int = SAMPLES, seed: int = 1) -> dict[str, np.ndarray]:
        (array,) = super().feed(samples, seed).values()
        return {"x": array.reshape(samples, WINDOWS, WINDOW, WIDTH)}

    def _projected(self, s: Sketch, x: str, axes: tuple[str, ...]) -> str:
        """`[batch, windows, heads, tokens, depth]`."""
        y = s.linear(s.transpose(x, *_FORTH[axes]))
        return s.transpose(s.reshape(y, 0, 0, 0, HEADS, DEPTH), *_BACK[axes])


SPREAD, TOKENS_OUTER, BETWEEN = ("n", "n", "k", ""), ("k", "n", "n", ""), ("n", "n", "", "k", "")
"""Tokens between samples and windows are no place: keys stand behind the Transpose then."""

_FORTH = {SPREAD: (0, 1, 2, 3), TOKENS_OUTER: (2, 0, 1, 3), BETWEEN: (0, 2, 1, 3)}
_BACK = {SPREAD: (0, 1, 3, 2, 4), TOKENS_OUTER: (1, 2, 3, 0, 4), BETWEEN: (0, 2, 3, 1, 4)}

LAYERS |= {
    f"windows on an axis of {length}; keys {keys}, values {values}": OnAxes(
        keys, values, whole, whole, tokens, WINDOWS, (WINDOWS, length)
    )
    for length, tokens in ((WINDOW, WINDOW), ("length", -1))
    for keys, values in itertools.product(_FORTH, _FORTH)
}

layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())


@layers
def test_they_are_where_a_site_says(layer: Layer) -> None:
    model = layer.model()
    matches = explain(model)
    assert [miss.reason for miss in matches.near_misses] == []
    (site,) = matches.sites
    assert (site.key.axes, site.value.axes, site.parts) == (layer.keys, layer.values, layer.maps)
    assert isinstance(site.keys, int) == (layer.tokens > 0)
    assert_places(model, layer.feed())


@layers
def test_a_patch_there_is_exact(layer: Layer) -> None:
    result = rehearse(layer.model(), layer.feed(), conditional=(False,))
    assert result.passed, result.failures


@pytest.mark.parametrize("name", [name for name, layer in LAYERS.items() if layer.keys == layer.values])
def test_it_verifies(name: str) -> None:
    layer = LAYERS[name]
    model = layer.model()
    patch = fire_on_some(model, draw_patch(model), layer.feed(12), share=0.02)
    result = verify(model, bake(model, patch), DebugSet.from_pairs(layer.feed(6, 2), layer.feed(6, 3)), batch_size=4)
    assert result.passed, result.failures


NONE = [name for name, layer in LAYERS.items() if TOKENS_FIRST not in (layer.keys, layer.values)]
"""Those whose own sizes hold for no sample: a size of 0 in front of another one is taken for the other."""


@pytest.mark.parametrize("name", NONE)
def test_a_batch_of_none_runs_as_it_does_in_the_base(name: str) -> None:
    _assert_none_is_none(LAYERS[name].model(), LAYERS[name].feed(0))


def _assert_none_is_none(model: ir.Model, feed: dict[str, np.ndarray]) -> None:
    for conditional in FORMS:
        found = run(bake(model, draw_patch(model), conditional=conditional, site_flags=True), feed)
        for output, array in run(model, feed).items():
            assert same_bits(found[output], array)
        assert found["atpatch/flagged"].shape == found["atpatch/score"].shape == (0, 1)
        assert len(found["atpatch/site_0/flags"]) == 0


def _by_map(array: np.ndarray) -> np.ndarray:
    return array.reshape(-1, *array.shape[-3:])


@layers
def test_what_is_flagged_is_neutral_and_all_else_the_bases(layer: Layer) -> None:
    """Against the reference in numpy, with a few tokens flagged and with all."""
    model = layer.model()
    (site,) = explain(model).sites
    patch = draw_patch(model)
    (entry,) = patch.sites
    queries = next(node.inputs[0].name for node in model.graph if node.name == site.nodes[0])
    inner = run(with_outputs(model, [site.key.value, site.value.value, queries]), layer.feed())
    maps = SAMPLES * layer.maps
    K, V = (entries(inner[place.value], place, maps).astype(np.float64) for place in (site.key, site.value))
    scores = entry.detector.scores(K.swapaxes(1, 2).reshape(maps, -1, WIDTH))
    for count in (6, scores.size):
        highest = np.sort(scores, axis=None)[::-1]
        threshold = highest[count - 1] - 1 if count == scores.size else highest[count - 1 : count + 1].mean()
        flags = scores > threshold
        assert flags.sum() == count
        detector = replace(entry.detector, threshold=float(threshold))
        fired = replace(patch, sites=(replace(entry, detector=detector),))
        for conditional in FORMS:
            baked = bake(model, fired, conditional=conditional, site_flags=True)
            found = run(with_outputs(baked, [site.output]), layer.feed())
            assert np.array_equal(found[f"atpatch/{site.name}/flags"], flags.reshape(SAMPLES, TOKENS))
            P = attention_map(_by_map(inner[queries]), replaced(K, flags, entry.neutral.key))
            wanted = attend(P, replaced(V, flags, entry.neutral.value))
            # float32 sums of sixteen products of the size of one
            np.testing.assert_allclose(_by_map(found[site.output]), wanted, atol=1e-5)


@pytest.mark.parametrize("axes", [MAPS_FIRST, TOKENS_FIRST])
def test_all_samples_in_one_sequence_is_one_map(axes: tuple[str, ...]) -> None:
    """Its number is known: the tokens are all there are."""

    def cut(s: Sketch, x: str) -> str:
        return s.reshape(x, 1, -1, WIDTH)

    layer = Layer(axes, APART, cut, of_four, -1, 0)
    model = layer.model()
    (site,) = explain(model).sites
    assert (site.parts, site.value.axes) == (0, APART)
    assert_places(model, layer.feed())
    result = rehearse(model, layer.feed(), conditional=(False,))
    assert result.passed, result.failures


def test_where_neither_maps_nor_tokens_are_counted_it_is_refused() -> None:
    def cut(s: Sketch, x: str) -> str:
        length = s.op("Shape", x, start=2, end=3)
        return s.op("Reshape", x, s.op("Concat", s.sizes(-1), length, s.sizes(WIDTH), axis=0))

    for axes in (MAPS_FIRST, TOKENS_FIRST):
        layer = Layer(axes, APART, cut, whole, -1, -1, ("windows", "length"))
        matches = explain(layer.model())
        assert matches.sites == ()
        (miss,) = matches.near_misses
        assert miss.attention
        assert "its maps and tokens do not have an axis each, and neither" in miss.reason
        apart = replace(layer, keys=APART)
        (site,) = explain(apart.model()).sites
        assert site.key.axes == site.value.axes == APART
        assert site.parts is None
        _assert_none_is_none(apart.model(), {"x": np.zeros((0, WINDOWS, TOKENS // WINDOWS, WIDTH), np.float32)})
