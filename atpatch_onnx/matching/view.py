"""What the rules may ask about a graph: shapes, element types, constants. Nothing here changes the model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from atpatch_onnx import graph
from atpatch_onnx.matching import shapes
from atpatch_onnx.sites import Dim

_READ_LIMIT = 2**24
"""Constants of more bytes than this are not read: whether a mask can hide a key is then answered with yes."""

_TYPED_LIKE_SECOND = {"Where", "CastLike"}
_UNTYPED = {"Shape", "Size", "NonZero", "ArgMax", "ArgMin", "IsNaN", "Equal", "Less", "Greater", "Not", "And", "Or"}


@dataclass(frozen=True)
class View:
    """A model with what was worked out about it once, for all rules."""

    model: ir.Model
    shapes: Mapping[str, tuple[Dim, ...]]
    static: frozenset[str]
    """Names of the values that depend on weights and constants only, never on an input of the model."""

    batches: frozenset[Dim]
    """The first dimension of each input of the model."""

    opset: int

    def shape(self, value: ir.Value | None) -> tuple[Dim, ...] | None:
        """The shape of a value; None where not even the rank is known."""
        return None if value is None or value.name is None else self.shapes.get(value.name)

    def rank(self, value: ir.Value | None) -> int | None:
        """The number of axes of a value, if known."""
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def is_static(self, value: ir.Value | None) -> bool:
        """Whether a value is the same for every input of the model."""
        return value is not None and value.name in self.static

    def constant(self, value: ir.Value | None) -> np.ndarray | None:
        """The content of a weight or Constant; None for anything computed, or too large to read in passing."""
        if value is None or value.is_graph_input():
            return None
        tensor = ir.convenience.get_const_tensor(value)
        if tensor is None or tensor.nbytes > _READ_LIMIT:
            return None
        return np.asarray(tensor.numpy())

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """The element type of a value: as declared, else as its producer's operator implies."""
        while value is not None:
            if value.dtype is not None:
                return value.dtype
            node = value.producer()
            if node is None or node.op_type in _UNTYPED:
                return None
            if node.op_type == "Cast":
                return ir.DataType(node.attributes["to"].as_int())
            if node.op_type == "Constant":
                tensor = ir.convenience.get_const_tensor(value)
                return None if tensor is None else tensor.dtype
            index = 1 if node.op_type in _TYPED_LIKE_SECOND else 0
            value = node.inputs[index] if len(node.inputs) > index else None
        return None


def view(model: ir.Model) -> View:
    """Look at a model: infer its shapes and find what is constant in it."""
    known = shapes.infer(model)
    return View(
        model=model,
        shapes=known,
        static=frozenset(_static_values(model.graph)),
        batches=frozenset(_batches(model.graph, known)),
        opset=graph.opset_version(model),
    )


def _static_values(main: ir.Graph) -> Iterable[str]:
    static = {name for name, value in main.initializers.items() if not value.is_graph_input()}
    for node in main:
        inputs = [value.name for value in node.inputs if value is not None]
        if node.op_type.startswith(("Random", "Multinomial", "Bernoulli")) or any(
            attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            for attribute in node.attributes.values()
        ):
            continue
        if all(name in static for name in inputs):
            static.update(value.name for value in node.outputs if value.name)
    return static


def _batches(main: ir.Graph, known: Mapping[str, tuple[Dim, ...]]) -> Iterable[Dim]:
    """First dimensions of the inputs; those of vectors and scalars count only where there is nothing else."""
    inputs = [known.get(value.name or "") for value in main.inputs if value.name not in main.initializers]
    ranked = [shape for shape in inputs if shape]
    return {shape[0] for shape in ranked if len(shape) > 1} or {shape[0] for shape in ranked}
