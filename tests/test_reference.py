"""The numpy reference against the properties that design section 5 promises, for drawn keys, maps, masks and flags."""

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atpatch_onnx.baking.reference import attend, attention_map, redistributed_columns, replaced

EXACT = 1e-12
"""Tolerance for float64 sums of at most nine weights: rounding alone, some thousand times over."""

drawn = settings(max_examples=60, deadline=None, derandomize=True)


# In front of the attention


@dataclass(frozen=True)
class Site:
    Q: np.ndarray
    K: np.ndarray
    V: np.ndarray
    M: np.ndarray
    bias: np.ndarray
    kbar: np.ndarray
    vbar: np.ndarray

    @property
    def groups(self) -> int:
        return self.Q.shape[1] // self.K.shape[1]

    @property
    def map(self) -> np.ndarray:
        return attention_map(self.Q, self.K, bias=self.bias)

    @property
    def patched(self) -> np.ndarray:
        return attention_map(self.Q, replaced(self.K, self.M, self.kbar), bias=self.bias)


@st.composite
def sites(draw: st.DrawFn) -> Site:
    """Grouped heads, hidden keys, rows in which everything is hidden, samples with no flag and with all of them."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, kv_heads, groups = draw(st.integers(0, 3)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    queries, keys, depth = draw(st.integers(1, 5)), draw(st.integers(1, 9)), draw(st.integers(1, 4))
    hidden = rng.random((batch, 1, queries, keys)) < draw(st.sampled_from([0.0, 0.3, 0.9]))
    return Site(
        Q=rng.normal(size=(batch, kv_heads * groups, queries, depth)) * draw(st.sampled_from([1.0, 20.0])),
        K=rng.normal(size=(batch, kv_heads, keys, depth)),
        V=rng.normal(size=(batch, kv_heads, keys, depth + 1)),
        M=rng.random((batch, keys)) < draw(st.sampled_from([0.0, 0.3, 1.0])),
        bias=np.where(hidden, -np.inf, rng.normal(size=hidden.shape)),
        kbar=rng.normal(size=(kv_heads, depth)),
        vbar=rng.normal(size=(kv_heads, depth + 1)),
    )


@drawn
@given(sites())
def test_a_map_has_rows_of_weights_that_sum_to_one_or_see_nothing(s: Site) -> None:
    hidden = np.broadcast_to(np.isneginf(s.bias), s.map.shape)
    assert (s.map >= 0).all()
    assert not s.map[hidden].any()
    np.testing.assert_allclose(s.map.sum(-1), (~hidden.all(-1)).astype(float), rtol=0, atol=EXACT)


@drawn
@given(sites())
def test_a_map_is_what_its_definition_says_entry_by_entry(s: Site) -> None:
    batch, heads, queries, depth = s.Q.shape
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                keys = s.K[b, h // s.groups]
                scores = [float(s.Q[b, h, i] @ key) / depth**0.5 + s.bias[b, 0, i, j] for j, key in enumerate(keys)]
                weights = np.exp(np.array(scores) - max([*scores, -1e300]))
                expected = weights / weights.sum() if weights.any() else weights
                np.testing.assert_allclose(
                    s.map[b, h, i], expected, rtol=1e-10, atol=EXACT
                )  # exponents up to a few tens


def test_a_scale_of_its_own() -> None:
    Q, K = np.array([[[[1.0]]]]), np.array([[[[0.0], [np.log(3)]]]])
    np.testing.assert_allclose(attention_map(Q, K, scale=2.0).ravel(), [0.1, 0.9], rtol=0, atol=EXACT)
    np.testing.assert_allclose(attention_map(Q, K).ravel(), [0.25, 0.75], rtol=0, atol=EXACT)


def test_numbers_beyond_the_range_of_an_exponential() -> None:
    Q, K = np.array([[[[1.0]]]]), np.array([[[[1e4], [1e4]]]])
    assert attention_map(Q, K).ravel().tolist() == [0.5, 0.5]
    assert attention_map(Q, -K).ravel().tolist() == [0.5, 0.5]


@drawn
@given(sites())
def test_flagged_tokens_are_neutral_in_every_head_and_all_others_keep_their_bits(s: Site) -> None:
    for X, neutral in ((s.K, s.kbar), (s.V, s.vbar)):
        found = replaced(X, s.M, neutral)
        assert found.shape == X.shape
        assert found.dtype == np.float64
        by_token = found.transpose(0, 2, 1, 3)
        assert np.array_equal(by_token[~s.M], X.transpose(0, 2, 1, 3)[~s.M])
        assert np.array_equal(by_token[s.M], np.broadcast_to(neutral, by_token[s.M].shape))


@drawn
@given(sites())
def test_benign_columns_keep_their_proportions_and_rows_their_sums(s: Site) -> None:
    before, after = s.map, s.patched
    np.testing.assert_allclose(after.sum(-1), before.sum(-1), rtol=0, atol=EXACT)
    benign = ~np.broadcast_to(s.M[:, None, None, :], before.shape)
    one, other = np.where(benign, before, 0), np.where(benign, after, 0)
    np.testing.assert_allclose(
        one * other.sum(-1, keepdims=True), other * one.sum(-1, keepdims=True), rtol=0, atol=EXACT
    )


@drawn
@given(sites())
def test_flagged_columns_get_what_a_neutral_key_earns_the_same_for_all_of_them(s: Site) -> None:
    """But for the bias: positions and masks are the base's affair."""
    flat = np.where(np.isneginf(s.bias), -np.inf, 0.0)
    after = attention_map(s.Q, replaced(s.K, s.M, s.kbar), bias=flat)
    for b, flags in enumerate(s.M):
        for row, hidden in zip(after[b].swapaxes(0, 1), np.isneginf(s.bias[b, 0]), strict=True):
            shares = row[:, flags & ~hidden]
            if shares.size:
                np.testing.assert_allclose(shares, np.broadcast_to(shares[:, :1], shares.shape), rtol=0, atol=EXACT)


