"""Neutral keys and values for flagged tokens, in front of the attention.

Design section 5:

    K'_j = kbar  if token j is flagged  else  K_j
    V'_j = vbar  if token j is flagged  else  V_j

One `Where` each, one for both where they are columns of one tensor. On the CPU it stands in an `If` that runs it only
where something is flagged; the attention itself stays outside, so no bit depends on it.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.baking.read import dequantized, in_place, own_bias, quantized
from atpatch_onnx.graph.insertion import Insertion, hand_over, replaced_value
from atpatch_onnx.graph.names import SITE_KEY, own_name
from atpatch_onnx.graph.values import find_value
from atpatch_onnx.matching.sites import AttentionSite, Place
from atpatch_onnx.patches.patch import Neutral


@dataclass(frozen=True, eq=False)
class Replacement:
    """One tensor of the base and what stands in it for flagged tokens."""

    name: str
    """`key`, `value`, or `key_value` for both."""

    place: Place
    neutral: NDArray[np.float32]
    """Of the shape of the tensor, 1 on the axes of tokens."""

    columns: NDArray[np.bool_] | None
    """Which of its features, of the same shape; None: all."""


@dataclass(frozen=True)
class Decision:
    """What is flagged at a site, as values of the graph."""

    flags: ir.Value
    """Bool `[B, K, 1]`: the tokens that are replaced."""

    some: ir.Value | None
    """Bool of one element, whether any is, for an `If`; None: there is to be none."""


def is_packed(site: AttentionSite) -> bool:
    """Whether keys and values are columns of one tensor, and replaced together."""
    return site.key.value == site.value.value and site.key.reader is None and site.value.reader is None


def replacements(graph: ir.Graph, site: AttentionSite, neutral: Neutral) -> Iterator[Replacement]:
    """The tensors of a site in which tokens are replaced."""

    def of(place: Place, features: NDArray[np.float32]) -> NDArray[np.float32]:
        own = own_bias(graph, place)
        return np.asarray(
            in_place(place, representable(place, features if own is None else features - own)), np.float32
        )

    def columns(place: Place) -> NDArray[np.bool_]:
        return np.asarray(in_place(place, np.ones((place.heads, place.depth), np.bool_)), np.bool_)

    key, value = site.key, site.value
    if is_packed(site):
        chosen = columns(key) | columns(value)
        yield Replacement(
            "key_value",
            key,
            np.where(columns(key), of(key, neutral.key), of(value, neutral.value)),
            None if chosen.all() else chosen,
        )
        return
    for name, place, features in (("key", key, neutral.key), ("value", value, neutral.value)):
        yield Replacement(name, place, of(place, features), None if place.whole else columns(place))


def representable(place: Place, features: NDArray[np.float32]) -> NDArray[np.float32]:
    """The nearest floats that the whole numbers of a place can stand for; of a place of floats the same."""
    own = place.quantization
    if own is None:
        return features
    return own.dequantized(own.quantized(features, ir.DataType[place.dtype].numpy()))


def replace_tokens(at: Insertion, replacement: Replacement, decision: Decision) -> ir.Value:
    """Write one replacement; the base's nodes read its result from then on."""
    place, graph = replacement.place, at.graph
    value = find_value(graph, place.value)
    value = _as_replaced(graph, value) if place.reader is None else value
    dtype = ir.DataType[place.dtype] if place.quantization is None else ir.DataType.FLOAT
    features = replacement.neutral.copy()
    with np.errstate(over="ignore"):  # refused below, as the weight that it would be
        features[features.astype(dtype.numpy()) == 0] = (
            0  # onnxruntime's Where makes 0 of -0, and the file should say what it does
        )
    neutral = at.constant(f"neutral_{replacement.name}", features, dtype)
    columns = None if replacement.columns is None else at.constant("columns", replacement.columns)

    def replaced(into: Insertion, name: str) -> ir.Value:
        flags = _laid_out(into, place, value, decision.flags, name)
        if columns is not None:
            flags = into.op("And", flags, columns, name=f"{name}/flagged_columns")
        if place.quantization is None:
            return into.op("Where", flags, neutral, value, name=name, shape=place.shape, dtype=dtype)
        floats = dequantized(into, place, value, f"{name}/replaced")
        chosen = into.op("Where", flags, neutral, floats, name=f"{name}/floats", shape=place.shape, dtype=dtype)
        return quantized(into, place, chosen, name)

    name = replacement.name
    if decision.some is None:
        result = replaced(at, name)
    else:
        result = _if(
            at, decision.some, name, place, {"then": replaced, "else": lambda into, own: _kept(into, value, own, place)}
        )
    reader = None
    if place.reader is not None:
        node = find_value(graph, place.reader).producer()
        assert node is not None, "a node reads it"
        reader = [node]
    hand_over(value, result, reader)
    return result


