"""Fused attention of onnxruntime's own domain: recognised, and refused with what to do instead."""

import onnx_ir as ir

from atpatch_onnx.matching.rules import Candidate, Rule, miss
from atpatch_onnx.matching.view import View
from atpatch_onnx.sites import NearMiss

_OPS = (
    "Attention",
    "DecoderMaskedMultiHeadAttention",
    "DecoderMaskedSelfAttention",
    "GroupQueryAttention",
    "LongformerAttention",
    "MultiHeadAttention",
    "PackedAttention",
    "PackedMultiHeadAttention",
    "PagedAttention",
    "QAttention",
    "SparseAttention",
)


def answer(node: ir.Node, view: View) -> tuple[Candidate | NearMiss, ...]:
    """Always a near miss."""
    reason = (
        f"attention, but fused into com.microsoft::{node.op_type}, which does not hand out its map; export the model "
        "without onnxruntime fusions"
    )
    return (miss([node], reason, attention=True),)


RULE = Rule(anchors=frozenset(("com.microsoft", name) for name in _OPS), answer=answer)
