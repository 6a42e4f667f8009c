"""Which output holds the predictions, and what is read from it."""

import numpy as np
import onnx_ir as ir
import pytest
from models import Net
from scipy.special import expit, softmax

from atpatch_onnx.errors import RunError
from atpatch_onnx.running.predictions import classes, confidences, prediction_output


def model(*outputs: tuple[str, ir.DataType | None, tuple[int | str, ...] | None]) -> ir.Model:
    values = [
        ir.Value(
            name=name,
            shape=None if shape is None else ir.Shape(shape),
            type=None if dtype is None else ir.TensorType(dtype),
        )
        for name, dtype, shape in outputs
    ]
    return ir.Model(ir.Graph([], values, nodes=[], opset_imports={"": 18}), ir_version=10)


FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def test_the_first_float_output_of_rank_two_is_taken():
    assert prediction_output(Net().model()) == "logits"
    outputs = (("ids", INT64, ("n", 3)), ("hidden", FLOAT, ("n", 4, 8)), ("scores", ir.DataType.FLOAT16, ("n", 3)))
    assert prediction_output(model(*outputs, ("more", FLOAT, ("n", 3)))) == "scores"


def test_a_named_output_is_taken_and_a_wrong_name_refused():
    outputs = model(("a", FLOAT, ("n", 3)), ("b", FLOAT, ("n", 3)))
    assert prediction_output(outputs, "b") == "b"
    with pytest.raises(RunError, match=r"expected an output named 'c'; found a, b\. Name the output"):
        prediction_output(outputs, "c")


def test_our_own_outputs_are_no_predictions():
    with pytest.raises(RunError, match="found none"):
        prediction_output(model(("atpatch/score", FLOAT, ("n", 1))))


def test_an_only_output_of_unknown_shape_is_taken():
    assert prediction_output(model(("y", None, None))) == "y"
    with pytest.raises(RunError):
        prediction_output(model(("y", None, None), ("z", None, None)))


def test_classes():
    assert classes(np.float32([[1, 3, 2], [5, 5, 0]])).tolist() == [1, 0]
    assert classes(np.float32([[-1], [0], [0.5]])).tolist() == [0, 0, 1]
    assert classes(np.zeros((2, 3), np.float16)).dtype == np.int64


def test_confidences_are_scipys():
    logits = np.random.default_rng(0).normal(scale=30, size=(50, 4)).astype(np.float32)
    # float64 rounding of sums of four
    np.testing.assert_allclose(confidences(logits), softmax(logits.astype(np.float64), axis=1), atol=1e-14)
    one = logits[:, :1].astype(np.float64)
    np.testing.assert_allclose(confidences(one), np.concatenate([expit(-one), expit(one)], axis=1), atol=1e-14)
