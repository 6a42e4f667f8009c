"""The ONNX op `Attention` of opset 23 and later, 4-D `[batch, heads, positions, depth]` or 3-D with packed heads."""

import onnx_ir as ir

from atpatch_onnx.matching.chains import is_mask
from atpatch_onnx.matching.layout import MAP, VALUES
from atpatch_onnx.matching.leading import Axis, name_leading
from atpatch_onnx.matching.pieces import from_layout
from atpatch_onnx.matching.rules import Candidate, Rule, miss, type_reason
from atpatch_onnx.matching.sites import Dim, Form, NearMiss
from atpatch_onnx.matching.view import View

_QUERY, _KEY, _VALUE, _MASK, _PAST_KEY, _PAST_VALUE, _PADDING = range(7)
"""Positions of the inputs; `_PADDING` is `nonpad_kv_seqlen` (opset 24)."""


def answer(node: ir.Node, view: View) -> tuple[Candidate | NearMiss, ...]:
    """A candidate, or why this use of the op is refused."""
    found = _match(node, view)
    if isinstance(found, str):
        return (miss([node], f"attention, but {found}", attention=True),)
    return (found,)


def _match(node: ir.Node, view: View) -> Candidate | str:
    windowed = [name for name in node.attributes if "window" in name and node.attributes[name].as_int() not in (0, -1)]
    if windowed:
        return f"it attends within a window ({', '.join(windowed)}), which no runtime supports yet"
    query, key, value = (_input(node, index) for index in (_QUERY, _KEY, _VALUE))
    if query is None or key is None or value is None:
        return "Q, K or V is missing"
    shapes = [view.shape(operand) for operand in (query, key, value)]
    ranks = {len(shape) for shape in shapes if shape is not None}
    if ranks not in ({4}, {3}):
        return f"its inputs must all have 4 or all 3 axes, found {sorted(ranks) or 'unknown shapes'}"
    packed = ranks == {3}
    batch, heads, kv_heads, queries = _packed_dims(node, shapes) if packed else _dims(shapes)
    leading = name_leading([Axis(batch, ((value, 0), (query, 0)))], view)
    if isinstance(leading, str):
        return leading
    if leading.letters != ("n",):
        return "its first axis is not made of samples and their parts, in this order"
    reason = type_reason(view.dtype(node.outputs[0]) or view.dtype(query))
    if reason is not None:
        return reason
    layout, folded = ("nk(hd)" if packed else VALUES), {"h": kv_heads} if isinstance(kv_heads, int) else {}
    keys, values = (from_layout(operand, layout, folded, view) for operand in (key, value))
    if keys is None or values is None:
        return "the sizes of its keys and values cannot be inferred"
    return Candidate(
        anchor=node,
        form=Form.ATTENTION,
        map=None,
        map_layout=MAP,
        query=query,
        keys=keys,
        values=values,
        key_reader=node,
        output=node.outputs[0],
        parts=leading.parts,
        heads=heads,
        queries=queries,
        masked=_masked(node, view),
        nodes=(node,),
    )


def _input(node: ir.Node, index: int) -> ir.Value | None:
    return node.inputs[index] if index < len(node.inputs) else None


def _masked(node: ir.Node, view: View) -> bool:
    causal = "is_causal" in node.attributes and node.attributes["is_causal"].as_int() != 0
    mask = _input(node, _MASK)
    hidden = mask is not None and is_mask(mask, view)
    return causal or hidden or any(_input(node, index) is not None for index in (_PAST_KEY, _PAST_VALUE, _PADDING))


def _dims(shapes: list[tuple[Dim, ...] | None]) -> tuple[Dim, Dim, Dim, Dim]:
    """(batch, heads, kv heads, queries) of 4-D inputs."""
    query, key, _ = (shape or (None,) * 4 for shape in shapes)
    return query[0], query[1], key[1], query[2]


def _packed_dims(node: ir.Node, shapes: list[tuple[Dim, ...] | None]) -> tuple[Dim, Dim, Dim, Dim]:
    """The same of 3-D inputs, which need the attributes q_num_heads and kv_num_heads."""
    query = shapes[0] or (None,) * 3
    heads, kv_heads = (
        node.attributes[name].as_int() if name in node.attributes else None for name in ("q_num_heads", "kv_num_heads")
    )
    return query[0], heads, kv_heads, query[1]


RULE = Rule(anchors=frozenset({("", "Attention")}), answer=answer)
