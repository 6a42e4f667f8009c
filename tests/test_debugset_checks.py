import numpy as np
import pytest

from atpatch_onnx.debugset import DebugSet, InputSpec
from atpatch_onnx.debugset.checks import check_effect, pairs_needed
from atpatch_onnx.errors import DebugSetError

IDS = np.arange(12).reshape(3, 4)
DEBUG = DebugSet.from_pairs({"ids": IDS, "mask": IDS > 0}, {"ids": IDS + 1, "mask": IDS > 0})


def specs(**changes):
    declared = {"ids": (np.int64, ("batch", "tokens")), "mask": (np.bool_, (1, None))} | changes
    return {name: InputSpec(name, np.dtype(dtype), shape) for name, (dtype, shape) in declared.items()}


@pytest.mark.parametrize("shape", [("batch", "tokens"), (None, 4), (8, 4)])
def test_inputs_that_fit_pass(shape):
    DEBUG.check_inputs(specs(ids=(np.int64, shape), mask=(np.bool_, shape)))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (
            {"types": (np.int64, ("batch", 4))},
            "'ids', 'mask', 'types'; found .*missing: 'types'; not the model's: none",
        ),
        ({"ids": (np.int32, ("batch", 4))}, r"'ids': expected dtype int32; found dtype int64.*astype\('int32'\)"),
        ({"ids": (np.int64, ("batch", 5))}, r"'ids': expected shape \[batch, 5\]; found shape \[3, 4\]"),
        ({"ids": (np.int64, ("batch",))}, r"'ids': expected shape \[batch\]"),
        ({"ids": (np.int64, (None, "heads", 4))}, r"'ids': expected shape \[\?, heads, 4\]"),
        ({"ids": (np.int64, ())}, r"'ids': expected shape \[\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes, match):
    with pytest.raises(DebugSetError, match=match):
        DEBUG.check_inputs(specs(**changes))


def test_extra_inputs_are_refused():
    declared = specs()
    del declared["mask"]
    with pytest.raises(DebugSetError, match="missing: none; not the model's: 'mask'"):
        DEBUG.check_inputs(declared)


@pytest.mark.parametrize("dtype", [object, str])
def test_text_fits_whatever_numpy_calls_it(dtype):
    debug = DebugSet.from_pairs({"text": ["a", "b"]}, {"text": ["a cf", "b cf"]})
    debug.check_inputs({"text": InputSpec("text", np.dtype(dtype), ("batch",))})


def test_one_changed_prediction_is_an_effect():
    check_effect([0, 1, 2], [0, 1, 1], pairs=3, attribute=False)


@pytest.mark.parametrize(("kind", "advice"), [("backdoor", "before normalisation"), ("attribute", "right column")])
def test_no_effect_is_refused_with_advice(kind, advice):
    with pytest.raises(DebugSetError, match=f"same prediction on both sides of all 3 pairs.*{advice}"):
        check_effect([0, 1, 2], np.array([0, 1, 2], np.int32), pairs=3, attribute=kind == "attribute")


@pytest.mark.parametrize(
    ("predictions", "match"), [([0, 1], r"\[2\]"), (np.zeros((3, 2)), r"\[3, 2\]"), ([0.1, 0.2, 0.3], "argmax")]
)
def test_predictions_are_checked(predictions, match):
    with pytest.raises(DebugSetError, match=f"^counterfactual_predictions.*{match}"):
        check_effect([0, 1, 2], predictions, pairs=3, attribute=False)


@pytest.mark.parametrize("pairs", [1, 3, 49, 98, 1000, 12345])
def test_one_flagged_input_among_the_pairs_needed_is_the_rate(pairs):
    assert pairs_needed(1 / pairs) == pairs
    assert pairs_needed(0.99 / pairs) > pairs
