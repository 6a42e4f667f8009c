"""Fused attention of onnxruntime's own domain: accepted where its map can be computed beside it (`shadow`)."""

from dataclasses import dataclass

import onnx_ir as ir

from atpatch_onnx.matching.chains import is_mask
from atpatch_onnx.matching.layout import MAP, VALUES
from atpatch_onnx.matching.leading import Axis, name_leading
from atpatch_onnx.matching.operands import integer, operand, rank
from atpatch_onnx.matching.rules import Candidate, Rule, miss, type_reason
from atpatch_onnx.matching.sites import Dim, Form, NearMiss
from atpatch_onnx.matching.view import View

OPS = frozenset({"MultiHeadAttention", "Attention", "GroupQueryAttention"})
"""The com.microsoft operators that have a shadow (`baking.shadow`)."""

_REFUSED = (
    "DecoderMaskedMultiHeadAttention",
    "DecoderMaskedSelfAttention",
    "LongformerAttention",
    "PackedAttention",
    "PackedMultiHeadAttention",
    "PagedAttention",
    "QAttention",
    "SparseAttention",
)
"""Fused attention whose map is not computed: tokens without padding, quantized weights, sparse maps, paged caches."""

_UNKNOWN_RANK = "it is not known how many axes its {} has; run onnx.shape_inference on the model first"
_SHARED_BUFFER = "its cache is a buffer that it writes into itself; export the model with a cache that grows"


