import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.debugset.checks import check_size
from atpatch_onnx.errors import DebugSetError

PARTS = ("fit", "calibration", "validation")


def numbered(pairs, labels=None):
    """Pair i has the clean input [i] and the counterfactual [-i - 1]."""
    clean = np.arange(pairs)[:, None]
    return DebugSet.from_pairs({"x": clean}, {"x": -clean - 1}, labels)


def contents(debug):
    return [row.tobytes() for row in debug.clean["x"]]


@st.composite
def sets(draw):
    """Pairs with many repeated clean inputs; the counterfactual of a pair may be the clean input of another."""
    pairs = draw(st.integers(3, 40))
    few = st.lists(st.integers(0, 50), min_size=pairs, max_size=pairs)
    clean, changed = np.array(draw(few))[:, None], np.array(draw(few))[:, None] + draw(st.sampled_from([1, 51]))
    assume((clean != changed).any())
    return DebugSet.from_pairs({"x": clean}, {"x": changed}, draw(st.none() | few), sensitive=np.arange(pairs))


def split(debug, seed=0):
    try:
        return debug.split(seed=seed)
    except DebugSetError:
        assume(False)


@settings(deadline=None)
@given(sets())
def test_parts_are_disjoint_in_content_and_complete(debug):
    parts = split(debug)
    rows = np.concatenate([getattr(parts, part).sensitive for part in PARTS])
    np.testing.assert_array_equal(np.sort(rows), np.arange(len(debug)))
    for part in PARTS:
        others = [getattr(parts, other) for other in PARTS if other != part]
        elsewhere = {row.tobytes() for other in others for row in (*other.clean["x"], *other.counterfactual["x"])}
        assert elsewhere.isdisjoint(contents(getattr(parts, part)))


@settings(deadline=None)
@given(sets())
def test_pairs_stay_together(debug):
    parts = split(debug)
    for part in PARTS:
        taken = getattr(parts, part)
        np.testing.assert_array_equal(taken.clean["x"], debug.clean["x"][taken.sensitive])
        np.testing.assert_array_equal(taken.counterfactual["x"], debug.counterfactual["x"][taken.sensitive])


@settings(deadline=None)
@given(sets(), st.integers(), st.randoms())
def test_same_seed_same_split_in_any_order_of_the_rows(debug, seed, random):
    first = split(debug, seed)
    order = random.sample(range(len(debug)), len(debug))
    again = debug.take(order).split(seed=seed)
    for part in PARTS:
        assert sorted(getattr(first, part).sensitive) == sorted(getattr(again, part).sensitive)


def test_another_seed_gives_another_split():
    debug = numbered(40)
    assert contents(debug.split(seed=1).fit) != contents(debug.split(seed=2).fit)


def test_this_split_never_changes():
    """A patch's figures name a seed; the parts must stay what they were."""
    assert numbered(12).split(seed=0).validation.clean["x"].ravel().tolist() == [0, 1, 7]


@settings(deadline=None)
@given(st.integers(3, 60))
def test_shares_are_met_to_within_one_pair(pairs):
    parts = numbered(pairs).split(fit=0.5, calibration=0.2, validation=0.3) if pairs >= 6 else numbered(pairs).split()
    shares = (0.5, 0.2, 0.3) if pairs >= 6 else (0.5, 0.25, 0.25)
    for part, share in zip(PARTS, shares, strict=True):
        assert abs(len(getattr(parts, part)) - share * pairs) <= 1


def test_labels_are_balanced():
    labels = np.repeat([0, 1, 2], [40, 400, 8])
    parts = numbered(448, labels).split()
    for part, share in zip(PARTS, (0.5, 0.25, 0.25), strict=True):
        counts = np.bincount(getattr(parts, part).labels, minlength=3)
        np.testing.assert_allclose(counts, np.array([40, 400, 8]) * share, atol=1)


def test_inputs_count_as_a_whole():
    """Rows that agree in one input but not in the other are different inputs."""
    same, other = np.zeros((30, 1)), np.arange(30.0)[:, None]
    debug = DebugSet.from_pairs({"a": same, "b": other}, {"a": same + 1, "b": other})
    assert len(debug.split().fit) == 15


@pytest.mark.parametrize(
    "shares",
    [
        {"fit": 0.6},
        {"fit": 0.75, "calibration": 0.25, "validation": 0.0},
        {"fit": 1.25, "calibration": 0.25, "validation": -0.5},
        {"fit": float("nan")},
    ],
)
def test_shares_are_checked(shares):
    with pytest.raises(DebugSetError, match="positive shares that add up to 1"):
        numbered(20).split(**shares)


def test_an_empty_part_is_refused():
    with pytest.raises(DebugSetError, match=r"validation: 0 .from 2 pairs, 2 of them"):
        numbered(2).split()
    copies = DebugSet.from_pairs({"x": np.zeros((50, 2))}, {"x": np.ones((50, 2))})
    with pytest.raises(DebugSetError, match=r"fit: 50, calibration: 0.*50 pairs, 1 of them"):
        copies.split()


def test_check_size_says_how_many_pairs_the_whole_set_should_hold():
    calibration = len(numbered(80).split().calibration)
    check_size(calibration, 80, 0.05)
    check_size(calibration, 80, 1)
    with pytest.raises(DebugSetError, match=r"at least 100 pairs .* 0.01; found 20 of the set's 80 .* to 400 pairs"):
        check_size(calibration, 80, 0.01)


def test_check_size_takes_the_parts_as_they_are():
    with pytest.raises(DebugSetError, match="to 60 pairs"):
        check_size(10, 30, 0.05)


@pytest.mark.parametrize("rate", [0, -0.1, 1.5, float("nan")])
def test_check_size_refuses_what_is_no_rate(rate):
    with pytest.raises(DebugSetError, match=r"^clean flag rate"):
        check_size(20, 80, rate)
