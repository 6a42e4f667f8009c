"""Decomposed attention: Softmax(Q K) V, anchored at the softmax.

Walking *forward* from the softmax finds the product with V; walking *back* finds the product of Q and K, which tells
attention from class probabilities, routers and token pooling.
"""

import onnx_ir as ir

from atpatch_onnx.matching import chains
from atpatch_onnx.matching.rules import Candidate, Rule, batch_reason, miss, type_reason
from atpatch_onnx.matching.view import View
from atpatch_onnx.sites import Form, Layout, NearMiss

_FIRST_OPSET = 13
"""Before opset 13, Softmax flattens its input to two axes."""


def answer(node: ir.Node, view: View) -> tuple[Candidate | NearMiss, ...]:
    """A candidate or a near miss for each product with values that the softmax feeds; one near miss if there is none.

    A softmax that feeds two products (differential attention) is two sites: each has values and an output of its own.
    """
    meetings = [meeting for meeting in chains.forward(node.outputs[0]) if meeting.node.op_type != "IsNaN"]
    products = [meeting for meeting in meetings if _meets_values(meeting, view)]
    if not products:
        return (_without_values(node, meetings, view),)
    scores = _scores(node, view)
    if isinstance(scores, NearMiss):
        return (scores,)
    return tuple(_site(node, scores, meeting, view) for meeting in products)


def _meets_values(meeting: chains.Meeting, view: View) -> bool:
    """Whether the map is multiplied, from the left, with something that depends on the model's input."""
    if not meeting.is_product or (meeting.index != 0 and meeting.node.op_type != "Einsum"):
        return False
    other = meeting.node.inputs[1 - meeting.index] if len(meeting.node.inputs) > 1 else None
    if other is None or view.is_static(other):
        return False
    rank = view.rank(other)
    return rank is None or rank >= 3


def _without_values(node: ir.Node, meetings: list[chains.Meeting], view: View) -> NearMiss:
    met = dict.fromkeys(meeting.node.op_type for meeting in meetings)
    if not met:
        found = "is an output of the model" if node.outputs[0].is_graph_output() else "is not used"
    elif any(meeting.is_product for meeting in meetings):
        found = "is multiplied with weights, or from the right, and not with a value matrix"
    else:
        found = f"goes into {', '.join(met)} and does not meet a value matrix"
    return miss([node], f"not attention: the result of the softmax {found}", attention=False)


def _scores(node: ir.Node, view: View) -> chains.Product | NearMiss:
    """The product of Q and K that the softmax is taken of, or why there is none."""
    linear = None
    for product in chains.back(node.inputs[0]):  # type: ignore[arg-type]
        second = product.node.inputs[1]
        if view.is_static(second) and (view.rank(second) or 3) < 3:
            linear = linear or product
        else:
            return product
    if linear is not None:
        reason = "not attention: its scores come from a linear layer and not from a product of queries and keys"
        return miss([linear.node, *linear.path, node], reason, attention=False)
    return miss([node], "not attention: no product of queries and keys leads to the softmax", attention=False)


def _site(node: ir.Node, scores: chains.Product, meeting: chains.Meeting, view: View) -> Candidate | NearMiss:
    nodes = (scores.node, *scores.path, node, *meeting.path, meeting.node)
    reason = _refusal(node, meeting, view)
    if reason is not None:
        return miss(nodes, f"attention, but {reason}", attention=True)
    value = meeting.node.inputs[1]
    query, key = scores.node.inputs[:2]
    batch, heads, queries, keys = view.shape(meeting.value)  # type: ignore[misc]
    _, kv_heads, positions, depth = view.shape(value)  # type: ignore[misc]
    return Candidate(
        anchor=node,
        form=Form.SOFTMAX,
        layout=Layout.HEADS,
        map=meeting.value,
        query=query,  # type: ignore[arg-type]
        key=key,  # type: ignore[arg-type]
        value=value,  # type: ignore[arg-type]
        output=meeting.node.outputs[0],
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        queries=queries,
        keys=positions if keys is None else keys,
        depth=depth,
        masked=chains.can_hide(scores.path, view) or any(_zeroes(step) for step in meeting.path),
        nodes=nodes,
    )


def _zeroes(step: ir.Node) -> bool:
    """Whether a step after the softmax takes weights away; a guard against NaN does not."""
    if step.op_type != "Where" or step.inputs[0] is None:
        return False
    condition = step.inputs[0].producer()
    return condition is None or condition.op_type != "IsNaN"


def _refusal(node: ir.Node, meeting: chains.Meeting, view: View) -> str | None:
    """Why the map that meets V cannot be patched as it is; None where it can."""
    if view.opset < _FIRST_OPSET:
        return f"the model has opset {view.opset}; convert it to 13 or later (onnx.version_converter)"
    if meeting.node.op_type != "MatMul":
        return f"the map meets the values in {meeting.node.op_type}, not in MatMul"
    shape, values = view.shape(meeting.value), view.shape(meeting.node.inputs[1])
    if shape is None or values is None:
        return "the shape of its map or values cannot be inferred"
    if len(shape) != 4 or len(values) != 4:
        return (
            f"its map has {len(shape)} axes and its values {len(values)}, not the four of "
            "[batch, heads, queries, keys] and [batch, heads, keys, depth]"
        )
    return (
        _axis_reason(node, view)
        or _path_reason(node, meeting, view)
        or batch_reason(shape[0], view)
        or type_reason(view.dtype(meeting.node.outputs[0]))
    )


def _axis_reason(node: ir.Node, view: View) -> str | None:
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    rank = view.rank(node.outputs[0])
    if axis == -1 or (rank is not None and axis == rank - 1):
        return None
    return f"its softmax runs over axis {axis}, not over the last axis"


def _path_reason(node: ir.Node, meeting: chains.Meeting, view: View) -> str | None:
    """What happens to the map between the softmax and V must leave each row a distribution over the same keys."""
    before, after = view.shape(node.outputs[0]), view.shape(meeting.value)
    if before and after and before[-1] != after[-1] and None not in (before[-1], after[-1]):
        return (
            f"its map loses columns between the softmax and the values ({before[-1]} to {after[-1]}, an attention "
            "sink), so that its rows do not sum to one"
        )
    for step in meeting.path:
        if step.op_type in {"Mul", "Div"}:
            return (
                "its map is multiplied by a head mask or gate after the softmax, so that its rows need not sum to one"
            )
        if step.op_type == "Transpose" and _moves_last(step):
            return "its map is transposed between the softmax and the values"
    return None


def _moves_last(step: ir.Node) -> bool:
    if "perm" not in step.attributes:
        return True
    perm = step.attributes["perm"].as_ints()
    return perm[-1] != len(perm) - 1


RULE = Rule(anchors=frozenset({("", "Softmax")}), answer=answer)
