"""Fused attention of onnxruntime's own domain: keys and values are its operands, packed or apart."""

from dataclasses import dataclass

import onnx_ir as ir

from atpatch_onnx.matching.chains import is_mask
from atpatch_onnx.matching.layout import MAP
from atpatch_onnx.matching.leading import Axis, name_leading
from atpatch_onnx.matching.operands import integer, operand, rank
from atpatch_onnx.matching.pieces import Part, Pieces, from_layout, rebuilt
from atpatch_onnx.matching.rules import Candidate, OwnBias, Rule, miss, type_reason
from atpatch_onnx.matching.sites import Dim, Form, NearMiss
from atpatch_onnx.matching.view import View

_REFUSED = (
    "Attention",
    "DecoderMaskedMultiHeadAttention",
    "DecoderMaskedSelfAttention",
    "LongformerAttention",
    "PackedAttention",
    "PackedMultiHeadAttention",
    "QAttention",
    "SparseAttention",
)
"""Fused attention that is not patched, with the reasons of `_WHY` or that of all others."""

_WHY = {
    "Attention": "it projects queries, keys and values itself; fuse the model without it "
    "(onnxruntime.transformers.optimizer --use_multi_head_attention, or export without onnxruntime fusions)",
    "QAttention": "it projects quantized queries, keys and values itself; quantize the model without fused attention",
}
_UNKNOWN_RANK = "it is not known how many axes its {} has; run onnx.shape_inference on the model first"


@dataclass(frozen=True)
class _Operands:
    """What a node's inputs and attributes say of its Q, K and V."""

    query: ir.Value
    keys: Pieces
    values: Pieces
    heads: int
    batch: Dim
    queries: Dim
    masked: bool
    bias: OwnBias | None = None


def answer(node: ir.Node, view: View) -> tuple[Candidate | NearMiss, ...]:
    """A candidate, or why this use of the op is refused."""
    found = _match(node, view)
    if isinstance(found, str):
        return (miss([node], f"attention, but {found}", attention=True),)
    return (found,)


def _match(node: ir.Node, view: View) -> Candidate | str:
    if node.op_type not in _READERS:
        how = "which hides its keys and values; export the model without onnxruntime fusions"
        return f"fused into com.microsoft::{node.op_type}: {_WHY.get(node.op_type, how)}"
    operands = _READERS[node.op_type](node, view)
    if isinstance(operands, str):
        return operands
    parts = 1 if node.op_type in _ON_ONE_AXIS else _parts(operands, view)
    if isinstance(parts, str):
        return parts
    reason = type_reason(view.dtype(node.outputs[0]) or view.dtype(operands.query))
    if reason is not None:
        return reason
    return Candidate(
        anchor=node,
        form=Form.FUSED,
        map=None,
        map_layout=MAP,
        query=operands.query,
        keys=operands.keys,
        values=operands.values,
        key_reader=node,
        output=node.outputs[0],
        parts=parts,
        heads=operands.heads,
        queries=operands.queries,
        masked=operands.masked,
        nodes=(node,),
        bias=operands.bias,
    )


def _parts(operands: _Operands, view: View) -> Dim | str:
    """How many maps a sample has, or why that cannot be told."""
    traces = ((operands.values.value, 0), (operands.query, 0))
    leading = name_leading([Axis(operands.batch, traces)], view)
    if isinstance(leading, str):
        return leading
    if leading.letters != ("n",):
        return "its first axis is not made of samples and their parts, in this order"
    return leading.parts


def _multi_head(node: ir.Node, view: View) -> _Operands | str:
    query, key, value, bias, mask = (operand(node, index) for index in range(5))
    if query is None:
        return "Q is missing"
    reason = _multi_head_reason(node)
    if reason is not None:
        return reason
    heads = integer(node, "num_heads")
    if key is None:
        keys, values = (_stacked(query, index, view) for index in (1, 2))
    elif value is None:
        keys, values = (_stacked(key, index, view) for index in (0, 1))
    else:
        forms = ("nk(hd)" if rank(given) == 3 else "nhkd" for given in (key, value))
        keys, values = (
            from_layout(given, form, {"h": heads}, view) for given, form in zip((key, value), forms, strict=True)
        )
    width = None if bias is None else view.shape(bias)
    if keys is None or values is None or (bias is not None and not (width and isinstance(width[0], int))):
        return "the sizes of its keys and values cannot be inferred"
    if bias is not None and (not view.is_static(bias) or bias.is_graph_input()):
        return "its bias is computed or given"
    shape = _shape(query, view)
    sizes = None if bias is None else [heads * _extent(given, "d") for given in (keys, values)]
    return _Operands(
        query=query,
        keys=keys,
        values=values,
        heads=heads,
        batch=shape[0],
        queries=shape[1],
        masked=_masked(node, view, mask=mask, bias=operand(node, 5), past=operand(node, 6)),
        bias=None if bias is None or sizes is None else OwnBias(bias, sizes[0], 2 * sizes[0]),
    )


