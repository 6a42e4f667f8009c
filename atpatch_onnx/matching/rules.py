"""What a rule is: anchors and an answer, which is a candidate or a reason, never nothing."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import onnx_ir as ir

from atpatch_onnx.matching.view import View
from atpatch_onnx.sites import Dim, Form, Layout, NearMiss

OK_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
"""Element types that the arithmetic of the patch is tested in."""


@dataclass(frozen=True)
class Candidate:
    """An attention site before it has a name, an index and a token axis."""

    anchor: ir.Node
    form: Form
    layout: Layout
    map: ir.Value | None
    query: ir.Value
    key: ir.Value
    value: ir.Value
    output: ir.Value
    batch: Dim
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
    """Never empty."""


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
    return f"its element type is {found}; attention is patched in float32 and float16 only"


def batch_reason(batch: Dim, view: View) -> str | None:
    """Why the first axis of a map is not the sample axis; None where nothing says so."""
    if batch in view.batches and batch is not None:
        return None
    if batch is None or None in view.batches:
        return "it cannot be inferred that the first axis of its map is the batch"
    inputs = " or ".join(str(size) for size in sorted(view.batches, key=str))
    if batch == 1:
        return f"its map is the same for all samples (batch 1, the model's inputs have {inputs})"
    return (
        f"the first axis of its map has {batch} entries where the model's inputs have {inputs}: windows or parts are "
        "folded into the batch, so that a map does not belong to one sample"
    )