def _as_replaced(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """What the base's nodes read in place of a value: another's result, where sites share a tensor."""
    for node in graph:
        if replaced_value(node) is value and all(SITE_KEY in use.node.metadata_props for use in value.uses()):
            value = node.outputs[0]
    return value


def _laid_out(at: Insertion, place: Place, value: ir.Value, flags: ir.Value, name: str) -> ir.Value:
    """Flags `[B, K, 1]` such that they broadcast to the tensor of a place."""
    rank = len(place.axes)
    if place.order == "kn":
        flags = _transposed(at, flags, name)
    if not place.apart:
        return at.op("Reshape", flags, _sizes_of_tokens(at, place, value, name), name=f"{name}/laid_out")
    features = [axis for axis, letters in enumerate(place.axes) if not letters]
    if place.axes[-1]:  # the last axis is one of tokens: none is left for the features
        flags = at.op("Squeeze", flags, at.constant("last", np.array([2], np.int64)), name=f"{name}/squeezed")
    else:
        features = features[:-1]
    if not features:
        return flags
    assert len(features) + (2 if place.axes[-1] else 3) == rank, "every axis is one of tokens or features"
    where = at.constant(f"{name}/axes", np.array(features, np.int64))
    return at.op("Unsqueeze", flags, where, name=f"{name}/laid_out")


def _sizes_of_tokens(at: Insertion, place: Place, value: ir.Value, name: str) -> ir.Value:
    """The shape of the tensor of a place with ones for features, int64; as weights, but for several free axes."""
    known = place.shape or (None,) * len(place.axes)
    sizes = [(size if isinstance(size, int) else -1) if own else 1 for own, size in zip(place.axes, known, strict=True)]
    if sum(bool(own) for own in place.axes) == 1:
        sizes = [-1 if own else 1 for own in place.axes]
    if sizes.count(-1) <= 1:
        return at.constant(f"{name}/sizes", np.array(sizes, np.int64))
    of_tokens = at.constant(f"{name}/of_tokens", np.array([bool(own) for own in place.axes]))
    ones = at.constant(f"{name}/ones", np.ones(len(sizes), np.int64))
    return at.op("Where", of_tokens, at.op("Shape", value, name=f"{name}/shape"), ones, name=f"{name}/sizes")


def _transposed(at: Insertion, flags: ir.Value, name: str) -> ir.Value:
    return at.op("Transpose", flags, name=f"{name}/ordered", attributes=[ir.AttrInt64s("perm", [1, 0, 2])])


def _kept(at: Insertion, value: ir.Value, name: str, place: Place) -> ir.Value:
    return at.op("Identity", value, name=name, shape=place.shape, dtype=ir.DataType[place.dtype])


def _if(
    at: Insertion, some: ir.Value, name: str, place: Place, branches: Mapping[str, Callable[[Insertion, str], ir.Value]]
) -> ir.Value:
    attributes = []
    for which, write in branches.items():
        graph = ir.Graph([], [], nodes=[], name=own_name(at.scope, f"{name}/{which}"))
        graph.outputs.append(write(_Branch(graph, at), f"{name}/{which}"))
        attributes.append(ir.AttrGraph(f"{which}_branch", graph))
    return at.op("If", some, name=name, attributes=attributes, shape=place.shape, dtype=ir.DataType[place.dtype])


class _Branch(Insertion):
    """Adds nodes to a branch, whose weights stand in the graph around it: a service may exchange them there."""

    def __init__(self, graph: ir.Graph, around: Insertion) -> None:
        super().__init__(graph, around.scope)
        self._around = around

    def constant(self, name: str, array: NDArray[np.generic], dtype: ir.DataType | None = None) -> ir.Value:
        """A weight of the graph around."""
        return self._around.constant(name, array, dtype)