@dataclass(frozen=True)
class _Operands:
    """What a node's inputs and attributes say of its Q, K and V."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    """Where positions come from; the same input where projections are packed."""

    heads: int
    kv_heads: int
    batch: Dim
    queries: Dim
    keys: Dim
    depth: Dim
    masked: bool


def answer(node: ir.Node, view: View) -> tuple[Candidate | NearMiss, ...]:
    """A candidate, or why this use of the op is refused."""
    found = _match(node, view)
    if isinstance(found, str):
        return (miss([node], f"attention, but {found}", attention=True),)
    return (found,)


def _match(node: ir.Node, view: View) -> Candidate | str:
    if node.op_type not in OPS:
        return (
            f"fused into com.microsoft::{node.op_type}, which does not hand out its map; export the model without "
            "onnxruntime fusions"
        )
    operands = _READERS[node.op_type](node, view)
    if isinstance(operands, str):
        return operands
    traces = ((operands.value, 0), (operands.query, 0))
    leading = name_leading([Axis(operands.batch, traces)], view)
    if isinstance(leading, str):
        return leading
    if leading.letters != ("n",):
        return "its first axis is not made of samples and their parts, in this order"
    reason = type_reason(view.dtype(node.outputs[0]) or view.dtype(operands.query))
    if reason is not None:
        return reason
    return Candidate(
        anchor=node,
        form=Form.FUSED,
        map=None,
        map_layout=MAP,
        value_layout=VALUES,
        output_layout="nq(hd)",
        query=operands.query,
        key=operands.key,
        value=operands.value,
        output=node.outputs[0],
        parts=leading.parts,
        heads=operands.heads,
        kv_heads=operands.kv_heads,
        queries=operands.queries,
        keys=operands.keys,
        depth=operands.depth,
        masked=operands.masked,
        nodes=(node,),
    )


def _multi_head(node: ir.Node, view: View) -> _Operands | str:
    query, key, value, _, mask = (operand(node, index) for index in range(5))
    if query is None:
        return "Q is missing"
    reason = _multi_head_reason(node, view)
    if reason is not None:
        return reason
    heads = integer(node, "num_heads")
    key = key or query  # packed
    value = value or key
    query_shape, key_shape, value_shape = (_shape(given, view) for given in (query, key, value))
    position = 2 if len(key_shape) == 4 else 1  # one row of keys a head, or heads within each key
    return _Operands(
        query=query,
        key=key,
        value=value,
        heads=heads,
        kv_heads=heads,
        batch=query_shape[0],
        queries=query_shape[1],
        keys=_sum(key_shape[position], _past_length(node, 6, 2, view)),
        depth=_share(value_shape[2], heads) if len(value_shape) == 3 else value_shape[-1],
        masked=_masked(node, view, mask=mask, bias=operand(node, 5), past=operand(node, 6)),
    )


def _multi_head_reason(node: ir.Node, view: View) -> str | None:
    """Why this `MultiHeadAttention` is refused; None where it is not."""
    query, key, value, bias, mask = (operand(node, index) for index in range(5))
    if operand(node, 8) is not None or operand(node, 9) is not None:
        return _SHARED_BUFFER
    ranks = {name: rank(v) for name, v in (("Q", query), ("K", key), ("V", value), ("mask", mask)) if v is not None}
    unknown = next((name for name, axes in ranks.items() if axes is None), None)
    if unknown is not None:
        return _UNKNOWN_RANK.format(unknown)
    forms = (ranks["Q"], ranks.get("K"), ranks.get("V"))
    if forms not in ((5, None, None), (3, 5, None), (3, 3, 3), (3, 4, 4)):
        return f"its Q, K and V have an unknown form, with {forms} axes"
    if ranks.get("K") == 5 and bias is not None:
        return "it has a bias beside packed keys and values, which onnxruntime refuses as well"
    if ranks.get("mask", 1) not in (1, 2, 3):
        return f"its mask has {ranks['mask']} axes, where onnxruntime knows 1, 2 and 3"
    return None


def _attention(node: ir.Node, view: View) -> _Operands | str:
    source, weights, _, mask, past = (operand(node, index) for index in range(5))
    if source is None or weights is None:
        return "its input or its weights are missing"
    reason = _attention_reason(node)
    if reason is not None:
        return reason
    heads = integer(node, "num_heads")
    shape = _shape(source, view)
    if "qkv_hidden_sizes" in node.attributes:
        width: Dim = node.attributes["qkv_hidden_sizes"].as_ints()[2]
    else:
        width = _share(_shape(weights, view)[-1], 3)
    return _Operands(
        query=source,
        key=source,
        value=source,
        heads=heads,
        kv_heads=heads,
        batch=shape[0],
        queries=shape[1],
        keys=_sum(shape[1], _past_length(node, 4, 3, view)),
        depth=_share(width, heads),
        masked=_masked(node, view, mask=mask, bias=operand(node, 5), past=past),
    )


def _attention_reason(node: ir.Node) -> str | None:
    """Why this `Attention` is refused; None where it is not."""
    if integer(node, "do_rotary"):
        return "it rotates Q and K itself (do_rotary), which onnxruntime's CPU kernel cannot confirm; rotate before it"
    if integer(node, "past_present_share_buffer") or operand(node, 6) is not None:
        return _SHARED_BUFFER
    mask = operand(node, 3)
    axes = None if mask is None else rank(mask)
    if mask is not None and axes is None:
        return _UNKNOWN_RANK.format("mask")
    if axes not in (None, 1, 2, 3):
        return f"its mask has {axes} axes (Megatron's form), not 1 to 3"
    return None


def _grouped(node: ir.Node, view: View) -> _Operands | str:
    query, key, value = (operand(node, index) for index in range(3))
    if query is None or (key is None) != (value is None):
        return "of Q, K and V, not all are given"
    reason = _grouped_reason(node, view)
    if reason is not None:
        return reason
    heads, kv_heads = integer(node, "num_heads"), integer(node, "kv_num_heads")
    shape = _shape(query, view)
    return _Operands(
        query=query,
        key=key or query,
        value=value or query,
        heads=heads,
        kv_heads=kv_heads,
        batch=shape[0],
        queries=shape[1],
        keys=_grouped_keys(node, shape[1], view),
        depth=_share(shape[2], heads + 2 * kv_heads if key is None else heads),
        masked=True,  # by causality, or by the lengths of the samples
    )


def _grouped_reason(node: ir.Node, view: View) -> str | None:
    """Why this `GroupQueryAttention` is refused; None where it is not."""
    if integer(node, "sliding_window_cache"):
        return "its cache drops old keys (sliding_window_cache); export the model with a cache that keeps them"
    if any(operand(node, index) is not None for index in (12, 13)) or _quantized(node, view):
        return "its cache is quantized; export the model with a cache of floats"
    if any(operand(node, index) is not None for index in (14, 15)):
        return "it normalizes Q and K itself (q_norm_weight), which onnxruntime's CPU kernel cannot confirm"
    key = operand(node, 1)
    if integer(node, "do_rotary") and (operand(node, 7) is None or operand(node, 8) is None):
        return "it rotates Q and K but has no caches of cosines and sines"
    if key is not None and _shape(key, view)[1] == 0:
        return "it has no keys of its own and reads another layer's"
    return None


def _quantized(node: ir.Node, view: View) -> bool:
    """Whether the cache holds whole numbers, or the node says that it does."""
    past = operand(node, 3)
    dtype = None if past is None else view.dtype(past)
    kinds = [node.attributes[name].as_string() for name in ("k_quant_type", "v_quant_type") if name in node.attributes]
    return any(kind not in ("", "NONE") for kind in kinds) or (dtype is not None and not dtype.is_floating_point())


def _grouped_keys(node: ir.Node, queries: Dim, view: View) -> Dim:
    """The longest sequence of the batch: as a bias has it, as the node is told, or what there is without a cache."""
    bias, total = view.shape(operand(node, 10)), view.constant(operand(node, 6))
    if bias and bias[-1] is not None:
        return bias[-1]
    if total is not None:
        return int(total.item())
    return queries if operand(node, 3) is None else None


_READERS = {"MultiHeadAttention": _multi_head, "Attention": _attention, "GroupQueryAttention": _grouped}


def _masked(node: ir.Node, view: View, *, mask: ir.Value | None, bias: ir.Value | None, past: ir.Value | None) -> bool:
    """Whether a key may be hidden from a query; padding is a mask of whole numbers, in which 0 hides."""
    padded = False
    if mask is not None:
        content = view.constant(mask)
        padded = content is None or content.ndim == 1 or bool((content <= 0).any())
    biased = bias is not None and is_mask(bias, view)
    return bool(integer(node, "unidirectional")) or padded or biased or past is not None


def _shape(value: ir.Value, view: View) -> tuple[Dim, ...]:
    """The sizes of a value's axes; of three that are not known, where not even their number is."""
    return view.shape(value) or (None,) * (rank(value) or 3)


def _past_length(node: ir.Node, index: int, axis: int, view: View) -> Dim:
    """Keys in the cache; 0 without one."""
    past = operand(node, index)
    if past is None:
        return 0
    shape = view.shape(past)
    return None if shape is None else shape[axis]


def _sum(one: Dim, other: Dim) -> Dim:
    """Of new keys and of those in the cache."""
    if isinstance(one, int) and isinstance(other, int):
        return one + other
    if other == 0:
        return one
    return None if one is None or other is None else f"{other} + {one}"


def _share(width: Dim, parts: int) -> Dim:
    """One of the equal parts of a width."""
    return width // parts if isinstance(width, int) and parts else None


RULE = Rule(anchors=frozenset(("com.microsoft", name) for name in (*_REFUSED, *OPS)), answer=answer)