def _extent(pieces: Pieces, letter: str) -> int:
    found = 1
    for piece in pieces.pieces:
        found *= piece.size if piece.letter == letter else 1
    return found


def _stacked(value: ir.Value, index: int, view: View) -> Pieces | None:
    """One of the tensors that are stacked on the axis before the last, `[maps, tokens, heads, stacked, depth]`."""
    shape = view.sizes(value)
    if shape is None or len(shape) != 5:
        return None
    parts = [Part(letter, axis, 1, shape[axis]) for letter, axis in zip("nkhd", (0, 1, 2, 4), strict=True)]
    return rebuilt(value, [0, 0, 0, index, 0], parts, shape)


def _multi_head_reason(node: ir.Node) -> str | None:
    """Why this `MultiHeadAttention` is refused; None where it is not."""
    query, key, value, bias, _ = (operand(node, index) for index in range(5))
    ranks = {name: rank(v) for name, v in (("Q", query), ("K", key), ("V", value)) if v is not None}
    unknown = next((name for name, axes in ranks.items() if axes is None), None)
    if unknown is not None:
        return _UNKNOWN_RANK.format(unknown)
    forms = (ranks["Q"], ranks.get("K"), ranks.get("V"))
    if forms not in ((5, None, None), (3, 5, None), (3, 3, 3), (3, 4, 4)):
        return f"its Q, K and V have an unknown form, with {forms} axes"
    if ranks.get("K") == 5 and bias is not None:
        return "it has a bias beside packed keys and values, which onnxruntime refuses as well"
    return None


def _grouped(node: ir.Node, view: View) -> _Operands | str:
    """Heads that share keys and values, of one of which several queries ask."""
    query, key, value = (operand(node, index) for index in range(3))
    if query is None or (key is None) != (value is None):
        return "of Q, K and V, not all are given"
    heads, kv_heads = integer(node, "num_heads"), integer(node, "kv_num_heads")
    tokens = "k" if node.op_type in _ON_ONE_AXIS else "nk"
    if key is not None and _shape(key, view)[len(tokens) - 1] == 0:
        return "it has no separate keys and reads another layer's: they are replaced there"
    if key is None:
        keys, values = (_packed(query, tokens, heads, kv_heads, index, view) for index in (0, 1))
    else:
        assert value is not None
        keys, values = (from_layout(given, f"{tokens}(hd)", {"h": kv_heads}, view) for given in (key, value))
    if keys is None or values is None:
        return "the sizes of its keys and values cannot be inferred"
    shape = _shape(query, view)
    return _Operands(
        query=query,
        keys=keys,
        values=values,
        heads=heads,
        batch=shape[0],
        queries=shape[len(tokens) - 1],
        masked=True,  # by causality, or by the lengths of the samples
    )


def _packed(value: ir.Value, tokens: str, heads: int, kv_heads: int, index: int, view: View) -> Pieces | None:
    """Keys or values within `[*tokens, (heads + 2 kv heads) * depth]`."""
    shape = view.sizes(value)
    if shape is None or len(shape) != len(tokens) + 1 or not heads + 2 * kv_heads:
        return None
    depth, last = shape[-1] // (heads + 2 * kv_heads), len(tokens)
    parts = [
        *(Part(letter, axis, 1, shape[axis]) for axis, letter in enumerate(tokens)),
        Part("h", last, depth, kv_heads),
        Part("d", last, 1, depth),
    ]
    return rebuilt(value, [0] * last + [(heads + index * kv_heads) * depth], parts, shape)


_ON_ONE_AXIS = frozenset({"PagedAttention"})
"""Operators that take the tokens of all samples one behind the other, on one axis: a graph of them has no samples."""

_READERS = {"MultiHeadAttention": _multi_head, "GroupQueryAttention": _grouped, "PagedAttention": _grouped}


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


RULE = Rule(anchors=frozenset(("com.microsoft", name) for name in (*_REFUSED, *_READERS)), answer=answer)
