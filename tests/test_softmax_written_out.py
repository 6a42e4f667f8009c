"""A softmax written out by hand is found as one node is, and its attention with it."""

from collections.abc import Callable

import numpy as np
import pytest
from form_nets import MICROSOFT, Form, Sketch, heads_apart, heads_together

from atpatch_onnx.matching import explain
from atpatch_onnx.measuring.rehearse import rehearse


def shifted(s: Sketch, x: str) -> str:
    return s.op("Sub", x, s.op("ReduceMax", x, s.sizes(-1), keepdims=1))


def summed(s: Sketch, e: str, **attributes: int) -> str:
    return s.op("ReduceSum", e, s.sizes(-1), **{"keepdims": 1, **attributes})


def divided(s: Sketch, x: str) -> str:
    e = s.op("Exp", x)
    return s.op("Div", e, summed(s, e))


def with_the_maximum_taken_off(s: Sketch, x: str) -> str:
    return divided(s, shifted(s, x))


def by_a_sum_that_is_unsqueezed(s: Sketch, x: str) -> str:
    e = s.op("Exp", x)
    return s.op("Div", e, s.op("Unsqueeze", summed(s, e, keepdims=0), s.sizes(-1)))


def by_a_sum_that_is_reshaped_and_expanded(s: Sketch, x: str) -> str:
    e = s.op("Exp", shifted(s, x))
    total = s.reshape(summed(s, e, keepdims=0), 0, 0, 0, 1)
    return s.op("Div", e, s.op("Expand", total, s.op("Shape", e)))


def times_the_reciprocal(s: Sketch, x: str) -> str:
    e = s.op("Exp", x)
    return s.op("Mul", e, s.op("Reciprocal", summed(s, e)))


def times_one_over_the_sum(s: Sketch, x: str) -> str:
    e = s.op("Exp", shifted(s, x))
    return s.op("Mul", s.op("Div", s.number(1), summed(s, e)), e)


def times_a_power(s: Sketch, x: str) -> str:
    e = s.op("Exp", x)
    return s.op("Mul", e, s.op("Pow", summed(s, e), s.number(-1)))


def by_a_sum_that_is_kept_from_zero(s: Sketch, x: str) -> str:
    e = s.op("Exp", shifted(s, x))
    return s.op("Div", e, s.op("Add", summed(s, e), s.number(1e-6)))


def by_a_clipped_norm(s: Sketch, x: str) -> str:
    e = s.op("Exp", x)
    total = s.op("ReduceL1", e, s.sizes(-1), keepdims=1)
    return s.op("Div", e, s.op("Max", total, s.number(1e-6)))


def by_a_product_with_ones(s: Sketch, x: str) -> str:
    e = s.op("Exp", x)
    return s.op("Div", e, s.op("MatMul", e, s.weight(np.ones((16, 1), np.float32))))


def of_its_logarithm(s: Sketch, x: str) -> str:
    return s.op("Exp", s.op("LogSoftmax", x, axis=-1))


def less_the_logarithm_of_the_sum(s: Sketch, x: str) -> str:
    return s.op("Exp", s.op("Sub", x, s.op("ReduceLogSumExp", x, s.sizes(-1), keepdims=1)))


def less_the_logarithm_written_out(s: Sketch, x: str) -> str:
    y = shifted(s, x)
    return s.op("Exp", s.op("Sub", y, s.op("Log", summed(s, s.op("Exp", y)))))


def of_powers_of_two(s: Sketch, x: str) -> str:
    """As kernels have it, scores in another unit."""
    e = s.op("Pow", s.weight(np.float32(2)), s.op("Mul", shifted(s, x), s.number(1.442695)))
    return s.op("Div", e, summed(s, e))


def of_powers_times_the_reciprocal(s: Sketch, x: str) -> str:
    e = s.op("Pow", s.number(10), x)
    return s.op("Mul", e, s.op("Reciprocal", summed(s, e)))


def masked(s: Sketch, x: str) -> str:
    kept = s.op("Mul", s.op("Exp", shifted(s, x)), s.weight(np.tri(16, dtype=np.float32)))
    return s.op("Div", kept, s.op("Add", summed(s, kept), s.number(1e-9)))