@drawn
@given(sites())
def test_nothing_of_a_flagged_token_is_left_but_its_query(s: Site) -> None:
    def outputs(K: np.ndarray, V: np.ndarray) -> np.ndarray:
        keys, values = replaced(K, s.M, s.kbar), replaced(V, s.M, s.vbar)
        return attend(attention_map(s.Q, keys, bias=s.bias), values)

    loud = s.M[:, None, :, None]
    assert np.array_equal(outputs(s.K, s.V), outputs(np.where(loud, 50.0, s.K), np.where(loud, 1e6, s.V)))


@drawn
@given(sites())
def test_a_sample_without_a_flag_and_every_sample_alone_is_the_same(s: Site) -> None:
    quiet = ~s.M.any(-1)
    assert np.array_equal(s.patched[quiet], s.map[quiet])
    for b in range(len(s.M)):
        one = slice(b, b + 1)
        alone = Site(s.Q[one], s.K[one], s.V[one], s.M[one], s.bias[one], s.kbar, s.vbar)
        np.testing.assert_allclose(alone.patched[0], s.patched[b], rtol=0, atol=EXACT)


@drawn
@given(sites())
def test_grouped_heads_share_keys_and_values(s: Site) -> None:
    K, V = (np.repeat(X, s.groups, axis=1) for X in (s.K, s.V))
    assert np.array_equal(attention_map(s.Q, K, bias=s.bias), s.map)
    assert np.array_equal(attend(s.map, V), attend(s.map, s.V))
    np.testing.assert_allclose(attend(s.map, s.V), np.einsum("bhqk,bhkd->bhqd", s.map, V), rtol=0, atol=EXACT)


# The paper's form


@dataclass(frozen=True)
class Draw:
    P: np.ndarray
    M: np.ndarray
    beta: np.ndarray

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
        """Rows that see a benign key."""
        return (self.visible & ~self.m).any(-1)


