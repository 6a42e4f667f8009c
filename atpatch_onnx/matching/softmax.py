"""Decomposed attention: Softmax(Q K) V, anchored at the softmax.

Walking *forward* from the softmax finds the product with V; walking *back* finds the product of Q and K, which tells
attention from class probabilities, routers and token pooling.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from atpatch_onnx.graph.names import MIN_OPSET
from atpatch_onnx.graph.parts import LIFT_ADVICE
from atpatch_onnx.matching import chains
from atpatch_onnx.matching.contradictions import undecided
from atpatch_onnx.matching.denials import also_feeds, scores_of, without_values
from atpatch_onnx.matching.keys import keys_of
from atpatch_onnx.matching.layout import Layout
from atpatch_onnx.matching.leading import Axis, Leading, name_leading
from atpatch_onnx.matching.mixing import behind
from atpatch_onnx.matching.normalized import ANCHORS, Normalized, divided_behind, read_softmax
from atpatch_onnx.matching.operands import cut_axes
from atpatch_onnx.matching.pieces import Pieces, from_layout
from atpatch_onnx.matching.products import Product, read_product
from atpatch_onnx.matching.rules import Candidate, Rule, label, miss, type_reason
from atpatch_onnx.matching.sites import Form, NearMiss
from atpatch_onnx.matching.view import View

_PARTS_FIRST = re.compile("w.*b")


def answer(node: ir.Node, view: View) -> tuple[Candidate | NearMiss, ...]:
    """A candidate or a near miss for each product with values that the softmax feeds; one near miss if there is none.

    A softmax that feeds two products (differential attention) is two sites: each has values and a separate output.
    """
    softmax = read_softmax(node, view)
    if softmax is None:
        product = divided_behind(node, view)
        reason = "attention, but its map is divided by its sum behind the product with the values"
        return () if product is None else (miss([product, node], reason, attention=True),)
    scores = scores_of(softmax, view)
    met = chains.forward(softmax.weights, behind(softmax, view))
    meetings = [meeting for meeting in met if meeting.node.op_type != "IsNaN"]
    padded = _padded(softmax, meetings, scores, view)
    products = [meeting for meeting in meetings if _meets_values(meeting, scores, view)]
    if not products:
        return (padded or without_values(softmax, meetings, scores, view),)
    if isinstance(scores, NearMiss):
        return (scores,)
    if view.opset < MIN_OPSET:
        nodes = (scores.node, *scores.path, node, *(meeting.node for meeting in products))
        return (miss(nodes, f"attention, but the model has opset {view.opset}: {LIFT_ADVICE}", attention=True),)
    if any(_cuts_keys(softmax, meeting, view) for meeting in products):
        nodes = (scores.node, *scores.path, node, *(meeting.node for meeting in products))
        reason = (
            "attention, but its map is cut into pieces with some of its keys each, which meet separate values, as "
            "in block-sparse attention"
        )
        return (miss(nodes, reason, attention=True),)
    beside = also_feeds(meetings, {meeting.node for meeting in products}, view)
    return (*(_site(softmax, scores, meeting, view) for meeting in products), *_beside(softmax, products, *beside))


def _beside(
    softmax: Normalized, products: Sequence[chains.Meeting], of_values: Sequence[ir.Node], of_weights: Sequence[ir.Node]
) -> Iterator[NearMiss]:
    """What is said of a map that goes into other products than those with its values.

    Of those with weights, such as relative values of positions, nothing needs to be replaced: in the map a flagged
    token is neutral, and weights have nothing of a token.
    """
    where = f"the map that meets values at {label(products[0].node)} also"
    if of_values:
        reason = (
            f"attention in part: {where} meets values at {_labels(of_values)}, behind what is not followed: a flagged "
            "token is neutral in this map, but what it hands over there is not replaced"
        )
        yield miss([softmax.node, *of_values], reason, attention=True)
    if of_weights:
        reason = (
            f"not attention of its own: {where} goes into {_labels(of_weights)}, a product with weights, which is left "
            "as it is: a flagged token is neutral in this map, and weights, as those of positions, have nothing of it"
        )
        yield miss(of_weights, reason, attention=False)


def _labels(nodes: Sequence[ir.Node]) -> str:
    return ", ".join(label(node) for node in nodes)


def _cuts_keys(softmax: Normalized, meeting: chains.Meeting, view: View) -> bool:
    """Whether some of the map's keys are cut out for a product while others go elsewhere; a sink goes nowhere."""
    position: int | None = softmax.axis % (view.rank(softmax.weights) or 1)
    for step in meeting.path:
        axes, rank = cut_axes(step), view.rank(step.inputs[0]) or 1
        along = axes is None or position in [axis % rank for axis in axes]
        if step.op_type in ("Slice", "Split", "Gather") and along and _goes_elsewhere(step):
            return True
        position = None if position is None else chains.followed(step, position, view)
    return False


def _goes_elsewhere(step: ir.Node) -> bool:
    """Whether others than a step read what it cuts, or several of its pieces are read."""
    source = step.inputs[0]
    users = () if source is None else source.consumers()
    others = any(user is not step and user.op_type not in ("Shape", "IsNaN") for user in users)
    return others or sum(bool(output.uses()) for output in step.outputs) > 1


