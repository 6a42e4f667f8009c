"""What the inputs of a model are for, as far as their names, types and uses tell."""

import re
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from atpatch_onnx import graph
from atpatch_onnx.errors import RunError

_NUMBER = re.compile("[0-9]{1,9}")


@dataclass(frozen=True)
class Slot:
    """An input of a model."""

    value: ir.Value
    name: str
    dtype: np.dtype
    sizes: tuple[int | str | None, ...]

    @classmethod
    def of(cls, value: ir.Value) -> "Slot":
        """Of an input.

        Raises:
            RunError: It has no shape.
        """
        if value.shape is None:  # onnxruntime's kernels may end the process where a rank is wrong
            raise undrawable(value, "none")
        found = [size if isinstance(size, int) else size.value for size in value.shape]
        # exporters write numbers as symbols, too
        sizes = tuple(int(size) if isinstance(size, str) and _NUMBER.fullmatch(size) else size for size in found)
        kind = value.dtype or ir.DataType.UNDEFINED
        dtype = np.dtype(np.float32 if kind is ir.DataType.UNDEFINED else kind.numpy())
        return cls(value, value.name or "", dtype, sizes)

    @property
    def is_mask(self) -> bool:
        """Says which tokens there are."""
        return "mask" in self.name.lower()

    @property
    def is_cache(self) -> bool:
        """Keys or values of earlier tokens `[samples, heads, tokens, depth]`."""
        return "past" in self.name.lower() and len(self.sizes) == 4

    @property
    def is_wave(self) -> bool:
        """A waveform `[samples, points]`."""
        return self.dtype.kind not in "biuO" and len(self.sizes) == 2 and not self.is_mask

    @property
    def is_position(self) -> bool:
        """Where tokens stand `[samples, tokens]`."""
        return self.dtype.kind == "i" and "position" in self.name.lower()

    @property
    def is_ids(self) -> bool:
        """Tokens `[samples, tokens]`, or what goes with each."""
        return self.dtype.kind == "i" and len(self.sizes) == 2 and not self.is_mask

    @property
    def is_grouped(self) -> bool:
        """Of a cache: read by an operator that takes several tokens behind it of one sample only."""
        return any(use.node.op_type == "GroupQueryAttention" for use in self.value.uses())

    @property
    def depth(self) -> int | None:
        """Of a cache: the width of one head; None where it is not known."""
        size = self.sizes[3]
        if isinstance(size, int):
            return size
        return next((found for use in self.value.uses() if (found := _head_size(use.node)) is not None), None)


def slots(model: ir.Model) -> list[Slot]:
    """The inputs that have to be given.

    Raises:
        RunError: One has no shape.
    """
    given = graph.weights(model)
    return [Slot.of(value) for value in model.graph.inputs if value.name not in given]


def has_cache(model: ir.Model) -> bool:
    """Whether a model takes keys or values of earlier tokens."""
    shaped = (value for value in model.graph.inputs if value.shape is not None)
    return any(Slot.of(value).is_cache for value in shaped)


def undrawable(value: ir.Value, found: str) -> RunError:
    """What is raised where no input of a shape can be made."""
    return RunError(
        f"the input {value.name!r}",
        expected="a shape of which inputs can be drawn",
        found=found,
        advice="Declare the shapes of the model's inputs, or give inputs of your own.",
    )


def _head_size(node: ir.Node) -> int | None:
    """Of onnxruntime's grouped-query attention, whose exporters leave the size of its caches open."""
    if node.op_type != "GroupQueryAttention" or len(node.inputs) < 2 or node.inputs[0] is None:
        return None
    heads, shared = (_whole(node, name) for name in ("num_heads", "kv_num_heads"))
    parts = heads + 2 * shared if node.inputs[1] is None else heads
    width = _width(node.inputs[0])
    return width // parts if width and parts > 0 else None


def _whole(node: ir.Node, name: str) -> int:
    attribute = node.attributes.get(name)
    return attribute.as_int() if attribute is not None and attribute.type is ir.AttributeType.INT else 0


def _width(value: ir.Value) -> int | None:
    """The last size of a value, as declared or as the weights say that it comes from."""
    if value.shape is not None and len(value.shape) and isinstance(value.shape[-1], int):
        return value.shape[-1]
    node = value.producer()
    if node is None:
        return None
    if node.op_type == "MatMulNBits":
        return _whole(node, "N") or None
    if node.op_type in ("MatMul", "Add"):
        weights = (source for source in node.inputs if source is not None and source.const_value is not None)
        sizes = [tuple(source.const_value.shape) for source in weights if source.const_value is not None]
        return next((int(size[-1]) for size in sizes if size and isinstance(size[-1], int)), None)
    return None
