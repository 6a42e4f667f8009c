"""What a rule is: anchors and an answer, which is a candidate or a reason."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import onnx_ir as ir

from atpatch_onnx.matching.sites import Dim, Form, NearMiss
from atpatch_onnx.matching.view import View

OK_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""Element types that are patched; the arithmetic of the patch is float32."""


@dataclass(frozen=True)
class Candidate:
    """An attention site before it has a name, an index and a token axis."""

    anchor: ir.Node
    form: Form
    map: ir.Value | None
    map_layout: str
    value_layout: str
    output_layout: str
    """See `atpatch_onnx.matching.layout`."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    output: ir.Value
    parts: Dim
    """Maps of one sample; 0 where samples share a map, None where it is not known."""

    heads: Dim
    kv_heads: Dim
    queries: Dim
    keys: Dim
    depth: Dim
    masked: bool
    nodes: tuple[ir.Node, ...]


@dataclass(frozen=True)
class Rule:
    """One form of attention: the operators it is anchored at, and what it answers for such a node."""

    anchors: frozenset[tuple[str, str]]
    """(domain, operator) pairs."""

    answer: Callable[[ir.Node, View], tuple[Candidate | NearMiss, ...]]
    """Empty where the node is no attention at first sight."""


def label(node: ir.Node) -> str:
    """The node's name, or its first output's where it has none."""
    return node.name or next((value.name for value in node.outputs if value.name), node.op_type)


def miss(nodes: Iterable[ir.Node], reason: str, *, attention: bool) -> NearMiss:
    """A near miss that names each node once."""
    return NearMiss(tuple(dict.fromkeys(label(node) for node in nodes)), reason, attention)


def type_reason(dtype: ir.DataType | None) -> str | None:
    """Why a site of this element type is refused; None where it is not."""
    if dtype in OK_TYPES:
        return None
    found = "unknown" if dtype is None else dtype.name
    return f"its element type is {found}; attention is patched in float32, float16 and bfloat16"
