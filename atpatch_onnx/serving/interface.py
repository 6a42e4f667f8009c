"""What a model looks like from outside: the tensors that a server has to declare."""

from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from atpatch_onnx.errors import ServingError
from atpatch_onnx.graph import weights


@dataclass(frozen=True)
class ServedTensor:
    """An input or an output."""

    name: str
    dtype: ir.DataType
    shape: tuple[int | None, ...]
    """None: a size that is free."""


@dataclass(frozen=True)
class Interface:
    """All inputs and outputs of a model, in order."""

    inputs: tuple[ServedTensor, ...]
    outputs: tuple[ServedTensor, ...]

    @property
    def batched(self) -> bool:
        """Whether requests can be batched: the first axis of every tensor is free."""
        return all(tensor.shape[:1] == (None,) for tensor in (*self.inputs, *self.outputs))


def interface(model: ir.Model) -> Interface:
    """Read a model's interface."""
    known = weights(model)
    return Interface(
        inputs=tuple(_tensors(value for value in model.graph.inputs if value.name not in known)),
        outputs=tuple(_tensors(model.graph.outputs)),
    )


def _tensors(values: Iterable[ir.Value]) -> Iterable[ServedTensor]:
    for value in values:
        if value.dtype is None or value.shape is None:
            raise ServingError(
                f"the tensor {value.name}",
                expected="a known type and number of axes",
                found="none in the model",
                advice="Run onnx.shape_inference on the base, then bake again.",
            )
        shape = tuple(size if isinstance(size, int) else None for size in value.shape)
        yield ServedTensor(value.name or "", value.dtype, shape)
