"""Graphs whose sizes cannot be: named where an attention cannot be read because of them, and nowhere else."""

import pytest
from test_matching_forms import text_model

from atpatch_onnx.matching import explain
from atpatch_onnx.matching.contradictions import contradiction
from atpatch_onnx.matching.view import view

ATTENTION = (
    "apart = Constant <value_ints = [0, 6, 4, 4]> () k = Reshape (x, apart) q = Transpose <perm = [0, 2, 1, 3]> (k) "
    "kt = Transpose <perm = [0, 2, 3, 1]> (k) s = MatMul (q, kt) m = Add (s, mask) p = Softmax <axis = -1> (m) "
    "y = MatMul (p, q)"
)


@pytest.mark.parametrize("batch", ["b", 2])
def test_a_graph_that_cannot_run_is_refused_with_the_node_that_cannot(batch: int | str) -> None:
    """As exporters write them that make a mask for the length of a sample that they traced, which is another."""
    inputs = f"float[{batch},6,16] x, float[{batch},4,6,%d] mask"
    matches = explain(text_model(ATTENTION, inputs % 7, f"float[{batch},4,6,4] y"))
    assert matches.sites == ()
    (miss,) = matches.near_misses
    assert miss.attention
    assert f"at m sizes do not fit, [{batch}, 4, 6, 6] and [{batch}, 4, 6, 7], so that no input runs" in miss.reason
    right = explain(text_model(ATTENTION, inputs % 6, f"float[{batch},4,6,4] y"))
    assert (len(right.sites), right.near_misses) == (1, ())


@pytest.mark.parametrize(
    ("body", "inputs", "found"),
    [
        ("y = Add (x, z)", "float[b,5,8] x, float[4,8] z", "[b, 5, 8] and [4, 8]"),
        ("y = Mul (x, z)", "float[b,5,8] x, float[b,1,7] z", "[b, 5, 8] and [b, 1, 7]"),
        ("y = MatMul (x, z)", "float[b,5,8] x, float[7,3] z", "[b, 5, 8] and [7, 3]"),
        ("y = MatMul (x, z)", "float[2,5,8] x, float[3,8,3] z", "[2, 5, 8] and [3, 8, 3]"),
        ("s = Constant <value_ints = [3, 7]> () y = Reshape (x, s)", "float[4,5] x", "[4, 5] and [3, 7]"),
        (
            "s = Constant <value_ints = [0, 0, 3, 2]> () y = Reshape (x, s)",
            "float[b,c,8] x",
            "[b, c, 8] and [b, c, 3, 2]",
        ),
    ],
)
def test_fixed_sizes_that_do_not_fit(body: str, inputs: str, found: str) -> None:
    said = contradiction(view(text_model(f"{body} out = Size (y)", inputs, "int64 out")))
    assert said is not None
    assert said.endswith(f"sizes do not fit, {found}")


@pytest.mark.parametrize(
    ("body", "inputs"),
    [
        ("y = Add (x, z)", "float[b,5,8] x, float[c,1] z"),
        ("y = Add (x, z)", "float[b,5,8] x, float[4,1,n] z"),
        ("y = Where (m, x, z)", "bool[5,1] m, float[b,5,8] x, float z"),
        ("y = MatMul (x, z)", "float[b,5,8] x, float[8] z"),
        ("y = MatMul (x, z)", "float[b,5,n] x, float[8,3] z"),
        ("s = Constant <value_ints = [3, -1]> () y = Reshape (x, s)", "float[b,5] x"),
        ("s = Constant <value_ints = [0, 1, -1]> () y = Reshape (x, s)", "float[4,5] x"),
        ("s = Constant <value_ints = [0, 6]> () y = Reshape (x, s)", "float[b,c,2] x"),
    ],
)
def test_sizes_that_may_fit(body: str, inputs: str) -> None:
    assert contradiction(view(text_model(f"{body} out = Size (y)", inputs, "int64 out"))) is None