def _meets_values(meeting: chains.Meeting, scores: chains.Product | NearMiss, view: View) -> bool:
    """Whether the map is multiplied with something that depends on the model's input.

    With a matrix for all samples only where its scores are a product as well: probabilities meet matrices, too.
    """
    if not meeting.is_product:
        return False
    other = meeting.node.inputs[1 - meeting.index] if len(meeting.node.inputs) > 1 and meeting.index < 2 else None
    if other is None or view.is_weight(other):
        return False
    rank = view.rank(other)
    return rank is None or rank >= 3 or (rank == 2 and isinstance(scores, chains.Product))


def _padded(
    softmax: Normalized, meetings: Sequence[chains.Meeting], scores: chains.Product | NearMiss, view: View
) -> NearMiss | None:
    padded = [meeting.node for meeting in meetings if meeting.node.op_type == "Pad"]
    reached = [meeting for pad in padded for meeting in chains.forward(pad.outputs[0])]
    bands = [meeting for meeting in reached if _meets_values(meeting, scores, view)]
    if not bands:
        return None
    reason = "attention, but its map is padded and cut into overlapping windows (banded attention)"
    return miss([softmax.node, *padded, *(band.node for band in bands)], reason, attention=True)


def _site(softmax: Normalized, scores: chains.Product, meeting: chains.Meeting, view: View) -> Candidate | NearMiss:
    nodes = (scores.node, *scores.path, softmax.node, *meeting.path, meeting.node)
    product = read_product(meeting, view)
    if isinstance(product, Product) and not product.leading and view.samples != 1:
        return miss(nodes, "attention, but its map has no axis of samples, and the model has", attention=True)
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
    keys = None if letters is None else keys_of(letters, scores.node, (*scores.path, *meeting.path), view)
    values = _values(product, named, leading, view)
    if keys is None or values is None:
        which = "keys" if keys is None else "values"
        reason = f"attention, but it cannot be told which entries of its {which} are of which token"
        wrong = undecided(meeting.value, view)
        return miss(nodes, reason if wrong is None else f"{reason}: {wrong}", attention=True)
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
        masked=softmax.masked or chains.can_hide(scores.path, view) or any(_zeroes(step) for step in meeting.path),
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
    alone = {axis: "" for axis, own in zip(product.values, shape, strict=True) if own == 1 < sizes.get(axis, 1)}
    return from_layout(product.value, _layout(product.values, {**named, **alone}), _folded(leading), view)


def _layout(labels: tuple[str, ...], named: Mapping[str, str]) -> str:
    return str(Layout(tuple(named.get(own, own) for own in labels)))


def _leading(scores: chains.Product, meeting: chains.Meeting, product: Product, view: View) -> Leading | str:
    """The map's leading axes, followed back through the values, or through the queries where those are shared."""
    shape = view.shape(meeting.value) or (None,) * len(product.map)
    values = view.shape(product.value) or (None,) * len(product.values)
    query = scores.node.inputs[0]
    axes = []
    for own in product.leading:
        index = product.map.index(own)
        traces = [(meeting.value, index)]
        if own in product.values and values[product.values.index(own)] not in (1, None):
            traces.insert(0, (product.value, product.values.index(own)))
        if query is not None and view.rank(query) == len(shape):
            traces.insert(-1, (query, index))
        axes.append(Axis(shape[index], tuple(traces)))
    extra = [own for own in product.values if own not in product.map and own != "d"]
    if extra:
        return "its values have more axes than its map: several heads share one map"
    leading = name_leading(axes, view)
    if isinstance(leading, str):
        return leading
    if _PARTS_FIRST.search("".join(leading.letters)):
        return "its parts, such as windows, come before its samples"
    for own, letters, axis in zip(product.leading, leading.letters, axes, strict=True):
        size = values[product.values.index(own)] if own in product.values else 1
        if size == 1 and axis.size not in (1, None) and set(letters) - {"h", "g"}:
            return "its values are shared by several samples or parts"
        if axis.size == 1 and isinstance(size, int) and size > 1 and set(letters) - {"h", "g"}:
            return "its map is shared by several samples or parts"
    return leading


def _zeroes(step: ir.Node) -> bool:
    """Whether a step after the softmax takes weights away; a guard against NaN does not."""
    if step.op_type != "Where" or step.inputs[0] is None:
        return False
    condition = step.inputs[0].producer()
    return condition is None or condition.op_type != "IsNaN"


def _refusal(softmax: Normalized, meeting: chains.Meeting, product: Product, view: View) -> str | None:
    """Why the map that meets V cannot be patched as it is; None where it can."""
    position = softmax.axis % (view.rank(softmax.weights) or len(product.map))
    for step in meeting.path:
        following = chains.followed(step, position, view)
        if following is None:
            reason = "it cannot be told where the keys of its map go between the softmax and the values"
            wrong = undecided(meeting.value, view)
            return reason if wrong is None else f"{reason}: {wrong}"
        position = following
    if product.map[position] != "k":
        wrong = undecided(meeting.value, view)
        if wrong is not None:
            return f"it cannot be told along which axis its softmax runs: {wrong}"
        return "its softmax does not run over the keys: a row of its map does not share out one query's attention"
    return type_reason(view.dtype(meeting.node.outputs[0]) or view.dtype(meeting.value))


RULE = Rule(anchors=ANCHORS, answer=answer)
