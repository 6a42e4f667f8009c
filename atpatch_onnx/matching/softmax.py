"""Decomposed attention: Softmax(Q K) V, anchored at the softmax.

Walking *forward* from the softmax finds the product with V; walking *back* finds the product of Q and K, which tells
attention from class probabilities, routers and token pooling.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from atpatch_onnx.graph.names import MIN_OPSET
from atpatch_onnx.graph.parts import LIFT_ADVICE
from atpatch_onnx.matching import chains
from atpatch_onnx.matching.contradictions import contradiction
from atpatch_onnx.matching.keys import keys_of
from atpatch_onnx.matching.layout import Layout
from atpatch_onnx.matching.leading import Axis, Leading, name_leading
from atpatch_onnx.matching.pieces import Pieces, from_layout
from atpatch_onnx.matching.products import Product, read_product
from atpatch_onnx.matching.rules import Candidate, Rule, miss, type_reason
from atpatch_onnx.matching.sites import Form, NearMiss
from atpatch_onnx.matching.view import View

_PARTS_FIRST = re.compile("w.*b")


@dataclass(frozen=True)
class _Softmax:
    """A softmax, as one node or written out."""

    node: ir.Node
    scores: ir.Value
    weights: ir.Value
    axis: int


def answer(node: ir.Node, view: View) -> tuple[Candidate | NearMiss, ...]:
    """A candidate or a near miss for each product with values that the softmax feeds; one near miss if there is none.

    A softmax that feeds two products (differential attention) is two sites: each has values and an output of its own.
    """
    softmax = _read(node, view)
    if softmax is None:
        return ()
    meetings = [meeting for meeting in chains.forward(softmax.weights) if meeting.node.op_type != "IsNaN"]
    products = [meeting for meeting in meetings if _meets_values(meeting, view)]
    if not products:
        return (_without_values(softmax, meetings, view),)
    scores = _scores(softmax, view)
    if isinstance(scores, NearMiss):
        return (scores,)
    if view.opset < MIN_OPSET:
        nodes = (scores.node, *scores.path, node, *(meeting.node for meeting in products))
        return (miss(nodes, f"attention, but the model has opset {view.opset}: {LIFT_ADVICE}", attention=True),)
    if any(_is_a_piece(step) for meeting in products for step in meeting.path):
        nodes = (scores.node, *scores.path, node, *(meeting.node for meeting in products))
        reason = "attention, but its map is cut into pieces that meet values of their own (block-sparse attention)"
        return (miss(nodes, reason, attention=True),)
    return tuple(_site(softmax, scores, meeting, view) for meeting in products)


def _is_a_piece(step: ir.Node) -> bool:
    """Whether a step cuts a piece out of the map while other pieces go elsewhere; an attention sink goes nowhere."""
    source = step.inputs[0]
    if step.op_type != "Slice" or source is None:
        return False
    return any(user is not step and user.op_type not in ("Shape", "IsNaN") for user in source.consumers())


def _read(node: ir.Node, view: View) -> _Softmax | None:
    """A Softmax, or the Div of one written out, Exp(x) / ReduceSum(Exp(x)), as onnxruntime does in float16."""
    if node.op_type == "Softmax":
        axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
        return _Softmax(node, node.inputs[0], node.outputs[0], axis)  # type: ignore[arg-type]
    exponential, total = (_uncast(value) for value in node.inputs)
    summed = None if total is None or total.op_type != "ReduceSum" else _uncast(total.inputs[0])
    if exponential is None or exponential.op_type != "Exp" or summed is not exponential:
        return None
    axes = view.constant(total.inputs[1]) if total is not None and len(total.inputs) > 1 else None
    if axes is None or axes.size != 1:
        return None
    return _Softmax(node, exponential.inputs[0], node.outputs[0], int(axes.reshape(-1)[0]))  # type: ignore[arg-type]


def _uncast(value: ir.Value | None) -> ir.Node | None:
    """The node that computes a value, but for conversions of its type."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type == "Cast":
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    return node


