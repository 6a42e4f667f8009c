import numpy as np
import pytest

from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.errors import DebugSetError

IMAGES = np.random.default_rng(0).random((5, 1, 4, 4), dtype=np.float32)
LABELS = np.array([0, 1, 2, 1, 0])


def stamp(inputs):
    inputs["x"][..., -1, -1] = 2
    return inputs


# Triggers


def test_trigger_is_stamped_on_a_copy():
    before = IMAGES.copy()
    debug = DebugSet.from_trigger({"x": IMAGES}, stamp, LABELS)
    np.testing.assert_array_equal(IMAGES, before)
    np.testing.assert_array_equal(debug.clean["x"], before)
    np.testing.assert_array_equal(debug.counterfactual["x"][..., -1, -1], 2)
    np.testing.assert_array_equal(debug.counterfactual["x"][..., :-1, :], before[..., :-1, :])
    assert (debug.kind, debug.target, debug.suspects) == ("backdoor", None, None)


def test_inputs_of_the_target_class_are_dropped():
    suspects = np.eye(5, dtype=bool)
    debug = DebugSet.from_trigger({"x": IMAGES}, stamp, LABELS, target=1, suspects=suspects)
    assert debug.labels.tolist() == [0, 2, 0]
    assert debug.target == 1
    np.testing.assert_array_equal(debug.clean["x"], IMAGES[[0, 2, 4]])
    np.testing.assert_array_equal(debug.suspects, suspects[[0, 2, 4]])


@pytest.mark.parametrize(
    ("labels", "options"),
    [(LABELS, {"target": 1, "drop_target": False}), (LABELS, {}), (None, {"target": 1}), (LABELS, {"target": 7})],
)
def test_inputs_are_kept_where_dropping_is_off_or_nothing_is_known(labels, options):
    assert len(DebugSet.from_trigger({"x": IMAGES}, stamp, labels, **options)) == 5


@pytest.mark.parametrize(
    ("trigger", "match"),
    [
        (lambda inputs: None, "^trigger: .*found NoneType"),
        (lambda inputs: inputs["x"], "^trigger: .*found ndarray"),
        (lambda inputs: {"y": inputs["x"]}, "^trigger: .*'x'; found a dict with 'y'"),
        (lambda inputs: inputs, "^counterfactual: expected pairs that differ"),
        (lambda inputs: {"x": inputs["x"] * np.float64(2) + np.zeros(1)}, r"^counterfactual\['x'\]: .*float64"),
    ],
)
def test_triggers_that_go_wrong_are_refused(trigger, match):
    with pytest.raises(DebugSetError, match=match):
        DebugSet.from_trigger({"x": IMAGES}, trigger)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"labels": np.ones(5, int), "target": 1}, "all 5 inputs labelled 1"),
        ({"labels": LABELS[:3], "target": 1}, "^labels"),
        ({"labels": LABELS, "target": "cat"}, "^target"),
        ({"suspects": np.ones((3, 4), bool)}, "^suspects"),
    ],
)
def test_what_goes_with_the_trigger_is_checked(options, match):
    with pytest.raises(DebugSetError, match=match):
        DebugSet.from_trigger({"x": IMAGES}, stamp, **options)


# Attributes

TABLE = np.array([[0.5, 0], [1.5, 1], [2.5, 1]], np.float32)


def test_two_values_swap():
    debug = DebugSet.from_attribute({"table": TABLE}, name="table", column=1, labels=[0, 1, 1])
    np.testing.assert_array_equal(debug.clean["table"], TABLE)
    np.testing.assert_array_equal(debug.counterfactual["table"], [[0.5, 1], [1.5, 0], [2.5, 0]])
    assert debug.counterfactual["table"].dtype == np.float32
    assert debug.sensitive.tolist() == [0, 1, 1]
    assert (debug.kind, debug.target, debug.labels.tolist()) == ("attribute", None, [0, 1, 1])


@pytest.mark.parametrize("shape", [(4,), (4, 1)])
def test_more_values_follow_each_other_in_the_order_given(shape):
    race, age = np.array([3, 1, 2, 3]).reshape(shape), np.arange(4.0)
    debug = DebugSet.from_attribute({"race": race, "age": age}, name="race", values=[3, 2, 1])
    np.testing.assert_array_equal(debug.counterfactual["race"], np.array([2, 3, 1, 2]).reshape(shape))
    np.testing.assert_array_equal(debug.counterfactual["age"], age)
    assert debug.sensitive.tolist() == [3, 1, 2, 3]


def test_values_may_be_missing_from_the_data():
    debug = DebugSet.from_attribute({"sex": np.array([1, 1])}, name="sex", values=[0, 1])
    assert debug.counterfactual["sex"].tolist() == [0, 0]


def test_values_are_rounded_like_the_data():
    table = np.array([[-0.7], [1.3]], np.float32)
    debug = DebugSet.from_attribute({"t": table}, name="t", column=0, values=[-0.7, 1.3])
    np.testing.assert_array_equal(debug.counterfactual["t"], table[::-1])


def test_text_values_may_be_longer_than_the_data():
    debug = DebugSet.from_attribute({"sex": np.array(["Male"])}, name="sex", values=["Male", "Female"])
    assert debug.counterfactual["sex"].tolist() == ["Female"]
    assert debug.sensitive.tolist() == ["Male"]


def test_bool_values_swap():
    debug = DebugSet.from_attribute({"sex": np.array([True, False])}, name="sex")
    assert debug.counterfactual["sex"].tolist() == [False, True]


def test_change_function():
    debug = DebugSet.from_attribute({"t": TABLE}, name="t", column=0, change=lambda age: np.where(age > 1, 20, 60))
    np.testing.assert_array_equal(debug.counterfactual["t"][:, 0], np.float32([60, 20, 20]))
    assert debug.counterfactual["t"].dtype == np.float32


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"name": "age"}, "^name: expected one of the inputs 't'"),
        ({"name": "t"}, r"^inputs\['t'\]: expected shape \[rows\] or \[rows, 1\]; found shape \[3, 2\]"),
        ({"name": "t", "column": 2}, r"^inputs\['t'\]: .*column 2; found shape \[3, 2\]"),
        ({"name": "t", "column": 1, "values": [0]}, "^values: expected at least two"),
        ({"name": "t", "column": 1, "values": [1, 1]}, "^values: expected at least two different"),
        ({"name": "t", "column": 1, "values": ["M", "F"]}, "^values: .*float32.*'M', 'F'"),
        ({"name": "t", "column": 1, "values": [0, 2]}, "1.0 in row 1"),
        ({"name": "t", "column": 1, "values": [0, 1], "change": np.negative}, "^values: .*found both"),
        ({"name": "t", "column": 1, "change": lambda v: v[:2]}, r"^change: expected float32 \[3\]"),
        ({"name": "t", "column": 1, "change": lambda v: v.astype(str)}, "^change: .*<U32"),
    ],
)
def test_attributes_that_do_not_fit_are_refused(options, match):
    with pytest.raises(DebugSetError, match=match):
        DebugSet.from_attribute({"t": TABLE}, **options)


@pytest.mark.parametrize("values", [[0.5, 1.0], [np.nan, 1.0], [1, 2**70]])
def test_values_that_the_dtype_cannot_hold_are_refused(values):
    with pytest.raises(DebugSetError, match=r"^values"):
        DebugSet.from_attribute({"sex": np.array([0, 1])}, name="sex", values=values)


def test_an_attribute_that_never_varies_needs_its_values():
    with pytest.raises(DebugSetError, match=r"^values: expected at least two"):
        DebugSet.from_attribute({"sex": np.array([1, 1])}, name="sex")
