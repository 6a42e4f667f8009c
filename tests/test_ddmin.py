"""Delta debugging: 1-minimal, each subset asked once."""

from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from atpatch_onnx.fitting.ddmin import ddmin


class Asked:
    """A test that counts how often it is asked what."""

    def __init__(self, suffices: Callable[[frozenset], bool]) -> None:
        self.suffices, self.subsets = suffices, []

    def __call__(self, subset: frozenset) -> bool:
        self.subsets.append(subset)
        return self.suffices(subset)


def check(elements: list[int], suffices: Callable[[frozenset], bool]) -> list[int]:
    """What every answer must be: sufficient, 1-minimal, in order; no subset asked twice, none of them empty."""
    asked = Asked(suffices)
    found = ddmin(elements, asked)
    assert found == [e for e in elements if e in set(found)]
    assert len(asked.subsets) == len(set(asked.subsets))
    assert frozenset() not in asked.subsets
    assert suffices(frozenset(found))
    if len(found) > 1:
        assert not any(suffices(frozenset(found) - {e}) for e in found)
    return found


@settings(deadline=None, derandomize=True)
@given(st.sets(st.integers(0, 19), min_size=1), st.integers(1, 20))
def test_a_monotone_test_gives_exactly_what_is_needed(needed, size):
    needed = {e for e in needed if e < size} or {0}
    assert set(check(list(range(size)), lambda subset: needed <= subset)) == needed


@settings(deadline=None, derandomize=True)
@given(st.lists(st.sets(st.integers(0, 9), min_size=1), min_size=1, max_size=4))
def test_a_monotone_test_with_alternatives_gives_one_of_them(alternatives):
    alternatives = [*alternatives, set(range(10))]
    found = set(check(list(range(10)), lambda subset: any(a <= subset for a in alternatives)))
    assert found in alternatives


@settings(deadline=None, derandomize=True)
@given(st.integers(1, 8), st.data())
def test_any_test_at_all_gives_a_1_minimal_set(size, data):
    """Non-monotone: which subsets suffice is drawn, the whole set excepted."""
    passing = data.draw(st.sets(st.sets(st.integers(0, size - 1), min_size=1).map(frozenset), max_size=40))
    everything = frozenset(range(size))
    check(list(range(size)), lambda subset: subset == everything or subset in passing)


def test_the_example_of_the_paper():
    """Zeller and Hildebrandt 2002, figure 4: of eight changes, 1, 7 and 8 are needed together."""
    assert check(list(range(1, 9)), {1, 7, 8}.issubset) == [1, 7, 8]


def test_one_needed_element_is_found_by_bisection():
    asked = Asked(lambda subset: 5 in subset)
    assert ddmin(list(range(64)), asked) == [5]
    assert len(asked.subsets) <= 2 * 6  # at most both halves of each of log2(64) steps


def test_everything_needed_stays():
    everything = frozenset(range(8))
    assert check(list(range(8)), lambda subset: subset == everything) == list(range(8))


def test_one_or_no_element_is_not_asked_about():
    asked = Asked(lambda subset: True)
    assert ddmin(["only"], asked) == ["only"]
    assert ddmin([], asked) == []
    assert not asked.subsets
