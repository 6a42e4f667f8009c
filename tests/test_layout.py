"""Layout patterns: read, written, refused, and what they bring a tensor to, against reshapes written out by hand."""

import itertools
from dataclasses import dataclass
from math import prod

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from atpatch_onnx.matching.layout import MAP, OUTPUT, VALUES, Layout, canonical

PATTERNS = {
    "nhqk": ("n", "h", "q", "k"),
    "(nh)qk": ("nh", "q", "k"),
    "n1qk": ("n", "", "q", "k"),
    "nk(hd)": ("n", "k", "hd"),
    "bwhqk": ("b", "w", "h", "q", "k"),
    "hnqk": ("h", "n", "q", "k"),
    "nhgqk": ("n", "h", "g", "q", "k"),
    "nh1kd": ("n", "h", "", "k", "d"),
    "q(nhg)d": ("q", "nhg", "d"),
}


@pytest.mark.parametrize(("pattern", "axes"), PATTERNS.items())
def test_a_pattern_is_read_and_written(pattern: str, axes: tuple[str, ...]) -> None:
    layout = Layout.parse(pattern)
    assert layout.axes == axes
    assert str(layout) == pattern


@pytest.mark.parametrize(
    "pattern",
    ["nhqx", "nhqq", "(nh)hqk", "(nhqk", "nh)qk", "nh qk", "n()qk", "(n)hqk", "(n1)qk", "n2qk", "NHQK", "n-hqk"],
)
def test_what_is_no_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="is no layout"):
        Layout.parse(pattern)


def test_the_canonical_patterns_are_canonical() -> None:
    for pattern in (MAP, VALUES, OUTPUT):
        assert Layout.parse(pattern).is_canonical
    assert Layout.parse("n1qk").is_canonical, "an axis of size one stands where the heads would"
    for pattern in PATTERNS.keys() - {"nhqk", "n1qk"}:
        assert not Layout.parse(pattern).is_canonical, pattern


def test_groups_are_the_four_canonical_axes() -> None:
    assert Layout.parse("bwhgqk").groups == ("bw", "hg", "q", "k")
    assert Layout.parse("dkh").groups == ("", "h", "k", "d")
    assert Layout.parse("(nh)qk").groups == ("n", "h", "q", "k")


N, H, G, W, Q, K, D = 2, 3, 2, 4, 5, 7, 6


def numbers(*shape: int) -> np.ndarray:
    """An array in which every entry is another."""
    return np.arange(prod(shape), dtype=np.float32).reshape(shape)


def test_canonical_is_the_reshape_and_transpose_that_one_would_write() -> None:
    def same(pattern: str, array: np.ndarray, wanted: np.ndarray, **sizes: int) -> None:
        found = canonical(array, pattern, sizes)
        assert found.dtype == array.dtype
        assert np.array_equal(found, wanted), pattern

    x = numbers(N, H, Q, K)
    same("nhqk", x, x)
    same("hnqk", x, x.swapaxes(0, 1))
    same("nhkq", x, x.swapaxes(2, 3))
    same("(nh)qk", numbers(N * H, Q, K), numbers(N, H, Q, K), h=H)
    same("(hn)qk", numbers(H * N, Q, K), numbers(H, N, Q, K).swapaxes(0, 1), h=H)
    same("(nh)qk", numbers(N * H, Q, K), numbers(N, H, Q, K), n=N)
    same("n1qk", numbers(N, 1, Q, K), numbers(N, 1, Q, K))
    same("nqk", numbers(N, Q, K), numbers(N, 1, Q, K))
    same("hqk", numbers(H, Q, K), numbers(1, H, Q, K))
    same("nk(hd)", numbers(N, K, H * D), numbers(N, K, H, D).transpose(0, 2, 1, 3), h=H)
    same("nk(dh)", numbers(N, K, D * H), numbers(N, K, D, H).transpose(0, 3, 1, 2), h=H)
    same("bwhqk", numbers(N, W, H, Q, K), numbers(N * W, H, Q, K))
    same("wbhqk", numbers(W, N, H, Q, K), numbers(W, N, H, Q, K).swapaxes(0, 1).reshape(N * W, H, Q, K))
    same("nhgqk", numbers(N, H, G, Q, K), numbers(N, H * G, Q, K))
    same("nghqk", numbers(N, G, H, Q, K), numbers(N, G, H, Q, K).swapaxes(1, 2).reshape(N, H * G, Q, K))
    same("(bhw)qk", numbers(N * H * W, Q, K), numbers(N, H, W, Q, K).swapaxes(1, 2).reshape(-1, H, Q, K), h=H, w=W)
    same("nh1kd", numbers(N, H, 1, K, D), numbers(N, H, K, D))


