"""The numpy reference against the properties that design section 5 promises, for drawn maps, masks and flags."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atpatch_onnx.baking.reference import TINY, attend, neutral_values, redistributed_map, redistributed_output

EXACT = 1e-12
"""Tolerance for float64 sums of at most nine weights: rounding alone, some thousand times over."""

drawn = settings(max_examples=60, deadline=None, derandomize=True)


@dataclass(frozen=True)
class Draw:
    P: np.ndarray
    M: np.ndarray
    V: np.ndarray
    beta: np.ndarray
    neutral: np.ndarray

    @property
    def visible(self) -> np.ndarray:
        return self.P > 0

    @property
    def sums(self) -> np.ndarray:
        """`s_i`: one for most, less or more where an attention sink or a gate has changed it."""
        return self.P.sum(-1, keepdims=True)

    @property
    def m(self) -> np.ndarray:
        return np.broadcast_to(self.M[:, None, None, :], self.P.shape)

    @property
    def some_benign(self) -> np.ndarray:
        """Rows that see a benign key: one with a weight that counts."""
        return np.where(self.m, 0.0, self.P).sum(-1) > TINY


@st.composite
def draws(draw: st.DrawFn, *, beta: float | None = None) -> Draw:
    """Maps with masked entries, fully masked rows, samples without flags and samples with nothing but flags.

    Rows sum to one, or, as behind a gate or an attention sink, to a number of their own.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries, keys, depth = draw(st.integers(1, 5)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    heads = kv_heads * groups
    hidden = rng.random((batch, 1, queries, keys)) < draw(st.sampled_from([0.0, 0.3, 0.8]))
    scores = rng.normal(size=(batch, heads, queries, keys)) * draw(st.sampled_from([1.0, 20.0]))
    weights = np.where(hidden, 0.0, np.exp(scores - scores.max(-1, keepdims=True)))
    sums = weights.sum(-1, keepdims=True)
    P = np.divide(weights, sums, out=np.zeros_like(weights), where=sums > 0)
    if draw(st.booleans()):
        P *= rng.uniform(0.2, 2, size=(batch, heads, queries, 1))
    M = rng.random((batch, keys)) < draw(st.sampled_from([0.0, 0.3, 0.9]))
    profile = rng.random((heads, queries, 1)) if draw(st.booleans()) else np.full((1, 1, 1), rng.random())
    return Draw(
        P=P,
        M=M,
        V=rng.normal(size=(batch, kv_heads, keys, depth)),
        beta=profile if beta is None else np.full((1, 1, 1), beta),
        neutral=rng.normal(size=(kv_heads, depth)),
    )


@drawn
@given(draws())
def test_rows_keep_their_sums_and_stay_weights(d: Draw) -> None:
    changed = redistributed_map(d.P, d.M, d.beta)
    np.testing.assert_allclose(changed.sum(-1), d.P.sum(-1), rtol=0, atol=EXACT)
    assert (changed >= 0).all()


@drawn
@given(draws())
def test_zeros_stay_zero(d: Draw) -> None:
    assert not redistributed_map(d.P, d.M, d.beta)[~d.visible].any()


@drawn
@given(draws())
def test_samples_without_a_flag_stay_as_they_are(d: Draw) -> None:
    quiet = ~d.M.any(-1)
    assert np.array_equal(redistributed_map(d.P, d.M, d.beta)[quiet], d.P[quiet])
    Y = attend(d.P, d.V) + 1e-3  # not P V: the site's own output is kept, not a recomputed one
    assert np.array_equal(redistributed_output(d.P, d.V, Y, d.M, d.beta, d.neutral)[quiet], Y[quiet])


@drawn
@given(draws())
def test_rows_that_see_only_flagged_keys_or_nothing_stay_as_they_are(d: Draw) -> None:
    rows = ~d.some_benign
    assert np.array_equal(redistributed_map(d.P, d.M, d.beta)[rows], d.P[rows])


@drawn
@given(draws())
def test_flagged_columns_get_beta_times_the_uniform_share_of_their_row(d: Draw) -> None:
    changed = redistributed_map(d.P, d.M, d.beta)
    share = np.broadcast_to(d.sums * d.beta / np.maximum(d.visible.sum(-1, keepdims=True), 1), d.P.shape)
    flagged = d.m & d.visible & d.some_benign[..., None]
    np.testing.assert_allclose(changed[flagged], share[flagged], rtol=0, atol=EXACT)


@drawn
@given(draws(beta=0.0))
def test_beta_zero_silences_flagged_columns(d: Draw) -> None:
    changed = redistributed_map(d.P, d.M, d.beta)
    assert not changed[d.m & d.some_benign[..., None]].any()


@drawn
@given(draws(beta=1.0))
def test_beta_one_leaves_benign_columns_their_fair_share_of_the_row(d: Draw) -> None:
    changed = redistributed_map(d.P, d.M, d.beta)
    n, benign = d.visible.sum(-1), (d.visible & ~d.m).sum(-1)
    rows = d.some_benign
    wanted = d.sums[..., 0][rows] * benign[rows] / n[rows]
    np.testing.assert_allclose(np.where(d.m, 0, changed).sum(-1)[rows], wanted, rtol=0, atol=EXACT)


@drawn
@given(draws())
def test_benign_columns_keep_their_proportions(d: Draw) -> None:
    changed = redistributed_map(d.P, d.M, d.beta)
    benign = np.where(d.m, 0.0, d.P)
    mass = benign.sum(-1, keepdims=True)
    rows = (mass > 1e-6).squeeze(-1)  # below, a proportion is a quotient of vanishing numbers
    kept = np.where(d.m, 0.0, changed)
    np.testing.assert_allclose(
        kept[rows] * mass[rows], benign[rows] * kept.sum(-1, keepdims=True)[rows], rtol=0, atol=EXACT
    )


@drawn
@given(draws())
def test_a_sample_does_not_depend_on_its_batch_mates(d: Draw) -> None:
    together = redistributed_map(d.P, d.M, d.beta)
    for b in range(len(d.P)):
        assert np.array_equal(redistributed_map(d.P[b : b + 1], d.M[b : b + 1], d.beta)[0], together[b])


@drawn
@given(draws(), st.booleans())
def test_the_output_follows_from_the_output_alone(d: Draw, own: bool) -> None:
    """The identities of design section 5, for rows whose benign weights are not tiny."""
    groups = d.P.shape[1] // d.V.shape[1]
    Y = attend(d.P, d.V)
    m, visible = d.m.astype(float), d.visible.astype(float)
    share = d.sums * d.beta / np.maximum(visible.sum(-1, keepdims=True), 1)
    t = share * (visible * m).sum(-1, keepdims=True)
    benign_mass = d.sums - (d.P * m).sum(-1, keepdims=True)
    rows = ((benign_mass > 1e-6) & d.some_benign[..., None] & d.M.any(-1)[:, None, None, None]).squeeze(-1)
    # a row of a fully masked query is not there: it sees no benign key
    s = np.divide(d.sums - t, benign_mass, out=np.zeros_like(t), where=benign_mass > 1e-6)
    rest = s * (Y - attend(d.P * m, d.V))
    if own:
        wanted = rest + share * attend(visible * m, d.V)
    else:
        wanted = rest + t * np.repeat(d.neutral, groups, axis=0)[None, :, None, :]
    found = redistributed_output(d.P, d.V, Y, d.M, d.beta, None if own else d.neutral)
    # the identity divides a difference by s - P M > 1e-6: rounding of 1e-16 grows a millionfold
    np.testing.assert_allclose(found[rows], wanted[rows], rtol=0, atol=1e-8)


@drawn
@given(draws())
def test_with_neutral_values_the_output_does_not_hear_what_flagged_tokens_say(d: Draw) -> None:
    rows = d.some_benign & d.M.any(-1)[:, None, None]
    shouted = np.where(d.M[:, None, :, None], 1e6, d.V)
    Y = attend(d.P, d.V)
    quiet = redistributed_output(d.P, d.V, Y, d.M, d.beta, d.neutral)
    assert np.array_equal(redistributed_output(d.P, shouted, Y, d.M, d.beta, d.neutral)[rows], quiet[rows])


def test_benign_columns_that_have_all_but_vanished_get_the_mass_in_their_proportions() -> None:
    P = np.array([1.0, TINY, 3 * TINY, 0.0]).reshape(1, 1, 1, 4)
    M = np.array([[True, False, False, False]])
    found = redistributed_map(P, M, 0.6).ravel()
    np.testing.assert_allclose(found, [0.2, 0.2, 0.6, 0.0], rtol=0, atol=EXACT)
    assert np.array_equal(redistributed_map(P / 5, M, 0.6), P / 5)


def test_worked_example() -> None:
    """By hand: one row, five keys, the last masked, the first flagged; beta 0.8."""
    P = np.array([0.7, 0.1, 0.1, 0.1, 0.0]).reshape(1, 1, 1, 5)
    M = np.array([[True, False, False, False, True]])
    V = np.array([10.0, 1.0, 2.0, 3.0, 99.0]).reshape(1, 1, 5, 1)
    wanted = [0.2, 0.8 / 3, 0.8 / 3, 0.8 / 3, 0.0]
    np.testing.assert_allclose(redistributed_map(P, M, 0.8).ravel(), wanted, rtol=0, atol=EXACT)
    own = redistributed_output(P, V, attend(P, V), M, 0.8, None)
    neutral = redistributed_output(P, V, attend(P, V), M, 0.8, np.array([[4.0]]))
    assert own.item() == pytest.approx(0.2 * 10 + 0.8 * 2, abs=EXACT)
    assert neutral.item() == pytest.approx(0.2 * 4 + 0.8 * 2, abs=EXACT)


def test_a_row_keeps_the_sum_that_a_sink_or_a_gate_has_left_it() -> None:
    """By hand: half of the row has gone to a sink; the first of four keys is flagged; beta 1."""
    P = np.array([0.2, 0.1, 0.1, 0.1]).reshape(1, 1, 1, 4)
    found = redistributed_map(P, np.array([[True, False, False, False]]), 1.0).ravel()
    np.testing.assert_allclose(found, [0.125] * 4, rtol=0, atol=EXACT)


def test_neutral_values_replace_whole_tokens_of_every_head() -> None:
    V = np.arange(12.0).reshape(1, 2, 3, 2)
    found = neutral_values(V, [[False, True, False]], [[-1, -2], [-3, -4]])
    assert np.array_equal(found[0, :, 1], [[-1, -2], [-3, -4]])
    assert np.array_equal(found[0, :, [0, 2]], V[0, :, [0, 2]])
