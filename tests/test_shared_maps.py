"""A map that several products read: each token is neutral in all of them, or it is said where it is not."""

from collections.abc import Callable

import numpy as np
import pytest
from form_nets import DEPTH, HEADS, TOKENS, WIDTH, Form, Layer, Sketch, heads_apart, heads_together
from models import draw_patch, fire_on_some, run, same_bits, see, with_outputs
from nudge import assert_places
from onnx import helper

from atpatch_onnx.baking.bake import bake
from atpatch_onnx.matching import explain
from atpatch_onnx.measuring.rehearse import rehearse


def map_and_values(s: Sketch, x: str) -> tuple[str, str]:
    q, k, v = (heads_apart(s, y) for y in s.qkv(x))
    return s.op("Softmax", s.scores(q, s.transpose(k, 0, 1, 3, 2)), axis=-1), v


Values = Callable[[Sketch, str, str], str]


def with_relative_values(s: Sketch, p: str, v: str) -> str:
    """As in VITS: the map, shifted such that its columns are distances, times a table."""
    padded = s.op("Pad", p, s.sizes(0, 0, 0, 0, 0, 0, 0, TOKENS))
    flat, width = s.reshape(padded, -1, HEADS, 2 * TOKENS * TOKENS), 2 * TOKENS - 1
    cut = s.op("Slice", flat, s.sizes(0), s.sizes(TOKENS * width), s.sizes(2))
    shifted = s.reshape(cut, -1, HEADS, TOKENS, width)
    return s.op("Add", s.op("MatMul", p, v), s.op("MatMul", shifted, s.normal(2 * TOKENS - 1, DEPTH)))


def with_a_table(s: Sketch, p: str, v: str) -> str:
    return s.op("Add", s.op("MatMul", p, v), s.op("MatMul", p, s.normal(TOKENS, DEPTH)))


def with_a_convolution(s: Sketch, p: str, v: str) -> str:
    gate = s.op("Sigmoid", s.op("ReduceMean", s.op("Conv", p, s.normal(HEADS, HEADS, 1, 1)), s.sizes(-1), keepdims=1))
    return s.op("Mul", s.op("MatMul", p, v), gate)


def layer_of(values: Values) -> Layer:
    def layer(s: Sketch, x: str) -> str:
        return heads_together(s, values(s, *map_and_values(s, x)))

    return layer


@pytest.mark.parametrize("values", [with_relative_values, with_a_table, with_a_convolution], ids=lambda v: v.__name__)
def test_what_reads_the_map_alone_sees_neutral_tokens(values: Values) -> None:
    """Nothing of a flagged token is left in the map, and a table has none of its values."""
    form = Form(layer_of(values))
    model = form.model()
    matches = explain(model)
    assert len(matches.sites) == 2
    assert [miss.attention for miss in matches.near_misses] == ([] if values is with_a_convolution else [False, False])
    assert all("product with weights, which is left as it is" in miss.reason for miss in matches.near_misses)
    result = rehearse(model, form.feed(8), conditional=(False,))
    assert result.passed, result.failures


@pytest.mark.parametrize(
    "values", [with_relative_values, with_a_table, with_a_convolution], ids=lambda values: values.__name__
)
def test_a_flagged_token_hands_over_nothing_to_others(values: Values) -> None:
    """Another one in its place, flagged as well, changes no bit of any other token."""
    form = Form(layer_of(values))
    model, feed = form.model(), form.feed(8)
    patch = fire_on_some(model, draw_patch(model), feed, share=0.1)
    baked = bake(model, patch)
    flags = see(baked, model, feed)["site_0"].flags
    (sample, token), *_, other = np.argwhere(flags)
    changed = {"x": feed["x"].copy()}
    changed["x"][sample, token] = feed["x"][tuple(other)]
    assert not np.array_equal(changed["x"], feed["x"])
    assert np.array_equal(see(baked, model, changed)["site_0"].flags, flags)
    first = next(node.outputs[0].name for node in model.graph if node.op_type == "Add" and node.inputs[0].name == "x")
    one, two = (run(with_outputs(baked, [first]), each)[first][sample] for each in (feed, changed))
    rest = np.arange(TOKENS) != token
    assert same_bits(one[rest], two[rest])
    base = [run(with_outputs(model, [first]), each)[first][sample] for each in (feed, changed)]
    assert not same_bits(base[0][rest], base[1][rest])


