"""The shape arithmetic of graphs, computed: sizes that are cut, joined, multiplied."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx


def compute(node: onnx.NodeProto, feeds: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
    """The results of a node, given its inputs by name; none where they are not known."""
    if node.op_type in _DIRECT and len(node.output) == 1:
        result = _DIRECT[node.op_type](node, [feeds[name] for name in node.input if name])
        if result is not None:
            return [result]
    from onnx.reference import ReferenceEvaluator  # when a graph first needs it: that alone takes 0.1 s

    try:
        with np.errstate(all="ignore"):
            return [np.asarray(result) for result in ReferenceEvaluator(node).run(None, dict(feeds))]
    except Exception:  # an operator that onnx's reference does not know
        return []


def _constant(node: onnx.NodeProto, inputs: Sequence[np.ndarray]) -> np.ndarray | None:
    value = node.attribute[0]
    if value.name == "value":
        return onnx.numpy_helper.to_array(value.t)
    dtype = _LISTED.get(value.name)
    return None if dtype is None else np.array(onnx.helper.get_attribute_value(value), dtype)


def flags_of(node: onnx.NodeProto) -> dict[str, int]:
    """Attributes that are numbers."""
    return {attribute.name: attribute.i for attribute in node.attribute}


def _gather(node: onnx.NodeProto, inputs: Sequence[np.ndarray]) -> np.ndarray | None:
    data, indices = inputs
    axis = flags_of(node).get("axis", 0)
    fits = -data.ndim <= axis < data.ndim and bool((np.abs(indices) < data.shape[axis]).all())
    return np.asarray(np.take(data, indices, axis)) if fits else None


def _of_counts(step: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Callable[..., np.ndarray | None]:
    """Arithmetic of sizes; what is no int64, is negative, or divides by zero is left to onnx's reference."""

    def run(node: onnx.NodeProto, inputs: Sequence[np.ndarray]) -> np.ndarray | None:
        counts = all(part.dtype == np.int64 and bool((part > 0).all()) for part in inputs)
        return np.asarray(step(*inputs)) if counts else None

    return run


_LISTED = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}

_DIRECT: Mapping[str, Callable[[onnx.NodeProto, Sequence[np.ndarray]], np.ndarray | None]] = {
    "Constant": _constant,
    "Identity": lambda node, inputs: inputs[0],
    "Gather": _gather,
    "Concat": lambda node, inputs: np.concatenate(inputs, 0) if all(part.ndim == 1 for part in inputs) else None,
    # The axes are an input from opset 13 on.
    "Unsqueeze": lambda node, inputs: inputs[0].reshape(1) if len(inputs) == 2 and inputs[0].ndim == 0 else None,
    "Add": _of_counts(np.add),
    "Sub": _of_counts(np.subtract),
    "Mul": _of_counts(np.multiply),
    "Div": _of_counts(np.floor_divide),
}
"""The operators of nearly all shape arithmetic, computed without onnx's reference, which takes 0.1 ms to set up a node;
None where it is left to the reference."""
