"""One node of com.microsoft's fused attention, with inputs to run it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper

Array = np.ndarray

INPUTS = {
    "MultiHeadAttention": (
        "query key value bias key_padding_mask attention_bias past_key past_value past_length cache_indirection"
    ),
    "Attention": "input weights bias mask_index past attention_bias past_length",
    "GroupQueryAttention": (
        "query key value past_key past_value seqlens_k total_sequence_length cos_cache sin_cache position_ids "
        "attention_bias head_sink k_scale v_scale q_norm_weight k_norm_weight"
    ),
}
"""The inputs of each op in their order, under the names of its documentation."""


def fused_model(
    op: str,
    feeds: Mapping[str, Array],
    *,
    outputs: int = 1,
    weights: tuple[str, ...] = (),
    free: bool = False,
    opset: int = 20,
    **attributes: Any,
) -> ir.Model:
    """A graph of one node that is called `attend`.

    Args:
        op: The operator.
        feeds: Its inputs; some may be missing.
        outputs: How many the node has.
        weights: Which inputs are weights of the graph.
        free: Whether sizes are symbolic but those of heads and features.
        opset: The ONNX opset beside it.
        attributes: Of the node.
    """
    names = [name if name in feeds else "" for name in INPUTS[op].split()]
    while not names[-1]:
        names.pop()
    results = ["Y", *(f"more_{index}" for index in range(1, outputs))]
    node = helper.make_node(op, names, results, name="attend", domain="com.microsoft", **attributes)
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feeds.items()}
    shapes = {name: _free(name, array) if free else array.shape for name, array in feeds.items()}
    inputs = [
        helper.make_tensor_value_info(name, kinds[name], shapes[name]) for name in names if name and name not in weights
    ]
    graph = helper.make_graph(
        [node],
        "fused",
        inputs,
        [helper.make_tensor_value_info("Y", kinds[names[0]], None)],
        initializer=[onnx.numpy_helper.from_array(feeds[name], name) for name in weights],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=8))


def _free(name: str, array: Array) -> list[int | str]:
    """Symbols for the sizes of samples and positions, and whatever else is no head and no feature."""
    fixed = {3: (2,), 4: (1, 3), 5: (2, 3, 4)}.get(array.ndim, ()) if array.dtype.kind == "f" else ()
    if name == "attention_bias":
        fixed = ()
    return [size if axis in fixed else f"{name}_{axis}" for axis, size in enumerate(array.shape)]


def random_inputs(proto: onnx.ModelProto) -> dict[str, Array]:
    """Inputs by their declared types: floats, small whole numbers, masks of ones, positions in order."""
    rng = np.random.default_rng(0)
    feeds = {}
    for value in proto.graph.input:
        kind = value.type.tensor_type
        shape = [dim.dim_value or 2 for dim in kind.shape.dim]
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
        if "mask" in value.name:
            content = np.ones(shape)
        elif "position" in value.name:
            content = np.broadcast_to(np.arange(shape[-1]), shape)
        elif np.issubdtype(dtype, np.floating):
            content = rng.standard_normal(shape)
        else:
            content = rng.integers(0, 5, shape)
        feeds[value.name] = content.astype(dtype)
    return feeds
