"""Find the hidden units of a transformer's MLP blocks: what the second of two products reads, behind the activation.

    x -> MatMul or Gemm with a weight -> activation (and, where gated, a product with another branch) -> h -> MatMul or
    Gemm with a weight -> Add of what x came from

One edit of a unit is a constant on `h`, on its last axis, whatever the axes before it are.

Anchored at the second product. Walking *back* from `h` through operators that work entry by entry must end at products
with weights everywhere, as wide as there are units, and pass an activation: attention and norms over the units are not
crossed. Walking *forward* must reach the Add that puts the block's result back into what its first product was given,
which tells a block from poolers, heads and other stacks of linear layers. Weights are never read, only their shapes.

Experts with stacked weights, and blocks with a convolution between their two products, are not found.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import onnx_ir as ir

from atpatch_onnx import graph
from atpatch_onnx.graph.names import units_scope
from atpatch_onnx.matching.chains import PRODUCTS
from atpatch_onnx.matching.naming import module_path
from atpatch_onnx.matching.rules import label


@dataclass(frozen=True)
class HiddenLayer:
    """The hidden units of one MLP block."""

    name: str
    """Stable and recognisable, unlike every site's: e.g. `vit.layers.3.mlp.hidden`; else `hidden_3`."""

    index: int
    """Position among the graph's hidden layers, in the graph's node order."""

    value: str
    """Name of `h` `[..., units]`, which the second product reads; other nodes may read it too."""

    units: int
    """How many hidden units there are: the second weight's rows."""

    activation: str
    """The operator that tells the MLP from a chain of linear layers: Relu, Gelu, Erf, Tanh, Sigmoid, ..."""

    dtype: str
    """Element type of `h`, as ONNX names it: FLOAT, FLOAT16, ..."""

    nodes: tuple[str, ...]
    """The nodes from the first product to the second, for people to find the place."""

    @property
    def scope(self) -> str:
        """Where the names of its edits lie, under `atpatch/`: beside those of any site, even one of the same name."""
        return units_scope(self.name)

    def to_json(self) -> dict[str, Any]:
        """The layer as plain JSON types."""
        return asdict(self)


def find_hidden_layers(model: ir.Model) -> tuple[HiddenLayer, ...]:
    """The hidden layers of a model's main graph, in its node order. The model is left as it is."""
    order = {node: position for position, node in enumerate(model.graph)}
    blocks: dict[ir.Value, _Block] = {}
    for node in order:
        block = _block(node, order)
        if block is not None:
            blocks.setdefault(block.h, block)  # an adapter's product may read h too
    names: list[str] = []
    for block in blocks.values():
        names.append(_name(block, names))
    return tuple(
        HiddenLayer(
            name=name,
            index=index,
            value=str(block.h.name),
            units=block.units,
            activation=block.activation.op_type,
            dtype=block.dtype.name,
            nodes=tuple(label(node) for node in block.nodes),
        )
        for index, (name, block) in enumerate(zip(names, blocks.values(), strict=True))
    )


# Products with weights

_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""Of `h`: edits are computed in float32, which others would not survive."""

_WEIGHTED = frozenset({("", "MatMul"), ("", "Gemm"), ("com.microsoft", "FusedMatMul")})


@dataclass(frozen=True)
class _Linear:
    """A product whose second operand is a weight `[rows, columns]`."""

    node: ir.Node
    x: ir.Value
    rows: int
    columns: int


def _linear(node: ir.Node) -> _Linear | None:
    """The product as a linear layer, whose result has the columns on its last axis; None where it is none."""
    if (node.domain, node.op_type) not in _WEIGHTED or len(node.inputs) < 2:
        return None
    x, shape = node.inputs[0], _weight_shape(node.inputs[1])
    if x is None or shape is None or len(shape) != 2:
        return None
    rows, columns = reversed(shape) if _is_set(node, "transB") else shape
    return _Linear(node, x, rows, columns)


def _is_set(node: ir.Node, name: str) -> bool:
    return name in node.attributes and bool(node.attributes[name].as_int())


def _weight_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of a weight, also where it is converted or transposed on the way; None for what is computed."""
    perms: list[Sequence[int] | None] = []
    while value is not None:
        node = value.producer()
        if node is None or node.op_type == "Constant":
            tensor = graph.constant(value)
            return None if tensor is None else _transposed(tuple(tensor.shape.numpy()), perms)
        if node.op_type not in ("Transpose", "Cast", "Identity", "DequantizeLinear") or not node.inputs:
            return None
        if node.op_type == "Transpose":
            perms.append(node.attributes["perm"].as_ints() if "perm" in node.attributes else None)
        value = node.inputs[0]
    return None


def _transposed(shape: tuple[int, ...], perms: Sequence[Sequence[int] | None]) -> tuple[int, ...] | None:
    """The shape behind transpositions, the last one first; None where one does not fit it."""
    for perm in reversed(perms):
        axes = range(len(shape))[::-1] if perm is None else perm
        if sorted(axes) != list(range(len(shape))):
            return None
        shape = tuple(shape[axis] for axis in axes)
    return shape


def _element_type(value: ir.Value | None) -> ir.DataType | None:
    """The element type of a weight, which is that of the `h` it meets."""
    while value is not None:
        node = value.producer()
        if value.dtype is not None or node is None:
            return value.dtype
        if node.op_type == "Cast":
            return ir.DataType(node.attributes["to"].as_int()) if "to" in node.attributes else None
        value = node.inputs[1 if node.op_type == "DequantizeLinear" else 0] if node.inputs else None
    return None


# From the second product back to the first

