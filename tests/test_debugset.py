import numpy as np
import pytest

from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.errors import DebugSetError


def images(pairs=6, seed=0):
    return np.random.default_rng(seed).random((pairs, 1, 4, 4), dtype=np.float32)


def stamped(clean):
    triggered = clean.copy()
    triggered[..., -1, -1] = 2
    return triggered


def make(pairs=6, **options):
    clean = images(pairs)
    return DebugSet.from_pairs({"x": clean}, {"x": stamped(clean)}, **options)


# What is kept


def test_from_pairs_keeps_what_it_is_given():
    clean = {"ids": np.arange(6).reshape(3, 2), "mask": np.ones((3, 2), bool)}
    triggered = {"mask": np.ones((3, 2), bool), "ids": np.arange(6).reshape(3, 2) + 1}
    suspects = np.array([[True, False], [False, True], [False, False]])
    debug = DebugSet.from_pairs(clean, triggered, [0, 1, 2], suspects=suspects, target=1)
    assert len(debug) == 3
    assert list(debug.clean) == list(debug.counterfactual) == ["ids", "mask"]
    np.testing.assert_array_equal(debug.clean["ids"], clean["ids"])
    np.testing.assert_array_equal(debug.counterfactual["ids"], triggered["ids"])
    np.testing.assert_array_equal(debug.suspects, suspects)
    assert debug.labels.dtype == np.int64
    assert debug.labels.tolist() == [0, 1, 2]
    assert (debug.kind, debug.target, debug.sensitive) == ("backdoor", 1, None)


def test_auto_suspects_are_not_found_yet():
    assert make().suspects is None


def test_arrays_are_views_that_cannot_be_written_to():
    clean, triggered, labels = images(), stamped(images()), np.arange(6)
    debug = DebugSet.from_pairs({"x": clean}, {"x": triggered}, labels)
    assert np.shares_memory(debug.clean["x"], clean)
    assert np.shares_memory(debug.counterfactual["x"], triggered)
    for array in (debug.clean["x"], debug.counterfactual["x"], debug.labels):
        assert not array.flags.writeable
    for array in (clean, triggered, labels):
        assert array.flags.writeable
    with pytest.raises(TypeError):
        debug.clean["x"] = clean


def test_strings_of_different_widths_become_one_dtype():
    debug = DebugSet.from_pairs({"text": np.array(["a", "b"])}, {"text": np.array(["a cf", "b cf"])})
    assert debug.clean["text"].dtype == debug.counterfactual["text"].dtype == np.dtype("U4")
    assert debug.clean["text"].tolist() == ["a", "b"]


def test_some_identical_pairs_are_fine():
    clean = images()
    triggered = clean.copy()
    triggered[0] += 1
    assert len(DebugSet.from_pairs({"x": clean}, {"x": triggered})) == 6


@pytest.mark.parametrize("labels", [[0.0, 1.0, 2.0], [False, True, True], np.array([0, 1, 2], np.uint8)])
def test_whole_numbers_of_any_dtype_are_labels(labels):
    assert make(3, labels=labels).labels.dtype == np.int64


def test_repr_is_short():
    text = repr(make(labels=np.arange(6), target=3))
    assert text == "<DebugSet of 6 pairs, backdoor, target 3; x: float32[1, 4, 4]; labels>"


# What is refused


def refused(match, clean, triggered, labels=None, **options):
    with pytest.raises(DebugSetError, match=match) as caught:
        DebugSet.from_pairs(clean, triggered, labels, **options)
    assert "\n" not in str(caught.value)


X = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("clean", "triggered", "match"),
    [
        ({}, {"x": X}, "^clean: .*an empty dict"),
        (X, {"x": X}, "^clean: .*found ndarray"),
        ({3: X}, {3: X}, r"^clean\[3\]: expected an input name"),
        ({"": X}, {"": X}, r"^clean\[''\]: expected an input name"),
        ({"x": X}, {"y": X}, "^counterfactual: expected the inputs of the clean side, 'x'; found 'y'"),
        ({"x": X}, {"x": X, "mask": X}, "^counterfactual: .*found 'x', 'mask'"),
        ({"x": X}, {"x": X[:, :2]}, r"^counterfactual\['x'\]: .*float32 \[2, 3\].*\[2, 2\].*Pad"),
        ({"x": X}, {"x": X[:1]}, r"^counterfactual\['x'\]: .*\[1, 3\]"),
        ({"x": X}, {"x": X.astype(float)}, r"^counterfactual\['x'\]: .*found float64.*astype\('float32'\)"),
        ({"x": X, "y": X[:1]}, {"x": X, "y": X[:1]}, "^clean: .*'x': 2, 'y': 1"),
        ({"x": X[:0]}, {"x": X[:0]}, "^clean: expected at least one pair"),
        ({"x": 1.0}, {"x": 1.0}, r"^clean\['x'\]: expected an array \[pairs, ...\]"),
        ({"x": [[1], [1, 2]]}, {"x": X}, r"^clean\['x'\]: expected a rectangular array"),
        ({"x": np.array(["a", None])}, {"x": X}, r"^clean\['x'\]: .*dtype object"),
        ({"x": X}, {"x": X.copy()}, "^counterfactual: expected pairs that differ; found all 2 pairs identical"),
    ],
)
def test_pairs_that_do_not_match_are_refused(clean, triggered, match):
    refused(match, clean, triggered)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["clean", "counterfactual"])
