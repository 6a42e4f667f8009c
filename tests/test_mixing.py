"""Talking heads: weights mix the heads of a map, in front of its softmax, behind it, or both."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
from form_nets import DEPTH, HEADS, TOKENS, WIDTH, Form, Sketch, heads_apart, heads_together
from models import run, with_outputs
from nudge import entries

from atpatch_onnx.matching import explain, find_sites
from atpatch_onnx.measuring.rehearse import rehearse

OTHER = 6
"""Heads where their number changes."""


def by_a_product(s: Sketch, x: str, heads: int = HEADS, more: int = HEADS) -> str:
    """As CaiT's linear layer does: heads last, weights, heads back."""
    mixed = s.op("Add", s.op("MatMul", s.transpose(x, 0, 2, 3, 1), s.normal(heads, more)), s.normal(more))
    return s.transpose(mixed, 0, 3, 1, 2)


def by_a_convolution(s: Sketch, x: str, heads: int = HEADS, more: int = HEADS) -> str:
    """As EfficientFormerV2's."""
    return s.op("Conv", x, s.normal(more, heads, 1, 1), s.normal(more))


def by_an_einsum(s: Sketch, x: str, heads: int = HEADS, more: int = HEADS) -> str:
    """As DeepViT's, with a norm behind."""
    mixed = s.op("Einsum", x, s.normal(heads, more), equation="bhij,hg->bgij")
    normed = s.op("LayerNormalization", s.transpose(mixed, 0, 2, 3, 1), s.normal(more), s.normal(more), axis=-1)
    return s.transpose(normed, 0, 3, 1, 2)


def by_a_convolution_normed(s: Sketch, x: str, heads: int = HEADS, more: int = HEADS) -> str:
    """As another DeepViT's."""
    y = by_a_convolution(s, x, heads, more)
    of_each = [s.normal(more), s.normal(more), s.normal(more), s.number(*[1.0] * more)]
    return s.op("BatchNormalization", y, *of_each)


def with_positions(s: Sketch, x: str, heads: int = HEADS, more: int = HEADS) -> str:
    """As ConViT's: a part of a map of positions, given for each sample, and shares again."""
    own = s.op("Mul", x, s.number(0.75))
    shape = s.op("Concat", s.op("Shape", x, start=0, end=1), s.sizes(heads, TOKENS, TOKENS), axis=0)
    places = s.op("Expand", s.op("Softmax", s.normal(1, heads, TOKENS, TOKENS), axis=-1), shape)
    both = s.op("Add", own, s.op("Mul", places, s.number(0.25)))
    return s.op("Div", both, s.op("ReduceSum", both, s.sizes(-1)))


Mix = Callable[..., str]


def kept(s: Sketch, x: str) -> str:
    return x


@dataclass(frozen=True)
class Talking:
    """Attention with heads that are mixed, of keys, of the softmax, and of values."""

    before: Mix = kept
    behind: Mix = kept
    heads: tuple[int, int, int] = (HEADS, HEADS, HEADS)

    def __call__(self, s: Sketch, x: str) -> str:
        of_keys, within, of_values = self.heads
        q, k = (heads_apart(s, s.linear(x, of_keys * DEPTH), heads=of_keys) for _ in range(2))
        v = heads_apart(s, s.linear(x, of_values * DEPTH), heads=of_values)
        scores = self._mixed(self.before, s, s.scores(q, s.transpose(k, 0, 1, 3, 2)), of_keys, within)
        p = self._mixed(self.behind, s, s.op("Softmax", scores, axis=-1), within, of_values)
        y = s.op("MatMul", p, v)
        if of_values == HEADS:
            return heads_together(s, y)
        y = s.reshape(s.transpose(y, 0, 2, 1, 3), -1, TOKENS, of_values * DEPTH)
        return s.op("MatMul", y, s.normal(of_values * DEPTH, WIDTH))

    def _mixed(self, mix: Mix, s: Sketch, x: str, heads: int, more: int) -> str:
        return x if mix is kept else mix(s, x, heads, more)


