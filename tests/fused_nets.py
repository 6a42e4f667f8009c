"""One node of com.microsoft's fused attention, with inputs to run it, and its shadow beside it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import helper

from atpatch_onnx.baking.shadow import map_and_values
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.running.sessions import Session

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


@dataclass(frozen=True)
class Seen:
    """What the fused node gave, and what its shadow gave."""

    P: Array
    V: Array
    Y: Array | None

    @property
    def product(self) -> Array:
        """P V with packed heads, `[batch, queries, heads * depth]`."""
        batch, heads, queries, _ = self.P.shape
        values = np.repeat(self.V, heads // self.V.shape[1], axis=1)
        return (self.P @ values).transpose(0, 2, 1, 3).reshape(batch, queries, -1)


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
        free: Whether all sizes are symbolic, so that the graph says no more than the number of axes.
        opset: The ONNX opset beside it.
        attributes: Of the node.
    """
    names = [name if name in feeds else "" for name in INPUTS[op].split()]
    while not names[-1]:
        names.pop()
    results = ["Y", *(f"more_{index}" for index in range(1, outputs))]
    node = helper.make_node(op, names, results, name="attend", domain="com.microsoft", **attributes)
    kinds = {name: helper.np_dtype_to_tensor_dtype(array.dtype) for name, array in feeds.items()}
    shapes = {
        name: [f"{name}_{axis}" for axis in range(array.ndim)] if free else array.shape for name, array in feeds.items()
    }
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


def add_shadow(model: ir.Model, node: ir.Node, scope: str = "site") -> tuple[str, str]:
    """Write the shadow of a node into its graph; the names of P and V, which are outputs of the graph now."""
    P, V = map_and_values(node, Insertion(model.graph, scope, anchor=node))
    names = []
    for value in (P, V):
        if value in model.graph.inputs:
            copy = ir.Node("", "Identity", [value])
            copy.outputs[0].name = f"{scope}/{value.name}"
            model.graph.append(copy)
            value = copy.outputs[0]
        value.dtype = ir.DataType.FLOAT
        model.graph.outputs.append(value)
        names.append(str(value.name))
    return names[0], names[1]


def see(model: ir.Model, feeds: Mapping[str, Array], *, fused: bool = True) -> Seen:
    """Run the one node of `fused_model` and its shadow; the shadow alone where the CPU has no kernel for the node."""
    node = next(node for node in model.graph if node.name == "attend")
    names = add_shadow(model, node)
    if not fused:
        model.graph.outputs.remove(node.outputs[0])
        model.graph.remove(node, safe=True)
    session = Session(model, optimize=False, threads=1)
    results = session.run({name: feeds[name] for name in session.input_names})
    return Seen(results[names[0]], results[names[1]], results.get("Y"))


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