# Pieces of a map


def of_one_head(s: Sketch, p: str, cut: str, head: int) -> str:
    if cut == "Slice":
        return s.op("Slice", p, s.sizes(head), s.sizes(head + 1), s.sizes(1))
    if cut == "Gather":
        return s.op("Gather", p, s.sizes(head), axis=1)
    if cut == "Gather, no axis left":
        return s.op("Unsqueeze", s.op("Gather", p, s.weight(np.int64(head)), axis=1), s.sizes(1))
    names = [f"{p}_{one}" for one in range(HEADS)]
    s.nodes.append(helper.make_node("Split", [p], names, axis=1, num_outputs=HEADS))
    return names[head]


CUTS = ("Slice", "Gather", "Gather, no axis left", "Split")


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("head", [0, 2])
def test_a_head_that_serves_another_product_is_a_site_beside_the_whole(cut: str, head: int) -> None:
    """As in Zipformer: the first head of the map meets separate values."""

    def layer(s: Sketch, x: str) -> str:
        p, v = map_and_values(s, x)
        own = s.op("Unsqueeze", s.op("Tanh", s.linear(x, DEPTH)), s.sizes(1))
        both = s.op("Add", s.op("MatMul", p, v), s.op("MatMul", of_one_head(s, p, cut, head), own))
        return heads_together(s, both)

    form = Form(layer)
    model = form.model()
    matches = explain(model)
    assert matches.near_misses == ()
    assert sorted((site.key.heads, site.value.heads) for site in matches.sites) == [(1, 1)] * 2 + [(HEADS, HEADS)] * 2
    assert_places(model, form.feed())
    result = rehearse(model, form.feed(8), conditional=(False,))
    assert result.passed, result.failures


def test_heads_that_meet_values_apart_are_sites_each() -> None:
    def layer(s: Sketch, x: str) -> str:
        p, v = map_and_values(s, x)
        pairs = []
        for array in (p, v):
            names = [f"{array}_{head}" for head in range(HEADS)]
            s.nodes.append(helper.make_node("Split", [array], names, axis=1, num_outputs=HEADS))
            pairs.append(names)
        return heads_together(s, s.op("Concat", *(s.op("MatMul", *pair) for pair in zip(*pairs, strict=True)), axis=1))

    form = Form(layer)
    model = form.model()
    matches = explain(model)
    assert matches.near_misses == ()
    assert [site.key.heads for site in matches.sites] == [1] * 2 * HEADS
    assert_places(model, form.feed())
    result = rehearse(model, form.feed(8), conditional=(False,))
    assert result.passed, result.failures