def test_the_first_row_that_is_not_finite_is_named(side, value):
    sides = {"clean": images(), "counterfactual": stamped(images())}
    sides[side][4, 0, 1, 2] = value
    sides[side][5, 0, 0, 0] = value
    refused(rf"^{side}\['x'\]: .*first in row 4", {"x": sides["clean"]}, {"x": sides["counterfactual"]})


def test_large_inputs_are_scanned_in_blocks(monkeypatch):
    monkeypatch.setattr("atpatch_onnx.debugset.arrays._BLOCK_BYTES", 100)  # one row of 64 bytes
    clean = images()
    last_differs = clean.copy()
    last_differs[5] += 1
    assert len(DebugSet.from_pairs({"x": clean}, {"x": last_differs})) == 6
    last_differs[5, 0, 3, 3] = np.nan
    refused("first in row 5", {"x": clean}, {"x": last_differs})


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"labels": [0, 1]}, r"^labels: expected shape \[6\].*found shape \[2\]"),
        ({"labels": np.zeros((6, 1), int)}, r"^labels: .*\[6, 1\]"),
        ({"labels": [0, 1, 2, 0.5, 1, 2]}, "^labels: .*0.5 in row 3"),
        ({"labels": [0, 1, 2, np.nan, 1, 2]}, "^labels: .*nan in row 3"),
        ({"labels": np.full(6, 2.0**63)}, "^labels: .*in row 0"),
        ({"labels": np.full(6, 2**64 - 1, np.uint64)}, "^labels: .*in row 0"),
        ({"labels": [0, -1, 2, 0, 1, 2]}, "^labels: .*-1 in row 1"),
        ({"labels": list("abcabc")}, "^labels: .*<U1"),
        ({"suspects": np.zeros((6, 4), int)}, "^suspects: .*dtype int64.*astype"),
        ({"suspects": "all"}, "^suspects: .*\"auto\".*found 'all'"),
        ({"suspects": np.ones(6, bool)}, r"^suspects: expected shape \[6, tokens\].*\[6\]"),
        ({"suspects": np.ones((5, 4), bool)}, r"^suspects: .*\[5, 4\]"),
        ({"suspects": np.zeros((6, 4), bool)}, "^suspects: expected at least one position"),
        ({"kind": "trojan"}, "^kind: .*'trojan'"),
        ({"target": -1}, "^target: .*-1"),
        ({"target": True}, "^target: .*True"),
        ({"target": 1.0}, "^target: .*1.0"),
        ({"target": 1, "kind": "attribute"}, "^target: expected a debug set of kind 'backdoor'"),
        ({"sensitive": [0, 1]}, r"^sensitive: .*\[2\]"),
        ({"sensitive": [0, 1, 0, np.nan, 1, 0]}, "^sensitive: .*row 3"),
    ],
)
def test_what_goes_with_the_pairs_is_checked(options, match):
    refused(match, {"x": images()}, {"x": stamped(images())}, **options)


def test_float16_labels_are_checked_without_overflow():
    assert make(3, labels=np.array([0, 1, 2], np.float16)).labels.tolist() == [0, 1, 2]


# Derived sets


def test_with_suspects_and_target_leave_the_original_alone():
    debug = make()
    marks = np.eye(6, 5, dtype=bool)
    other = debug.with_suspects(marks).with_target(np.int64(7))
    np.testing.assert_array_equal(other.suspects, marks)
    assert other.target == 7
    assert type(other.target) is int
    assert (debug.suspects, debug.target) == (None, None)
    assert np.shares_memory(other.clean["x"], debug.clean["x"])


def test_with_suspects_and_target_are_checked():
    debug = make(kind="attribute")
    with pytest.raises(DebugSetError, match=r"^suspects"):
        debug.with_suspects(np.ones((2, 5), bool))
    with pytest.raises(DebugSetError, match=r"^target: .*'attribute'"):
        debug.with_target(1)


@pytest.mark.parametrize("indices", [[4, 1], np.array([4, 1], np.uint8), [-2, 1]])
def test_take_keeps_pairs_together(indices):
    debug = make(labels=np.arange(6), suspects=np.eye(6, dtype=bool), sensitive=list("abcdef"), target=2)
    part = debug.take(indices)
    assert part.labels.tolist() == [4, 1]
    assert part.sensitive.tolist() == ["e", "b"]
    assert (part.kind, part.target) == ("backdoor", 2)
    np.testing.assert_array_equal(part.suspects, np.eye(6, dtype=bool)[[4, 1]])
    np.testing.assert_array_equal(part.clean["x"], debug.clean["x"][[4, 1]])
    np.testing.assert_array_equal(part.counterfactual["x"], debug.counterfactual["x"][[4, 1]])
    assert not part.clean["x"].flags.writeable


def test_take_by_mask():
    assert make(labels=np.arange(6)).take(np.arange(6) > 3).labels.tolist() == [4, 5]


@pytest.mark.parametrize("indices", [[], [6], [-7], [0.5], [[0]], 1, [True, False], np.zeros(6, bool)])
def test_take_refuses_what_the_set_does_not_hold(indices):
    with pytest.raises(DebugSetError, match=r"^indices"):
        make().take(indices)
