"""Where an axis comes from, in small graphs made by hand: samples, heads, or parts of a sample."""

import onnx_ir as ir
import pytest
from test_matching_forms import text_model

from atpatch_onnx.matching.provenance import Factor, Source, factors
from atpatch_onnx.matching.view import view

B, H, W, R = Source.SAMPLES, Source.HEADS, Source.PARTS, Source.REPEATS


def sketch(body: str, inputs: str = "float[2,16,12] x", weights: str = "float[12,12] w") -> ir.Model:
    """A graph whose last value is y; `weights` are initializers."""
    model = text_model(body, f"{inputs}, {weights}", "float y")
    model.graph.outputs[0].shape = None
    for declared in list(model.graph.inputs):
        if f"] {declared.name}" in weights or f"], {declared.name}" in weights:
            shape = [int(size) for size in declared.shape or ()]
            declared.const_value = ir.tensor([0.5] * _count(shape), name=declared.name, dtype=ir.DataType.FLOAT)
            declared.const_value = ir.tensor(declared.const_value.numpy().reshape(shape), name=declared.name)
            model.graph.inputs.remove(declared)
            model.graph.register_initializer(declared)
    return model


def _count(shape: list[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def found(model: ir.Model, axis: int = 0, name: str = "y") -> list[tuple[int, Source]] | None:
    value = next(value for node in model.graph for value in node.outputs if value.name == name)
    answer = factors(value, axis, view(model))
    return None if answer is None else [(factor.size, factor.source) for factor in answer]


def ints(name: str, *values: int) -> str:
    return f"{name} = Constant <value_ints = [{', '.join(map(str, values))}]> ()"


HEADS_APART = f"z = MatMul (x, w) {ints('s', -1, 16, 4, 3)} a = Reshape (z, s) t = Transpose <perm = [0, 2, 1, 3]> (a)"


def test_heads_on_an_axis_of_their_own() -> None:
    model = sketch(f"{HEADS_APART} y = Identity (t)")
    assert found(model, 0) == [(2, B)]
    assert found(model, 1) == [(4, H)]
    assert found(model, 2) == [(16, W)], "positions: no samples and no features"
    assert found(model, 3) == [(3, H)]


def test_heads_folded_into_the_batch() -> None:
    assert found(sketch(f"{HEADS_APART} {ints('f', -1, 16, 3)} y = Reshape (t, f)")) == [(2, B), (4, H)]


def test_heads_folded_outside_the_batch() -> None:
    body = f"z = MatMul (x, w) {ints('s', -1, 16, 4, 3)} a = Reshape (z, s) t = Transpose <perm = [2, 0, 1, 3]> (a)"
    assert found(sketch(f"{body} {ints('f', -1, 16, 3)} y = Reshape (t, f)")) == [(4, H), (2, B)]


WINDOWS = f"{ints('s', -1, 4, 4, 12)} a = Reshape (x, s) {ints('f', -1, 4, 12)} windows = Reshape (a, f)"


def test_windows_folded_into_the_batch() -> None:
    assert found(sketch(f"{WINDOWS} y = MatMul (windows, w)")) == [(2, B), (4, W)]


def test_windows_folded_outside_the_batch() -> None:
    body = f"{ints('s', -1, 4, 4, 12)} a = Reshape (x, s) t = Transpose <perm = [1, 0, 2, 3]> (a)"
    assert found(sketch(f"{body} {ints('f', -1, 4, 12)} r = Reshape (t, f) y = MatMul (r, w)")) == [(4, W), (2, B)]


def test_windows_of_a_grid_are_one_factor() -> None:
    """Rows and columns of windows are both positions: neighbours of one source are merged."""
    body = f"{ints('s', -1, 2, 2, 2, 2, 12)} a = Reshape (x, s) t = Transpose <perm = [0, 1, 3, 2, 4, 5]> (a)"
    assert found(sketch(f"{body} {ints('f', -1, 4, 12)} r = Reshape (t, f) y = MatMul (r, w)")) == [(2, B), (4, W)]


def test_windows_and_then_heads_folded_into_the_batch() -> None:
    body = f"{WINDOWS} z = MatMul (windows, w) {ints('h', -1, 4, 4, 3)} b = Reshape (z, h)"
    body += f" t = Transpose <perm = [0, 2, 1, 3]> (b) {ints('g', -1, 4, 3)} y = Reshape (t, g)"
    assert found(sketch(body)) == [(2, B), (4, W), (4, H)]


def test_two_samples_of_four_windows_are_told_from_two_of_four_heads() -> None:
    """The sizes are the same; only the flow of data is not."""
    windows = sketch(f"{WINDOWS} y = MatMul (windows, w)")
    heads = sketch(f"{HEADS_APART} {ints('f', -1, 16, 3)} y = Reshape (t, f)")
    for model, source in ((windows, W), (heads, H)):
        assert found(model) == [(2, B), (4, source)]


def test_a_class_token_that_is_expanded_and_put_before_the_patches() -> None:
    body = f"{ints('e', 2, 1, 12)} c = Expand (token, e) j = Concat <axis = 1> (c, x) y = MatMul (j, w)"
    assert found(sketch(body, weights="float[12,12] w, float[1,1,12] token")) == [(2, B)]
    first = body.replace("(c, x)", "(x, c)")
    assert found(sketch(first, weights="float[12,12] w, float[1,1,12] token")) == [(2, B)]


def test_keys_and_values_of_a_cache_that_is_a_model_input() -> None:
    """A cache brings its heads apart and unmarked: they look like parts; its first axis is samples."""
    model = sketch(f"{HEADS_APART} y = Concat <axis = 2> (past, t)", "float[2,16,12] x, float[2,4,5,3] past")
    assert found(model, 0) == [(2, B)]
    assert found(model, 1) == [(4, W)]
    assert found(model, 1, "t") == [(4, H)], "which the new keys and values show to be heads"


def test_heads_that_share_keys_and_values_by_expand() -> None:
    body = f"z = MatMul (x, w) {ints('s', -1, 16, 2, 3)} a = Reshape (z, s) t = Transpose <perm = [0, 2, 1, 3]> (a)"
    body += f" {ints('two', 2)} u = Unsqueeze (t, two) {ints('e', 1, 1, 3, 1, 1)} x2 = Expand (u, e)"
    model = sketch(f"{body} {ints('f', -1, 6, 16, 3)} y = Reshape (x2, f)", weights="float[12,6] w")
    assert found(model, 0) == [(2, B)]
    assert found(model, 1) == [(2, H), (3, R)], "two heads of keys and values, each copied for three"


def test_channels_of_the_input_are_parts() -> None:
    """As PatchTST: every channel of a time series is a separate sequence, folded into the batch."""
    body = f"t = Transpose <perm = [0, 2, 1]> (x) {ints('s', -1, 4, 12)} r = Reshape (t, s) y = MatMul (r, w)"
    assert found(sketch(body, "float[2,48,7] x")) == [(2, B), (7, W)]


def test_channels_of_a_convolution_are_features() -> None:
    body = f"c = Conv (x, k) {ints('s', 0, 4, 3, -1)} y = Reshape (c, s)"
    model = sketch(body, "float[2,3,6,6] x", "float[12,3,2,2] k")
    assert found(model, 0) == [(2, B)]
    assert found(model, 1) == [(4, H)]
    assert found(model, 3) == [(25, W)]


def test_sizes_of_one_have_nothing_to_tell() -> None:
    model = sketch(f"{ints('one', 1)} y = Unsqueeze (x, one)")
    assert found(model, 1) == []


def test_of_free_sizes_the_trial_tells() -> None:
    model = sketch(f"{HEADS_APART} {ints('f', -1, 16, 3)} y = Reshape (t, f)", "float[batch,16,12] x")
    (samples, source), heads = found(model) or [(0, W), (0, W)]
    assert source is B
    assert samples > 1, "some number stands for the batch"
    assert heads == (4, H)


def test_an_unknown_operator_ends_the_search() -> None:
    """onnxruntime's own operators may put any axis anywhere."""
    unknown = sketch(f"u = com.microsoft.Unheard (x) {ints('s', 2, 16, 12)} y = Reshape (u, s)")
    assert found(unknown) is None


def test_a_fold_that_cuts_across_axes_is_not_known() -> None:
    """Twelve maps of three samples x four heads as four times three: neither is samples or heads."""
    model = sketch(f"{HEADS_APART} {ints('f', 4, -1)} y = Reshape (t, f)", "float[3,16,12] x")
    assert found(model) is None


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_factors_multiply_to_the_axis(axis: int) -> None:
    model = sketch(f"{HEADS_APART} {ints('f', -1, 16, 3)} y = Reshape (t, f)")
    answer = factors(model.graph.outputs[0], axis, view(model)) or ()
    size = 1
    for factor in answer:
        assert isinstance(factor, Factor)
        size *= factor.size
    assert size == (8, 16, 3)[axis]


def test_patches_tell_of_frames_beside_a_copied_class_token() -> None:
    """TimeSformer: frames are folded into the batch, and the class token is copied for each of them."""
    body = (
        f"{ints('f', 8, 4, 12)} frames = Reshape (x, f) {ints('three', 2, 4, 1, 12)} {ints('one', 2, 1, 1, 12)} "
        f"{ints('first', 0)} {ints('second', 1)} {ints('axis', 1)} c = Slice (x, first, second, axis) "
        f"u = Reshape (c, one) e = Expand (u, three) {ints('g', 8, 1, 12)} t = Reshape (e, g) "
        "y = Concat <axis = 1> (t, frames)"
    )
    assert found(sketch(body)) == [(2, B), (4, W)]


def test_batches_one_after_the_other_are_parts_that_come_first() -> None:
    assert found(sketch("a = Relu (x) y = Concat <axis = 0> (x, a)")) == [(2, W), (2, B)]


def test_one_of_several_batches_is_the_samples() -> None:
    body = f"a = Relu (x) c = Concat <axis = 0> (x, a) {ints('z', 0)} {ints('two', 2)} y = Slice (c, z, two, z)"
    assert found(sketch(body)) == [(2, B)]


def test_a_weight_that_is_cut_where_a_computation_says_is_a_weight() -> None:
    cut = f"n = Shape (x) {ints('i', 2)} e = Gather (n, i) {ints('z', 0)} half = Slice (w, z, e, z)"
    split = f"{ints('s', 2, 16, 4, 3)} a = Reshape (p, s) y = Transpose <perm = [2, 0, 1, 3]> (a)"
    body = f"{cut} p = MatMul (x, half) {split}"
    assert found(sketch(body)) == [(4, H)]


def test_a_convolution_of_one_position_keeps_positions() -> None:
    body = f"t = Transpose <perm = [0, 2, 1]> (x) {ints('s', 12, 12, 1)} k = Reshape (w, s) y = Conv (t, k)"
    assert found(sketch(body), 1) == [(12, H)]
    assert found(sketch(body), 2) == [(16, W)]
