"""Token axes: which sites' keys are positions of one sequence, and which sites attend within one.

An approximation by data flow. Every value has *origins*: the values where its sequence of positions began, such as an
embedding or a convolution. Linear layers, norms, residual sums and moves hand origins on; whatever may choose, pool or
mix positions begins a new sequence. A site's output stands at the positions of its queries. Then

- queries and keys are positions of one sequence if they share an origin and nothing is known against it in their
  lengths;
- the keys of two sites are positions of one sequence if they share an origin, have the same known length and are not
  divided into parts (windows, channels).

So encoder and decoder stay apart even where their lengths agree, and the keys of cross-attention stand on the encoder's
axis. Where the flow is not understood, a site gets a separate axis: flags are then not carried, never carried wrong;
nor is it said then that queries and keys are positions of two sequences. That is said where both began in what is known
to begin one: an input of the model, an embedding, a convolution, weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from atpatch_onnx.matching.linear import LINEAR, weight_of
from atpatch_onnx.matching.operands import cut_axes
from atpatch_onnx.matching.pieces import split_by_axes
from atpatch_onnx.matching.provenance import Source, factors
from atpatch_onnx.matching.rules import Candidate
from atpatch_onnx.matching.sites import Dim, Place
from atpatch_onnx.matching.view import View

_POINTWISE = {
    "Add", "Sub", "Mul", "Div", "Pow", "Where", "Min", "Max", "Sum", "Mean",
    "Cast", "CastLike", "Identity", "Dropout", "Clip", "Neg", "Abs", "Sqrt", "Exp", "Log", "Reciprocal", "Erf", "Tanh",
    "Sigmoid", "Relu", "Gelu", "LeakyRelu", "Elu", "Selu", "Celu", "HardSigmoid", "HardSwish", "Mish", "Swish", "PRelu",
    "Softplus", "Sin", "Cos", "Not", "Concat", "SkipLayerNormalization", "SkipSimplifiedLayerNormalization",
}  # fmt: skip
"""Operators that leave positions where they are; all operands count, Concat's because lengths tell what it does."""

_FIRST_OPERAND = {
    "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Expand", "Flatten", "Einsum", "LayerNormalization",
    "RMSNormalization", "SimplifiedLayerNormalization", "BatchNormalization", "LpNormalization", "GroupNormalization",
    "InstanceNormalization", "RotaryEmbedding", "FastGelu", "BiasGelu", "QuickGelu", "BiasSplitGelu", "Softmax", "Conv",
    "FusedConv", "NhwcConv", "DynamicQuantizeLinear", "QuantizeLinear", "DequantizeLinear", "MoE", "QMoE",
    "LabelEncoder", "Slice", "Split", "Gather", "GatherND", *LINEAR,
}  # fmt: skip
"""Operators whose first operand carries the positions. Products only with weights as the second, a
Conv only with a kernel of one position."""

