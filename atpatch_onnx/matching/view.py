"""What the rules may ask about a graph: shapes, element types, constants. Nothing here changes the model."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from atpatch_onnx import graph
from atpatch_onnx.graph.values import graph_values
from atpatch_onnx.matching import shapes
from atpatch_onnx.matching.plain import in_plain_operators
from atpatch_onnx.matching.sites import Dim

_READ_LIMIT = 2**24
"""Constants of more bytes than this are not read: whether a mask can hide a key is then answered with yes."""

_MOVES = {"Slice", "Split", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Cast", "Identity"}
_MOVED = 6
"""How many of these nodes are looked behind for a weight."""

_TYPED_LIKE = {
    "Where": 1, "CastLike": 1, "EmbedLayerNormalization": 2, "DequantizeLinear": 1, "QuantizeLinear": 2,
}  # fmt: skip
"""Operators whose result has the type of another than the first operand."""

_UNTYPED = {"Shape", "Size", "NonZero", "ArgMax", "ArgMin", "IsNaN", "Equal", "Less", "Greater", "Not", "And", "Or"}


@dataclass(frozen=True)
class View:
    """A model with what was worked out about it once, for all rules."""

    model: ir.Model
    """The model, or a copy of it in plain operators (`matching.plain`)."""

    stands_for: Mapping[str, str]
    """Values of that copy that the graph does not have, see `Plain.stands_for`."""

    values: Mapping[str, ir.Value]
    """The inputs, weights and node outputs of the main graph, by name."""

    inferred: shapes.Inferred
    static: frozenset[str]
    """Names of the values that depend on weights and constants only, never on an input of the model."""

    batch: Mapping[str, int | None]
    """The axis of samples of each input of the model; None: it has none, and takes one sample at a time."""

    batches: frozenset[Dim]
    """The size of each input's axis of samples."""

    samples: int | None
    """The same in numbers, as `sizes` has them; 1 where no input has samples."""

    opset: int

    told: dict[tuple[str, int], Any] = field(init=False, default_factory=dict, compare=False, repr=False)
    """What `provenance.factors` answered, by value and axis: walks meet, and none is gone twice."""

    def shape(self, value: ir.Value | None) -> tuple[Dim, ...] | None:
        """The shape of a value; None where not even the rank is known."""
        return None if value is None or value.name is None else self.inferred.shapes.get(value.name)

    def sizes(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """The shape of a value in numbers; where sizes are symbolic, in those that stand for them in a trial."""
        return None if value is None or value.name is None else self.inferred.sizes.get(value.name)

    def in_graph(self, value: ir.Value) -> str:
        """The name of a value; of one that the graph does not have, that of the output of the node it is inside of."""
        return self.stands_for.get(str(value.name), str(value.name))

    def rank(self, value: ir.Value | None) -> int | None:
        """The number of axes of a value, if known."""
        shape = self.shape(value)
        return None if shape is None else len(shape)

    def is_static(self, value: ir.Value | None) -> bool:
        """Whether a value is the same for every input of the model."""
        return value is not None and value.name in self.static

    def is_weight(self, value: ir.Value | None) -> bool:
        """Whether a value is static, or cut from something static: exporters compute where a fused weight is cut."""
        for _ in range(_MOVED):
            if value is None or self.is_static(value):
                return value is not None
            node = value.producer()
            if node is None or node.op_type not in _MOVES:
                return False
            value = node.inputs[0]
        return False

    def is_pointwise(self, conv: ir.Node) -> bool:
        """Whether a Conv looks at one position at a time: a linear layer over the channels."""
        kernel = self.shape(conv.inputs[1]) if len(conv.inputs) > 1 else None
        strides = conv.attributes["strides"].as_ints() if "strides" in conv.attributes else ()
        return kernel is not None and set(kernel[2:]) == {1} and set(strides) <= {1}

    def constant(self, value: ir.Value | None) -> np.ndarray | None:
        """The content of a weight or Constant; None for anything computed, or too large to read in passing."""
        if value is None or value.is_graph_input():
            return None
        tensor = graph.constant(value)
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
                tensor = graph.constant(value)
                return None if tensor is None else tensor.dtype
            index = _TYPED_LIKE.get(node.op_type, 0)
            value = node.inputs[index] if len(node.inputs) > index else None
        return None


def view(model: ir.Model) -> View:
    """Look at a model: write it in plain operators, infer its shapes and find what is constant in it.

    Samples are taken for the first axis: `matching.batches.look` also finds out on which axis of each input they are.
    """
    plain = in_plain_operators(model)
    model = plain.model
    seen = View(
        model=model,
        stands_for=plain.stands_for,
        values={str(value.name): value for value in graph_values(model.graph)},
        inferred=shapes.infer(model),
        static=frozenset(_static_values(model.graph)),
        batch={},
        batches=frozenset(),
        samples=None,
        opset=graph.opset_version(model),
    )
    return with_batch(seen, dict.fromkeys(given_inputs(seen), 0))


def with_batch(seen: View, batch: Mapping[str, int | None]) -> View:
    """The same with samples on these axes; vectors count only where nothing else has samples."""
    shaped = {name: axis for name, axis in batch.items() if axis is not None and seen.inferred.shapes.get(name)}
    known = seen.inferred.shapes
    ranked = {name: axis for name, axis in shaped.items() if len(known[name]) > 1} or shaped
    sizes = [seen.inferred.sizes[name][axis] for name, axis in ranked.items() if name in seen.inferred.sizes]
    alone = bool(batch) and set(batch.values()) == {None}
    return replace(
        seen,
        batch=batch,
        batches=frozenset(known[name][axis] for name, axis in ranked.items()),
        samples=1 if alone else next(iter(sizes), None),
    )


def given_inputs(seen: View) -> list[str]:
    """Names of the inputs that have to be given, in order."""
    main = seen.model.graph
    return [str(value.name) for value in main.inputs if value.name not in main.initializers]


def _static_values(main: ir.Graph) -> Iterable[str]:
    static = set(main.initializers)  # of old files these are inputs, too, which may be given, but not for each sample
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