MIXES = (by_a_product, by_a_convolution, by_an_einsum, by_a_convolution_normed)
LAYERS = {
    **{f"behind, {mix.__name__}": Talking(behind=mix) for mix in (*MIXES, with_positions)},
    **{f"in front, {mix.__name__}": Talking(before=mix) for mix in MIXES},
    **{f"both, {mix.__name__}": Talking(mix, mix) for mix in MIXES},
    "of more and then fewer heads": Talking(by_a_product, by_a_convolution, (2, OTHER, HEADS)),
    "of fewer and then more heads": Talking(by_an_einsum, by_a_product, (HEADS, 2, OTHER)),
}
layers = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())


@layers
def test_keys_and_values_are_those_of_their_tokens(layer: Talking) -> None:
    form = Form(layer)
    model, feed = form.model(), form.feed()
    matches = explain(model)
    assert [miss.reason for miss in matches.near_misses if miss.attention] == []
    assert len(matches.sites) == 2
    for site in matches.sites:
        assert (site.key.heads, site.value.heads) == (layer.heads[0], layer.heads[2])
        assert site.key.whole
        product = next(node for node in model.graph if node.name == site.nodes[0])
        names = [site.key.value, site.value.value, site.map, site.output]
        names += [product.inputs[0].name, product.outputs[0].name]
        seen = run(with_outputs(model, names), feed)
        K, V = (entries(seen[place.value], place, 3) for place in (site.key, site.value))
        scores = seen[product.inputs[0].name] @ K.swapaxes(2, 3)
        np.testing.assert_allclose(seen[product.outputs[0].name], scores, atol=1e-5)  # sums of three products
        np.testing.assert_allclose(seen[site.output], seen[site.map] @ V, atol=1e-4)  # of sixteen, of the size of ten


@layers
def test_a_patch_of_it_is_exact(layer: Talking) -> None:
    form = Form(layer)
    result = rehearse(form.model(), form.feed(8), conditional=(False,))
    assert result.passed, result.failures


@pytest.mark.parametrize("folded", [False, True])
def test_what_mixes_keys_is_not_taken_for_heads(folded: bool) -> None:
    """A product of the map with weights along its keys hands over positions, and no tokens' values."""

    def layer(s: Sketch, x: str) -> str:
        q, k, v = (heads_apart(s, y) for y in s.qkv(x))
        p = s.op("Softmax", s.scores(q, s.transpose(k, 0, 1, 3, 2)), axis=-1)
        p = s.reshape(p, -1, TOKENS, TOKENS) if folded else p
        mixed = s.op("MatMul", p, s.normal(TOKENS, TOKENS))
        y = s.op("MatMul", mixed, s.reshape(v, -1, TOKENS, DEPTH) if folded else v)
        return heads_together(s, s.reshape(y, -1, HEADS, TOKENS, DEPTH))

    matches = explain(Form(layer).model())
    assert matches.sites == ()
    assert [miss.attention for miss in matches.near_misses] == [True, True]


def test_a_classifiers_square_weights_are_no_heads() -> None:
    """Scores of a linear layer stay what they are, however many attentions stand before them."""

    def layer(s: Sketch, x: str) -> str:
        gates = s.op("Softmax", s.op("MatMul", s.op("Relu", s.linear(x)), s.normal(WIDTH, WIDTH)), axis=-1)
        return s.op("Mul", Talking()(s, x), gates)

    matches = explain(Form(layer).model())
    assert len(matches.sites) == 2
    assert [miss.attention for miss in matches.near_misses] == [False, False]
    assert all("come from a linear layer" in miss.reason for miss in matches.near_misses)


def test_queries_that_are_weights_are_no_mix_of_heads() -> None:
    """As in Perceiver: learned queries are multiplied with keys from the left, as weights that mix them would be."""

    def layer(s: Sketch, x: str, alone: bool = False) -> str:
        heads = 1 if alone else HEADS
        k, v = (heads_apart(s, s.linear(x, heads * DEPTH), heads=heads) for _ in range(2))
        q = s.normal(1, heads, TOKENS, DEPTH)
        y = s.op("MatMul", s.op("Softmax", s.scores(q, s.transpose(k, 0, 1, 3, 2)), axis=-1), v)
        y = s.reshape(s.transpose(y, 0, 2, 1, 3), -1, TOKENS, heads * DEPTH)
        return s.op("MatMul", y, s.normal(heads * DEPTH, WIDTH))

    for alone in (False, True):
        sites = find_sites(Form(partial(layer, alone=alone)).model())
        assert [site.key.heads for site in sites] == [1 if alone else HEADS] * 2
