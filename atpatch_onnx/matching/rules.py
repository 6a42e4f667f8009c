"""What a rule is: anchors and an answer, which is a candidate or a reason."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import onnx_ir as ir

from atpatch_onnx.matching.pieces import Pieces
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
    """See `atpatch_onnx.matching.layout`."""

    query: ir.Value
    keys: Pieces
    """Where they meet the queries, in `key_reader`."""

    values: Pieces
    """Where they meet the map, in the node that computes `output`."""

    key_reader: ir.Node
    output: ir.Value
    parts: Dim
    """Maps of one sample; 0 where samples share a map, None where it is not known."""

    heads: Dim
    queries: Dim
    masked: bool
    nodes: tuple[ir.Node, ...]
    bias: "OwnBias | None" = None
    """What the operator itself adds to keys and values."""


@dataclass(frozen=True)
class OwnBias:
    """Weights that an operator adds to keys and values by itself."""

    value: ir.Value
    keys: int
    """Where those of the keys begin."""

    values: int


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