_PRODUCTS = LINEAR | {"Einsum"}
_CONVOLUTIONS = {"Conv", "FusedConv", "NhwcConv", "ConvInteger"}
_BEGINS = _CONVOLUTIONS | {"ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "EmbedLayerNormalization"}
"""Operators that begin a sequence of positions, besides embeddings."""

_CUTS = {"Slice", "Split", "Gather", "GatherND"}

_PARTS = (2, 3)
"""An axis of this length that is taken apart holds Q, K and V of a fused projection, not positions."""


@dataclass(frozen=True)
class Axis:
    """What was found out about the positions of a site."""

    name: str
    """The same for sites whose keys are positions of one sequence."""

    self_attention: bool | None
    """None: not known."""

    tokens: Dim
    """Keys that are computed here, of one map."""


def token_axes(candidates: Sequence[Candidate], keys: Sequence[Place], view: View) -> list[Axis]:
    """The axis of each candidate, in order, given where its keys are replaced: those in a cache do not count."""
    origins = _origins(candidates, view)
    begun = frozenset(name for name, own in origins.items() if name in own and _begins(name, view))
    known: list[tuple[str, frozenset[str], tuple[object, object]]] = []
    axes = []
    for site, key in zip(candidates, keys, strict=True):
        queries, own = (origins.get(name, frozenset()) for name in (str(site.query.name), key.value))
        tokens = tokens_of(site, key, view)
        sizes = (site.parts, tokens)
        same = [name for name, others, size in known if others & own and size == sizes]
        whole = site.parts in (0, 1) and tokens is not None
        name = same[0] if same and whole else f"axis_{len({name for name, _, _ in known})}"
        known.append((name, own, sizes))
        contradicted = None not in (site.queries, tokens) and site.queries != tokens
        shared = bool(queries & own) and not contradicted
        axes.append(Axis(name, shared or (False if contradicted or queries | own <= begun else None), tokens))
    return axes


def _begins(name: str, view: View) -> bool:
    """Whether a value is known to be the beginning of a sequence."""
    node = view.values[name].producer()
    if node is None or node.op_type in _BEGINS:
        return True
    return node.op_type in ("Gather", "GatherBlockQuantized") and view.is_static(node.inputs[0])


def tokens_of(site: Candidate, place: Place, view: View) -> Dim:
    """How many tokens a tensor has of one map; None where it is not known.

    Where they share an axis with maps, they are as many as meet the queries, if their numbers agree.
    """
    shape = view.inferred.shapes.get(place.value)
    if shape is not None and place.axes.count("k") == 1 and not place.folded:
        return shape[place.axes.index("k")]
    sizes, met, named = view.inferred.sizes.get(place.value), view.sizes(site.keys.value), view.shape(site.keys.value)
    apart = None if met is None else split_by_axes(site.keys, met)
    if sizes is None or met is None or named is None or apart is None:
        return None
    both = prod(size for letters, size in zip(place.axes, sizes, strict=True) if letters)
    own = {part.axis: part.size for part in apart[1] if part.letter == "k"}
    maps = prod(part.size for part in apart[1] if part.letter == "n")
    alone = [axis for axis, size in own.items() if len(own) == 1 and size == met[axis] and maps * size == both]
    return next((named[axis] for axis in alone), None)


def _origins(candidates: Sequence[Candidate], view: View) -> dict[str, frozenset[str]]:
    outputs = {str(site.output.name): str(site.query.name) for site in candidates}
    origins: dict[str, frozenset[str]] = {
        str(value.name): frozenset({str(value.name)}) for value in view.model.graph.inputs
    }
    for node in view.model.graph:
        for value in node.outputs:
            name = str(value.name)
            if view.is_static(value):
                origins[name] = frozenset()
            elif name in outputs:
                origins[name] = origins.get(outputs[name], frozenset())
            else:
                origins[name] = _handed_on(node, origins, view) or frozenset({name})
    return origins


def _handed_on(node: ir.Node, origins: dict[str, frozenset[str]], view: View) -> frozenset[str]:
    """The origins that the node's output has from its operands; none where the node begins a new sequence."""
    if node.op_type in _POINTWISE:
        operands = [value for value in node.inputs if value is not None and _full_size(value, node, view)]
    elif node.op_type == "ScatterND" and view.is_static(node.inputs[1]):  # pieces written into one tensor
        operands = [value for value in (node.inputs[0], node.inputs[2]) if value is not None]
    elif node.op_type in _FIRST_OPERAND and _keeps_positions(node, view):
        operands = [value for value in node.inputs[:2] if value is not None and not view.is_static(value)][:1]
    else:
        return frozenset()
    return frozenset().union(*(origins.get(str(value.name), frozenset()) for value in operands))


def _full_size(value: ir.Value, node: ir.Node, view: View) -> bool:
    """Whether an operand is as large as the result: broadcast masks, scales and pooled context do not count."""
    if node.op_type == "Concat":
        return True
    shape, result = view.shape(value), view.shape(node.outputs[0])
    return shape is None or result is None or shape == result or None in (*shape, *result)


def _keeps_positions(node: ir.Node, view: View) -> bool:
    """Whether a product is a linear layer, a Conv one on each position, and whether a cut spares the positions.

    A cut does along the depth, and where it takes Q, K or V out of a fused projection.
    """
    if node.op_type in _CONVOLUTIONS:
        return view.is_pointwise(node)
    if node.op_type in _PRODUCTS:
        return weight_of(node, view) is not None
    if node.op_type not in _CUTS:
        return True
    shape = view.shape(node.inputs[0])
    if shape is None:
        return False
    axes = cut_axes(node)
    if axes is None or any(not -len(shape) <= axis < len(shape) for axis in axes):
        return False
    return all(
        axis % len(shape) == len(shape) - 1 or shape[axis] in _PARTS or _of_features(node, axis % len(shape), view)
        for axis in axes
    )


def _of_features(node: ir.Node, axis: int, view: View) -> bool:
    """Whether an axis of what a node takes is made of the features of a linear layer."""
    assert node.inputs[0] is not None, "a cut has something to cut"
    return {factor.source for factor in factors(node.inputs[0], axis, view) or ()} == {Source.HEADS}