def masked_by_a_choice(s: Sketch, x: str) -> str:
    kept = s.op("Where", s.weight(np.tri(16) > 0), s.op("Exp", x), s.number(0))
    return s.op("Mul", kept, s.op("Reciprocal", summed(s, kept)))


def with_a_bias(s: Sketch, x: str) -> str:
    """One operator of onnxruntime's own."""
    return s.op("BiasSoftmax", x, s.normal(1, 1, 16, 16), domain="com.microsoft", axis=3, is_inner_broadcast=0)


WAYS: tuple[Callable[[Sketch, str], str], ...] = (
    divided,
    with_the_maximum_taken_off,
    by_a_sum_that_is_unsqueezed,
    by_a_sum_that_is_reshaped_and_expanded,
    times_the_reciprocal,
    times_one_over_the_sum,
    times_a_power,
    by_a_sum_that_is_kept_from_zero,
    by_a_clipped_norm,
    by_a_product_with_ones,
    of_its_logarithm,
    less_the_logarithm_of_the_sum,
    less_the_logarithm_written_out,
    with_a_bias,
    of_powers_of_two,
    of_powers_times_the_reciprocal,
    masked,
    masked_by_a_choice,
)


def net(normalize: Callable[[Sketch, str], str]) -> Form:
    def layer(s: Sketch, x: str) -> str:
        q, k, v = (heads_apart(s, y) for y in s.qkv(x))
        scores = s.scores(q, s.transpose(k, 0, 1, 3, 2))
        return heads_together(s, s.op("MatMul", normalize(s, scores), v))

    return Form(layer, opsets=MICROSOFT)


ways = pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)


@ways
def test_its_attention_is_found(way: Callable[[Sketch, str], str]) -> None:
    matches = explain(net(way).model())
    assert [miss.reason for miss in matches.near_misses] == []
    assert [(site.map_layout, site.self_attention, site.keys) for site in matches.sites] == [("nhqk", True, 16)] * 2
    assert [site.masked for site in matches.sites] == [way.__name__.startswith("masked")] * 2
    assert len({site.token_axis for site in matches.sites}) == 1


@pytest.mark.parametrize(
    "way", [by_a_sum_that_is_reshaped_and_expanded, times_the_reciprocal, of_its_logarithm, masked]
)
def test_a_patch_of_it_is_exact(way: Callable[[Sketch, str], str]) -> None:
    result = rehearse(net(way).model(), net(way).feed(), threads=1)
    assert result.passed, result.failures


@pytest.mark.parametrize("divide", ["Div", "Reciprocal"])
def test_a_division_behind_the_values_is_attention(divide: str) -> None:
    def layer(s: Sketch, x: str) -> str:
        q, k, v = (heads_apart(s, y) for y in s.qkv(x))
        e = s.op("Exp", shifted(s, s.scores(q, s.transpose(k, 0, 1, 3, 2))))
        y, total = s.op("MatMul", e, v), summed(s, e)
        y = s.op("Div", y, total) if divide == "Div" else s.op("Mul", y, s.op("Reciprocal", total))
        return heads_together(s, y)

    matches = explain(Form(layer).model())
    assert matches.sites == ()
    assert [miss.attention for miss in matches.near_misses] == [True, True]
    assert all("divided by its sum behind the product" in miss.reason for miss in matches.near_misses)


def not_by_its_own_sum(s: Sketch, x: str) -> str:
    return s.op("Div", s.op("Exp", x), summed(s, s.op("Exp", s.op("Mul", x, s.number(2)))))


def times_its_own_sum(s: Sketch, x: str) -> str:
    e = s.op("Exp", x)
    return s.op("Mul", e, summed(s, e))


def along_two_axes(s: Sketch, x: str) -> str:
    e = s.op("Exp", x)
    return s.op("Div", e, s.op("ReduceSum", e, s.sizes(-2, -1), keepdims=1))


@pytest.mark.parametrize("way", [not_by_its_own_sum, times_its_own_sum, along_two_axes], ids=lambda way: way.__name__)
def test_other_quotients_of_exponentials_are_no_softmax(way: Callable[[Sketch, str], str]) -> None:
    matches = explain(net(way).model())
    assert matches.sites == matches.near_misses == ()