@st.composite
def draws(draw: st.DrawFn, *, beta: float | None = None) -> Draw:
    """Maps with masked entries, fully masked rows, samples without flags and samples with nothing but flags.

    Rows sum to one, or, as behind a gate or an attention sink, to a number of their own.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    queries, keys = draw(st.integers(1, 5)), draw(st.integers(1, 9))
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
        beta=profile if beta is None else np.full((1, 1, 1), beta),
    )


@drawn
@given(draws())
def test_rows_keep_their_sums_and_stay_weights(d: Draw) -> None:
    changed = redistributed_columns(d.P, d.M, d.beta)
    np.testing.assert_allclose(changed.sum(-1), d.P.sum(-1), rtol=0, atol=EXACT)
    assert (changed >= 0).all()


@drawn
@given(draws())
def test_zeros_stay_zero(d: Draw) -> None:
    assert not redistributed_columns(d.P, d.M, d.beta)[~d.visible].any()


@drawn
@given(draws())
def test_samples_without_a_flag_stay_as_they_are(d: Draw) -> None:
    quiet = ~d.M.any(-1)
    assert np.array_equal(redistributed_columns(d.P, d.M, d.beta)[quiet], d.P[quiet])


@drawn
@given(draws())
def test_rows_that_see_only_flagged_keys_or_nothing_stay_as_they_are(d: Draw) -> None:
    rows = ~d.some_benign
    assert np.array_equal(redistributed_columns(d.P, d.M, d.beta)[rows], d.P[rows])


@drawn
@given(draws())
def test_flagged_columns_get_beta_times_the_uniform_share_of_their_row(d: Draw) -> None:
    changed = redistributed_columns(d.P, d.M, d.beta)
    share = np.broadcast_to(d.sums * d.beta / np.maximum(d.visible.sum(-1, keepdims=True), 1), d.P.shape)
    flagged = d.m & d.visible & d.some_benign[..., None]
    np.testing.assert_allclose(changed[flagged], share[flagged], rtol=0, atol=EXACT)


@drawn
@given(draws(beta=0.0))
def test_beta_zero_silences_flagged_columns(d: Draw) -> None:
    changed = redistributed_columns(d.P, d.M, d.beta)
    assert not changed[d.m & d.some_benign[..., None]].any()


@drawn
@given(draws(beta=1.0))
def test_beta_one_leaves_benign_columns_their_fair_share_of_the_row(d: Draw) -> None:
    changed = redistributed_columns(d.P, d.M, d.beta)
    n, benign = d.visible.sum(-1), (d.visible & ~d.m).sum(-1)
    rows = d.some_benign
    wanted = d.sums[..., 0][rows] * benign[rows] / n[rows]
    np.testing.assert_allclose(np.where(d.m, 0, changed).sum(-1)[rows], wanted, rtol=0, atol=EXACT)


@drawn
@given(draws())
def test_benign_columns_keep_their_proportions(d: Draw) -> None:
    changed = redistributed_columns(d.P, d.M, d.beta)
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
    together = redistributed_columns(d.P, d.M, d.beta)
    for b in range(len(d.P)):
        assert np.array_equal(redistributed_columns(d.P[b : b + 1], d.M[b : b + 1], d.beta)[0], together[b])


def test_worked_example() -> None:
    """By hand: one row, five keys, the last masked, the first flagged; beta 0.8."""
    P = np.array([0.7, 0.1, 0.1, 0.1, 0.0]).reshape(1, 1, 1, 5)
    M = np.array([[True, False, False, False, True]])
    V = np.array([10.0, 1.0, 2.0, 3.0, 99.0]).reshape(1, 1, 5, 1)
    wanted = [0.2, 0.8 / 3, 0.8 / 3, 0.8 / 3, 0.0]
    np.testing.assert_allclose(redistributed_columns(P, M, 0.8).ravel(), wanted, rtol=0, atol=EXACT)
    assert attend(redistributed_columns(P, M, 0.8), V).item() == pytest.approx(0.2 * 10 + 0.8 * 2, abs=EXACT)


def test_a_row_keeps_the_sum_that_a_sink_or_a_gate_has_left_it() -> None:
    """By hand: half of the row has gone to a sink; the first of four keys is flagged; beta 1."""
    P = np.array([0.2, 0.1, 0.1, 0.1]).reshape(1, 1, 1, 4)
    found = redistributed_columns(P, np.array([[True, False, False, False]]), 1.0).ravel()
    np.testing.assert_allclose(found, [0.125] * 4, rtol=0, atol=EXACT)
