"""Shapes by onnx's own inference, without reading weights."""

from pathlib import Path

import onnx
import onnx_ir as ir

from atpatch_onnx.errors import ModelFileError
from atpatch_onnx.graph import protos
from atpatch_onnx.graph.external import of_proto, take_in
from atpatch_onnx.graph.parts import tensors, weights

SHAPE_BYTES = 1024
"""Weights up to this size take part in shape inference: targets of Reshape, axes, starts and ends."""


def skeleton(model: ir.Model) -> onnx.ModelProto:
    """The model's graph without its weights: those over 1 KiB become inputs of their shape and type.

    Every weight has the shape that it has, whatever was declared beside it: onnx refuses to infer a whole graph for one
    scalar that is declared as [1] (seen after onnxruntime's fusions).
    """
    graph = model.graph
    kept = {name: _bare(name, tensor) for name, tensor in _initializers(graph)}
    large = [value for value in kept.values() if value.const_value is None]
    view = ir.GraphView(  # of the model's own nodes: a copy of them would take longer than the inference
        [kept.get(str(value.name), value) for value in graph.inputs]
        + [value for value in large if not graph.initializers[str(value.name)].is_graph_input()],
        graph.outputs,
        nodes=graph,
        initializers=[value for value in kept.values() if value.const_value is not None],
        opset_imports=dict(graph.opset_imports),
        name=graph.name,
    )
    functions = list(model.functions.values())
    proto = ir.to_proto(ir.Model(view, ir_version=model.ir_version, functions=functions))  # type: ignore[arg-type]
    _take_in_small(proto, model)
    return proto


def _initializers(graph: ir.Graph) -> list[tuple[str, ir.TensorProtocol]]:
    values = graph.initializers.items()
    return [(name, value.const_value) for name, value in values if value.const_value is not None]


def _bare(name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A weight as inference needs it: with its content where it is small."""
    value = ir.Value(name=name, shape=ir.Shape(_sizes(tensor)), type=ir.TensorType(tensor.dtype))
    if tensor.nbytes <= SHAPE_BYTES:
        external = isinstance(tensor, ir.ExternalTensor)
        value.const_value = ir.tensor(tensor.numpy(), dtype=tensor.dtype, name=name) if external else tensor
    return value


def _take_in_small(proto: onnx.ModelProto, model: ir.Model) -> None:
    """Small external tensors of nodes and their subgraphs; inference does not open files."""
    main = {id(tensor) for _, tensor in _initializers(model.graph)}
    inner = (tensor for tensor in tensors(model) if isinstance(tensor, ir.ExternalTensor) and id(tensor) not in main)
    first = next(inner, None)
    if first is None:
        return
    for tensor in protos.attribute_tensors(proto.graph.node):
        if tensor.data_location == onnx.TensorProto.EXTERNAL and protos.tensor_bytes(tensor) <= SHAPE_BYTES:
            take_in(tensor, of_proto(tensor, Path(first.base_dir)).tobytes())


def _sizes(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """A weight's shape; weights have no symbolic sizes."""
    return tuple(size for size in tensor.shape if isinstance(size, int))


def infer_shapes(model: ir.Model, bare: onnx.ModelProto | None = None) -> dict[str, tuple[int | str | None, ...]]:
    """Shapes of the main graph's values by name, from onnx's shape inference; the model is left as it is.

    Weights of more than 1 KiB are left out of the inference, so that none is read; small ones are kept, since shapes
    are computed from them.

    Args:
        model: The model.
        bare: Its skeleton, where it has been made already.

    Raises:
        ModelFileError: The shapes in the graph contradict each other.
    """
    try:
        inferred = onnx.shape_inference.infer_shapes(bare or skeleton(model), data_prop=True)
    except (onnx.shape_inference.InferenceError, MemoryError) as error:  # few bytes can ask for any size
        raise ModelFileError(
            "the model",
            expected="nodes whose shapes fit together, and into memory",
            found=str(error),
            advice="Check the model with onnx.checker, and export it again.",
        ) from error
    shapes: dict[str, tuple[int | str | None, ...]] = {name: _sizes(tensor) for name, tensor in weights(model).items()}
    for info in (*inferred.graph.input, *inferred.graph.value_info, *inferred.graph.output):
        if info.type.tensor_type.HasField("shape"):
            shapes[info.name] = tuple(
                dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None)
                for dim in info.type.tensor_type.shape.dim
            )
    return shapes