def test_queries_that_are_attended_in_turn_are_sites_each() -> None:
    """The map cut between queries: each piece has all keys."""

    def layer(s: Sketch, x: str) -> str:
        p, v = map_and_values(s, x)
        half, axis = TOKENS // 2, s.sizes(2)
        rows = [s.op("Slice", p, s.sizes(at), s.sizes(at + half), axis) for at in (0, half)]
        return heads_together(s, s.op("Concat", *(s.op("MatMul", one, v) for one in rows), axis=2))

    form = Form(layer)
    model = form.model()
    matches = explain(model)
    assert matches.near_misses == ()
    assert [site.queries for site in matches.sites] == [TOKENS // 2] * 4
    result = rehearse(model, form.feed(8), conditional=(False,))
    assert result.passed, result.failures


@pytest.mark.parametrize("cut", ["Slice", "Split"])
def test_keys_that_are_met_in_pieces_are_said(cut: str) -> None:
    """As in block-sparse attention: some of a map's keys meet some of the values."""

    def layer(s: Sketch, x: str) -> str:
        p, v = map_and_values(s, x)
        half = TOKENS // 2
        pieces = []
        for array, axis in ((p, 3), (v, 2)):
            if cut == "Slice":
                halves = [s.op("Slice", array, s.sizes(at), s.sizes(at + half), s.sizes(axis)) for at in (0, half)]
            else:
                halves = [f"{array}_{number}" for number in range(2)]
                s.nodes.append(helper.make_node("Split", [array, s.sizes(half, half)], halves, axis=axis))
            pieces.append(halves)
        return heads_together(s, s.op("Add", *(s.op("MatMul", *pair) for pair in zip(*pieces, strict=True))))

    matches = explain(Form(layer).model())
    assert matches.sites == ()
    assert matches.near_misses
    assert all("pieces with some of its keys each" in miss.reason for miss in matches.near_misses)


@pytest.mark.parametrize("op_type", ["Sigmoid", "Abs"])
def test_values_behind_what_is_not_followed_are_said(op_type: str) -> None:
    """A token that is neutral for one product keeps its own value for the other."""

    def layer(s: Sketch, x: str) -> str:
        p, v = map_and_values(s, x)
        other = heads_apart(s, s.linear(x))
        return heads_together(s, s.op("Add", s.op("MatMul", p, v), s.op("MatMul", s.op(op_type, p), other)))

    matches = explain(Form(layer).model())
    assert len(matches.sites) == 2
    assert [miss.attention for miss in matches.near_misses] == [True, True]
    assert all("also meets values" in miss.reason for miss in matches.near_misses)


def test_a_map_that_is_handed_out_or_counted_is_nothing_to_say() -> None:
    def layer(s: Sketch, x: str) -> str:
        p, v = map_and_values(s, x)
        s.op("ReduceMean", p, s.sizes(1), keepdims=0)
        return heads_together(s, s.op("MatMul", p, v))

    assert explain(Form(layer).model()).near_misses == ()


def test_one_map_for_several_heads_of_values() -> None:
    """Scores of one head, values of several: keys have one head, values have theirs."""

    def layer(s: Sketch, x: str) -> str:
        q, k = (heads_apart(s, s.linear(x, DEPTH), heads=1) for _ in range(2))
        return heads_together(s, s.attend(q, s.transpose(k, 0, 1, 3, 2), heads_apart(s, s.linear(x))))

    form = Form(layer)
    model = form.model()
    matches = explain(model)
    assert matches.near_misses == ()
    assert [(site.key.heads, site.value.heads) for site in matches.sites] == [(1, HEADS)] * 2
    result = rehearse(model, form.feed(8), conditional=(False,))
    assert result.passed, result.failures


def test_keys_and_values_that_are_all_of_one_tensor() -> None:
    """As HaloNet's: both are replaced at once, and no column of the tensor is anything else."""

    def of_heads(s: Sketch, y: str, depth: int) -> str:
        """`[samples * heads, tokens, depth]`."""
        y = s.transpose(s.reshape(y, 0, TOKENS, HEADS, depth), 0, 2, 1, 3)
        return s.reshape(y, -1, TOKENS, depth)

    def layer(s: Sketch, x: str) -> str:
        both = of_heads(s, s.linear(x, 2 * WIDTH), 2 * DEPTH)
        k, v = (s.op("Slice", both, s.sizes(at), s.sizes(at + DEPTH), s.sizes(2)) for at in (0, DEPTH))
        y = s.attend(of_heads(s, s.linear(x), DEPTH), s.transpose(k, 0, 2, 1), v)
        return heads_together(s, s.reshape(y, -1, HEADS, TOKENS, DEPTH))

    form = Form(layer)
    model = form.model()
    for site in explain(model).sites:
        assert site.key.value == site.value.value
        assert not site.key.whole
    result = rehearse(model, form.feed(8), conditional=(False,))
    assert result.passed, result.failures