_ACTIVATIONS = frozenset(
    {"Relu", "LeakyRelu", "PRelu", "ThresholdedRelu", "Elu", "Selu", "Celu", "Gelu", "FastGelu", "QuickGelu"}
    | {"BiasGelu", "Erf", "Tanh", "Sigmoid", "HardSigmoid", "Swish", "HardSwish", "Mish", "Softplus", "Softsign"}
)

_CARRIES: Mapping[str, tuple[int, ...]] = (
    dict.fromkeys(_ACTIVATIONS, (0,))
    | dict.fromkeys(("Add", "Sub", "Mul", "Div", "Min", "Max", "BiasGelu", "FastGelu"), (0, 1))
    | dict.fromkeys(("Pow", "Sqrt", "Exp", "Log", "Neg", "Abs", "Reciprocal", "Clip", "Dropout", "Identity"), (0,))
    | dict.fromkeys(("Cast", "CastLike", "QuantizeLinear", "DequantizeLinear", "BatchNormalization"), (0,))
    | dict.fromkeys(("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Split", "Slice"), (0,))
    | {"Where": (1, 2)}
)
"""Operators that keep every entry with its unit, and the operands with the entries.

Reshape does so too: entries keep their order, and the last axis is the units' before and after.
"""

_CUTS = ("Split", "Slice")

_DOMAINS = ("", "com.microsoft")


@dataclass(frozen=True)
class _Block:
    """A hidden layer before it has a name."""

    h: ir.Value
    units: int
    dtype: ir.DataType
    activation: ir.Node
    nodes: tuple[ir.Node, ...]
    """In the graph's order: a first product at the front, the second at the end."""


def _block(node: ir.Node, order: dict[ir.Node, int]) -> _Block | None:
    """The block whose second product is `node`; None where it is no such product."""
    second = _linear(node)
    if second is None or _is_set(node, "transA") or _is_set(node, "transBatchA"):
        return None  # the units must be on the last axis of h
    dtype = _element_type(node.inputs[1])
    if dtype not in _TYPES:
        return None
    way = _way_back(second)
    if way is None:
        return None
    nodes = sorted(way, key=order.__getitem__)
    activation = next((step for step in nodes if step.op_type in _ACTIVATIONS), None)
    firsts = [linear for step in nodes if (linear := way[step]) is not None]
    if activation is None or not _is_put_back(node.outputs[0], _before(first.x for first in firsts)):
        return None
    nodes = nodes[nodes.index(firsts[0].node) :]  # before it are only weights that another layer shares
    return _Block(second.x, second.rows, dtype, activation, (*nodes, node))


def _way_back(second: _Linear) -> dict[ir.Node, _Linear | None] | None:
    """Every node from the first products to `h`, with the products as such; None where an entry comes from elsewhere.

    Units may be computed in one product with their gates, or with queries, keys and values, and be cut out.
    """
    way: dict[ir.Node, _Linear | None] = {}
    stack = [(second.x, False)]
    while stack:
        value, cut = stack.pop()
        node = value.producer()
        if node is None and graph.constant(value) is None:
            return None
        if node is None or node in way or node.op_type == "Constant":
            continue
        way[node] = first = _linear(node)
        if first is not None:
            if not (first.columns > second.rows if cut else first.columns == second.rows):
                return None
            continue
        if node.domain not in _DOMAINS or node.op_type not in _CARRIES:
            return None
        operands = (node.inputs[index] for index in _CARRIES[node.op_type] if index < len(node.inputs))
        stack += [(operand, cut or node.op_type in _CUTS) for operand in operands if operand is not None]
    return way


# From the second product on to the residual sum

_MIXES = PRODUCTS | {"Softmax", "Attention", "MultiHeadAttention", "GroupQueryAttention"}

_SUMS = frozenset({"Add", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization"})

_PASSES = frozenset(
    {"Mul", "Div", "Sub", "Dropout", "Cast", "Identity", "QuantizeLinear", "DequantizeLinear"}
    | {"Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"}
    | {"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization", "BatchNormalization"}
)
"""Operators between the second product and the residual sum: scales, norms, moves."""


def _before(values: Iterable[ir.Value]) -> set[ir.Value]:
    """What the first products were given, and all that it was computed from without a product: the residual stream."""
    before = set[ir.Value]()
    stack = list(values)
    while stack:
        value = stack.pop()
        if value in before or graph.constant(value) is not None:
            continue
        before.add(value)
        node = value.producer()
        if node is None:
            continue
        before.update(node.outputs)
        if node.op_type not in _MIXES:
            stack += [operand for operand in node.inputs if operand is not None]
    return before


def _is_put_back(result: ir.Value, before: set[ir.Value]) -> bool:
    """Whether the block's result is added to something from before the block."""
    stack, seen = [result], {result}
    while stack:
        value = stack.pop()
        for node in value.consumers():
            if node.op_type in _SUMS and any(operand in before for operand in node.inputs[:2]):
                return True
            if node.op_type in _SUMS | _PASSES and node.outputs[0] not in seen:
                seen.add(node.outputs[0])
                stack.append(node.outputs[0])
    return False


# Names


def _name(block: _Block, taken: list[str]) -> str:
    """A name that is not taken; `hidden_3` where the graph does not say what it was exported from."""
    scope = _scope(block)
    wanted = f"{scope}.hidden" if scope else f"hidden_{len(taken)}"
    name, count = wanted, 1
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    return name


def _scope(block: _Block) -> str:
    """The module that holds the first linear layer: the MLP, whatever its activation was exported to.

    Where the activation lies in the product's own module, or below it, that module is the MLP: it has no linear layers
    of its own.
    """
    linear, activation = module_path(block.nodes[0]), module_path(block.activation)
    if linear and f"{activation}.".startswith(f"{linear}."):
        return linear
    return linear.rpartition(".")[0]