def _meets_values(meeting: chains.Meeting, view: View) -> bool:
    """Whether the map is multiplied with something that depends on the model's input."""
    if not meeting.is_product:
        return False
    other = meeting.node.inputs[1 - meeting.index] if len(meeting.node.inputs) > 1 else None
    if other is None or view.is_static(other):
        return False
    rank = view.rank(other)
    return rank is None or rank >= 3


def _without_values(softmax: _Softmax, meetings: list[chains.Meeting], view: View) -> NearMiss:
    met = dict.fromkeys(meeting.node.op_type for meeting in meetings)
    if not met:
        found = "is an output of the model" if softmax.weights.is_graph_output() else "is not used"
    elif any(meeting.is_product for meeting in meetings):
        found = "is multiplied with weights and not with a value matrix"
    else:
        found = f"goes into {', '.join(met)} and does not meet a value matrix"
    padded = [meeting.node for meeting in meetings if meeting.node.op_type == "Pad"]
    bands = [meeting for pad in padded for meeting in chains.forward(pad.outputs[0]) if _meets_values(meeting, view)]
    if bands:
        reason = "attention, but its map is padded and cut into overlapping windows (banded attention)"
        return miss([softmax.node, *padded, *(band.node for band in bands)], reason, attention=True)
    return miss([softmax.node], f"not attention: the result of the softmax {found}", attention=False)


def _scores(softmax: _Softmax, view: View) -> chains.Product | NearMiss:
    """The product of Q and K that the softmax is taken of, or why there is none."""
    linear = None
    for product in chains.back(softmax.scores):
        second = product.node.inputs[1]
        if view.is_static(second) and (view.rank(second) or 3) < 3:
            linear = linear or product
        else:
            return product
    if linear is not None:
        reason = "not attention: its scores come from a linear layer and not from a product of queries and keys"
        return miss([linear.node, *linear.path, softmax.node], reason, attention=False)
    return miss([softmax.node], "not attention: no product of queries and keys leads to the softmax", attention=False)


def _site(softmax: _Softmax, scores: chains.Product, meeting: chains.Meeting, view: View) -> Candidate | NearMiss:
    nodes = (scores.node, *scores.path, softmax.node, *meeting.path, meeting.node)
    product = read_product(meeting, view)
    leading = product if isinstance(product, str) else _leading(scores, meeting, product, view)
    reason = leading if isinstance(leading, str) else _refusal(softmax, meeting, product, view)  # type: ignore[arg-type]
    if reason is not None:
        return miss(nodes, f"attention, but {reason}", attention=True)
    assert isinstance(product, Product)
    assert isinstance(leading, Leading)
    named = dict(zip(product.leading, leading.letters, strict=True))
    of_map = dict(zip(product.map, view.shape(meeting.value) or (None,) * len(product.map), strict=True))
    map_layout = _layout(product.map, named)
    letters = from_layout(meeting.value, map_layout, _folded(leading), view)
    keys = None if letters is None else keys_of(letters, scores.node, view)
    values = _values(product, named, leading, view)
    if keys is None or values is None:
        which = "keys" if keys is None else "values"
        reason = f"attention, but it cannot be told which entries of its {which} are of which token"
        wrong = contradiction(view)
        return miss(nodes, reason if wrong is None else f"{reason}: {wrong}, so that no input runs", attention=True)
    return Candidate(
        anchor=softmax.node,
        form=Form.SOFTMAX,
        map=meeting.value,
        map_layout=map_layout,
        query=scores.node.inputs[0],  # type: ignore[arg-type]
        keys=keys,
        values=values,
        key_reader=scores.node,
        output=meeting.node.outputs[0],
        parts=leading.parts,
        heads=leading.heads,
        queries=of_map["q"],
        masked=chains.can_hide(scores.path, view) or any(_zeroes(step) for step in meeting.path),
        nodes=nodes,
    )


def _folded(leading: Leading) -> dict[str, int]:
    """Sizes of the letters that may be folded into one axis."""
    return {letter: size for letter, size in (("h", leading.heads), ("w", leading.parts)) if isinstance(size, int)}


