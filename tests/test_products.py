"""Which axis of the map, the values and the output is which, whatever operator multiplies them; checked by a run."""

import numpy as np
import onnx_ir as ir
import pytest
from models import run
from test_matching_forms import text_model

from atpatch_onnx.matching.chains import Meeting
from atpatch_onnx.matching.products import Product, read_product
from atpatch_onnx.matching.view import view

SIZES = {"q": 5, "k": 7, "d": 3, "0": 2, "1": 4}


def product(call: str, map_shape: str, value_shape: str, *, index: int, opset: int = 18) -> tuple[ir.Model, Meeting]:
    """A model `y = call` of a map p and values v, and where the map meets the values, as operand `index`."""
    model = text_model(f"y = {call}", f"float[{map_shape}] p, float[{value_shape}] v", "float y", opset=opset)
    model.graph.outputs[0].shape = None
    (node,) = model.graph
    value = node.inputs[index]
    assert value is not None
    assert value.name == "p", "the map stands where the test says"
    return model, Meeting(node, index, value, ())


ACCEPTED = {
    "MatMul, map on the left": ("MatMul (p, v)", "2,4,5,7", "2,4,7,3", 0, ("01qk", "01kd", "01qd")),
    "MatMul, map on the right": ("MatMul (v, p)", "2,4,7,5", "2,4,3,7", 1, ("01kq", "01dk", "01dq")),
    "MatMul of three axes": ("MatMul (p, v)", "2,5,7", "2,7,3", 0, ("0qk", "0kd", "0qd")),
    "MatMul of two axes": ("MatMul (p, v)", "5,7", "7,3", 0, ("qk", "kd", "qd")),
    "MatMul, values broadcast": ("MatMul (p, v)", "2,4,5,7", "4,7,3", 0, ("01qk", "1kd", "01qd")),
    "MatMul, the map broadcast": ("MatMul (p, v)", "4,5,7", "2,4,7,3", 0, ("1qk", "01kd", "01qd")),
    "Gemm": ("Gemm (p, v)", "5,7", "7,3", 0, ("qk", "kd", "qd")),
    "Gemm, map transposed": ("Gemm <transA = 1> (p, v)", "7,5", "7,3", 0, ("kq", "kd", "qd")),
    "Gemm, values transposed": ("Gemm <transB = 1> (p, v)", "5,7", "3,7", 0, ("qk", "dk", "qd")),
    "Gemm, both transposed": ("Gemm <transA = 1, transB = 1> (p, v)", "7,5", "3,7", 0, ("kq", "dk", "qd")),
    "Gemm, map on the right": ("Gemm (v, p)", "7,5", "3,7", 1, ("kq", "dk", "dq")),
    "Gemm, map on the right and transposed": ("Gemm <transB = 1> (v, p)", "5,7", "3,7", 1, ("qk", "dk", "dq")),
    "FusedMatMul": ("com.microsoft.FusedMatMul (p, v)", "2,4,5,7", "2,4,7,3", 0, ("01qk", "01kd", "01qd")),
    "FusedMatMul, transA": (
        "com.microsoft.FusedMatMul <transA = 1> (p, v)", "2,4,7,5", "2,4,7,3", 0, ("01kq", "01kd", "01qd")
    ),
    "FusedMatMul, transB": (
        "com.microsoft.FusedMatMul <transB = 1> (p, v)", "2,4,5,7", "2,4,3,7", 0, ("01qk", "01dk", "01qd")
    ),
    "FusedMatMul, both, map on the right": (
        "com.microsoft.FusedMatMul <transA = 1, transB = 1> (v, p)", "2,4,5,7", "2,4,7,3", 1, ("01qk", "01kd", "01dq")
    ),
    "Einsum": ('Einsum <equation = "bhqk,bhkd->bhqd"> (p, v)', "2,4,5,7", "2,4,7,3", 0, ("01qk", "01kd", "01qd")),
    "Einsum of other letters and spaces": (
        'Einsum <equation = "x y a z, x z y c -> x a y c"> (p, v)', "2,4,5,7", "2,7,4,3", 0, ("01qk", "0k1d", "0q1d")
    ),
    "Einsum, values first": (
        'Einsum <equation = "bkhd,bhqk->bqhd"> (v, p)', "2,4,5,7", "2,7,4,3", 1, ("01qk", "0k1d", "0q1d")
    ),
    "Einsum, one head of values": (
        'Einsum <equation = "bhqk,bkd->bhqd"> (p, v)', "2,4,5,7", "2,7,3", 0, ("01qk", "0kd", "01qd")
    ),
    "Einsum, heads last": (
        'Einsum <equation = "bqkh,bkhd->bqhd"> (p, v)', "2,5,7,4", "2,7,4,3", 0, ("0qk1", "0k1d", "0q1d")
    ),
    "Einsum with an ellipsis": (
        'Einsum <equation = "...qk,...kd->...qd"> (p, v)', "2,4,5,7", "2,4,7,3", 0, ("01qk", "01kd", "01qd")
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", ACCEPTED)
def test_axes_of_a_product(case: str) -> None:
    call, map_shape, value_shape, index, (of_map, of_values, of_output) = ACCEPTED[case]
    model, meeting = product(call, map_shape, value_shape, index=index)
    found = read_product(meeting, view(model))
    assert isinstance(found, Product), found
    assert (found.map, found.values, found.output) == (tuple(of_map), tuple(of_values), tuple(of_output))
    assert found.value.name == "v"
    assert set(found.leading) == set(of_map) - {"q", "k"}


@pytest.mark.parametrize("case", ACCEPTED)
def test_the_axes_say_what_the_operator_computes(case: str) -> None:
    call, map_shape, value_shape, index, terms = ACCEPTED[case]
    model, _ = product(call, map_shape, value_shape, index=index)
    rng = np.random.default_rng(0)
    p, v = (rng.normal(size=[SIZES[axis] for axis in term]).astype(np.float32) for term in terms[:2])
    letters = str.maketrans("01", "bh")
    equation = f"{terms[0]},{terms[1]}->{terms[2]}".translate(letters)
    # float32 sums of seven products
    np.testing.assert_allclose(run(model, {"p": p, "v": v})["y"], np.einsum(equation, p, v), rtol=1e-5, atol=1e-5)


REFUSED = {
    "an operand more": ("Gemm (p, v, p)", "5,7", "7,7", "in Gemm with 3 operands"),
    "transposed batches": (
        "com.microsoft.FusedMatMul <transBatchA = 1> (p, v)", "4,2,5,7", "2,4,7,3", "with transposed batches"
    ),
    "no output term": ('Einsum <equation = "ij,jk"> (p, v)', "5,7", "7,3", "the Einsum 'ij,jk'"),
    "an ellipsis for more axes in one term than in the other": (
        'Einsum <equation = "...qk,...kd->...qd"> (p, v)', "2,4,5,7", "4,7,3", "the Einsum '...qk"
    ),
    "a letter twice": ('Einsum <equation = "bqq,bqd->bqd"> (p, v)', "2,5,5", "2,5,3", "the Einsum 'bqq"),
    "nothing contracted": ('Einsum <equation = "bqk,bkd->bqkd"> (p, v)', "2,5,7", "2,7,3", "the Einsum 'bqk"),
    "two letters contracted": ('Einsum <equation = "bhqk,bhkd->bqd"> (p, v)', "2,4,5,7", "2,4,7,3", "the Einsum"),
    "a letter summed alone": ('Einsum <equation = "bhqk,bkd->bqd"> (p, v)', "2,4,5,7", "2,7,3", "the Einsum"),
    "no queries": ('Einsum <equation = "bk,bkd->bd"> (p, v)', "2,7", "2,7,3", "the Einsum 'bk"),
    "two depths": ('Einsum <equation = "bqk,bkde->bqde"> (p, v)', "2,5,7", "2,7,3,2", "the Einsum 'bqk"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_told_is_refused_with_its_reason(case: str) -> None:
    call, map_shape, value_shape, reason = REFUSED[case]
    model, meeting = product(call, map_shape, value_shape, index=0)
    found = read_product(meeting, view(model))
    assert isinstance(found, str)
    assert reason in found
