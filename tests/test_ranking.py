"""Which part is named first: the one that decides most, with the fewest tokens, whatever number of inputs has it."""

from itertools import combinations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from atpatch_onnx.discovery.alike import Group
from atpatch_onnx.discovery.ranking import ranked
from atpatch_onnx.discovery.transplant import Transplant
from atpatch_onnx.running.metrics import Rate


def part(hits, tokens, members, count=200):
    group = Group("site", 1, tuple(range(members)))
    success = Rate.of(np.arange(count) < hits)
    return Transplant(group, 0, tuple(range(tokens)), 0, 1.0, success, 0.0)


PARTS = st.lists(st.builds(part, st.integers(160, 200), st.integers(1, 5), st.integers(3, 9)), max_size=8)


@given(PARTS)
def test_none_comes_before_one_that_surely_decides_more(parts):
    found = ranked(parts)
    assert sorted(map(id, found)) == sorted(map(id, parts))
    for first, second in combinations(found, 2):
        assert first.success.high >= second.success.low


@given(PARTS)
def test_the_first_is_the_narrowest_of_the_most_decisive(parts):
    best = max((one.success.low for one in parts), default=0.0)
    alike = [(len(one.tokens), -len(one.group.members)) for one in parts if one.success.high >= best]
    if alike:
        first = ranked(parts)[0]
        assert (len(first.tokens), -len(first.group.members)) == min(alike)


def test_a_word_of_a_rare_trigger_is_named_before_many_words_of_praise():
    """As measured: one word of 10 inputs that turns 199 of 200, and five words of 84 that turn 196."""
    rare, praise = part(199, 1, 10), part(196, 5, 84)
    assert ranked([praise, rare]) == [rare, praise]
    assert ranked([praise, part(170, 1, 10)])[0] is praise, "what surely decides less is no better for being short"


def test_of_parts_that_are_alike_the_one_of_most_inputs_comes_first():
    few, many = part(200, 1, 3), part(199, 1, 39)
    assert ranked([few, many]) == [many, few]


def test_a_part_that_was_not_tested_has_no_rank():
    assert ranked([Transplant(Group("site", 1, (0,)), 0, (0,), 0, 0.5, None, 1.0)]) == []