def _values(product: Product, named: Mapping[str, str], leading: Leading, view: View) -> Pieces | None:
    """The values where they meet the map; axes of one entry are shared by the heads of the map."""
    shape, of_map = view.sizes(product.value), view.sizes(product.map_value)
    if shape is None or of_map is None:
        return None
    sizes = dict(zip(product.map, of_map, strict=True))
    alone = {label: "" for label, own in zip(product.values, shape, strict=True) if own == 1 < sizes.get(label, 1)}
    return from_layout(product.value, _layout(product.values, {**named, **alone}), _folded(leading), view)


def _layout(labels: tuple[str, ...], named: Mapping[str, str]) -> str:
    return str(Layout(tuple(named.get(label, label) for label in labels)))


def _leading(scores: chains.Product, meeting: chains.Meeting, product: Product, view: View) -> Leading | str:
    """The map's leading axes, followed back through the values, or through the queries where those are shared."""
    shape = view.shape(meeting.value) or (None,) * len(product.map)
    values = view.shape(product.value) or (None,) * len(product.values)
    query = scores.node.inputs[0]
    axes = []
    for label in product.leading:
        index = product.map.index(label)
        traces = [(meeting.value, index)]
        if label in product.values and values[product.values.index(label)] not in (1, None):
            traces.insert(0, (product.value, product.values.index(label)))
        if query is not None and view.rank(query) == len(shape):
            traces.insert(-1, (query, index))
        axes.append(Axis(shape[index], tuple(traces)))
    extra = [label for label in product.values if label not in product.map and label != "d"]
    if extra:
        return "its values have more axes than its map: several heads share one map"
    leading = name_leading(axes, view)
    if isinstance(leading, str):
        return leading
    if _PARTS_FIRST.search("".join(leading.letters)):
        return "its parts, such as windows, come before its samples"
    for label, letters, axis in zip(product.leading, leading.letters, axes, strict=True):
        size = values[product.values.index(label)] if label in product.values else 1
        if size == 1 and axis.size not in (1, None) and set(letters) - {"h", "g"}:
            return "its values are shared by several samples or parts"
        if axis.size == 1 and isinstance(size, int) and size > 1:
            return "its map is shared by several heads or samples"
    return leading


def _zeroes(step: ir.Node) -> bool:
    """Whether a step after the softmax takes weights away; a guard against NaN does not."""
    if step.op_type != "Where" or step.inputs[0] is None:
        return False
    condition = step.inputs[0].producer()
    return condition is None or condition.op_type != "IsNaN"


def _refusal(softmax: _Softmax, meeting: chains.Meeting, product: Product, view: View) -> str | None:
    """Why the map that meets V cannot be patched as it is; None where it can."""
    position = softmax.axis % (view.rank(softmax.weights) or len(product.map))
    for step in meeting.path:
        following = _followed(step, position, view)
        if following is None:
            return "it cannot be told where the keys of its map go between the softmax and the values"
        position = following
    if product.map[position] != "k":
        return "its softmax does not run over the keys: a row of its map does not share out one query's attention"
    return type_reason(view.dtype(meeting.node.outputs[0]) or view.dtype(meeting.value))


def _followed(step: ir.Node, position: int, view: View) -> int | None:
    """Where a step takes an axis of its first operand; None where the axis does not stay one axis."""
    before, after = view.sizes(step.inputs[0]), view.sizes(step.outputs[0])
    if step.op_type == "Transpose":
        rank = view.rank(step.inputs[0]) or 0
        perm = step.attributes["perm"].as_ints() if "perm" in step.attributes else range(rank)[::-1]
        return list(perm).index(position) if position in perm else None
    if step.op_type not in ("Reshape", "Squeeze", "Unsqueeze"):
        return position
    if before is None or after is None:
        return None
    stride = prod(before[position + 1 :])
    for axis, size in enumerate(after):
        if (size, prod(after[axis + 1 :])) == (before[position], stride):
            return axis
    return None


RULE = Rule(anchors=frozenset({("", "Softmax"), ("", "Div")}), answer=answer)