@dataclass(frozen=True)
class Drawn:
    pattern: str
    sizes: dict[str, int]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor, by its own axes."""
        return tuple(prod(self.sizes[letter] for letter in axis) for axis in Layout.parse(self.pattern).axes)

    @property
    def wanted(self) -> tuple[int, ...]:
        """Of the canonical axes."""
        size = {letter: self.sizes.get(letter, 1) for letter in "nbwhgqkd"}
        last = [size[letter] for letter in "qkd" if letter in self.sizes]
        return (size["n"] * size["b"] * size["w"], size["h"] * size["g"], *last)


@st.composite
def layouts(draw: st.DrawFn) -> Drawn:
    """Letters of a map, of values or of an output in any order, some folded, with axes of size one between them."""
    lead = draw(st.sampled_from(["n", "b", "w", "bw", ""])) + draw(st.sampled_from(["h", "g", "hg", ""]))
    letters = draw(st.permutations([*lead, *draw(st.sampled_from(["qk", "kd", "qd"]))]))
    cuts = draw(st.lists(st.booleans(), min_size=len(letters) - 1, max_size=len(letters) - 1))
    axes, folded = [], letters[0]
    for letter, cut in zip(letters[1:], cuts, strict=True):
        if cut:
            axes.append(folded)
            folded = letter
        else:
            folded += letter
    axes.append(folded)
    for _ in range(draw(st.integers(0, 2))):
        axes.insert(draw(st.integers(0, len(axes))), "")
    sizes = dict(zip(letters, draw(st.lists(st.integers(1, 4), min_size=9, max_size=9)), strict=False))
    return Drawn(str(Layout(tuple(axes))), sizes)


@given(layouts())
def test_drawn_patterns_are_read_back(drawn: Drawn) -> None:
    assert str(Layout.parse(drawn.pattern)) == drawn.pattern


@given(layouts())
def test_every_entry_comes_to_where_its_letters_say(drawn: Drawn) -> None:
    layout = Layout.parse(drawn.pattern)
    found = canonical(numbers(*drawn.shape), drawn.pattern, drawn.sizes)
    assert found.shape == drawn.wanted
    array = numbers(*drawn.shape)
    for place in itertools.product(*(range(drawn.sizes[letter]) for letter in layout.letters)):
        at = dict(zip(layout.letters, place, strict=True))
        before = tuple(_folded(axis, at, drawn.sizes) for axis in layout.axes)
        after = tuple(_folded(group, at, drawn.sizes) for group in layout.groups)
        assert found[after] == array[before]


def _folded(letters: str, at: dict[str, int], sizes: dict[str, int]) -> int:
    """The place on an axis into which these letters are folded, outer ones first."""
    place = 0
    for letter in letters:
        place = place * sizes[letter] + at[letter]
    return place


@given(layouts(), st.data())
def test_one_size_of_each_fold_may_be_left_out(drawn: Drawn, data: st.DataObject) -> None:
    folds = [axis for axis in Layout.parse(drawn.pattern).axes if len(axis) > 1]
    assume(folds)
    left_out = {data.draw(st.sampled_from(axis)) for axis in folds}
    some = {letter: size for letter, size in drawn.sizes.items() if letter not in left_out}
    array = numbers(*drawn.shape)
    assert np.array_equal(canonical(array, drawn.pattern, some), canonical(array, drawn.pattern, drawn.sizes))
