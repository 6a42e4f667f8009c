"""What is called attention and has no map in the graph: modules without a softmax, and operators that nobody knows.

There is nothing to be anchored at, so the only trace is a name: the module's, where the export kept it, or the
operator's.
"""

import re
from collections.abc import Collection, Iterator

import onnx_ir as ir

from atpatch_onnx.matching.chains import PRODUCTS
from atpatch_onnx.matching.naming import module_path
from atpatch_onnx.matching.rules import label, miss
from atpatch_onnx.matching.sites import NearMiss

_ATTENTION = re.compile(r"attn|attention|fourier", re.IGNORECASE)
_BESIDE = re.compile(r"norm|dropout|mask|bias|gate|embed|pos", re.IGNORECASE)
"""Modules that serve an attention and are none."""

_MIXING = PRODUCTS | {"Conv", "DFT", "STFT", "Scan", "Loop"}


_OPERATOR = re.compile(r"attention|attn|\bmha\b|fmha", re.IGNORECASE)
_OWN = ("", "ai.onnx", "ai.onnx.ml")


def unknown_operators(
    nodes: Collection[ir.Node], known: Collection[str], functions: Collection[tuple[str, str, str]]
) -> Iterator[NearMiss]:
    """A near miss for each operator of another domain that is attention by its name, and no function of the model."""
    for node in nodes:
        named = _OPERATOR.search(node.op_type) and not _BESIDE.search(node.op_type)
        if named and node.domain not in _OWN and label(node) not in known and node.op_identifier() not in functions:
            kind = f"{node.domain}::{node.op_type}"
            reason = f"attention by its name, but in the operator {kind}, which is not known; export the model without"
            yield miss([node], reason, attention=True)


def unmapped(nodes: Collection[ir.Node], known: Collection[str]) -> Iterator[NearMiss]:
    """A near miss for each such module; `known` are the labels of the nodes that sites and near misses have."""
    modules: dict[str, list[ir.Node]] = {}
    for node in nodes:
        parts = module_path(node).split(".")
        own = next((i for i, part in enumerate(parts) if _ATTENTION.search(part) and not _BESIDE.search(part)), None)
        if own is not None:
            modules.setdefault(".".join(parts[: own + 1]), []).append(node)
    for path, members in modules.items():
        mixing = [node for node in members if node.op_type in _MIXING]
        if len(mixing) > 1 and not any(label(node) in known for node in members):
            foreign = sorted({f"{node.domain}::{node.op_type}" for node in members if node.domain not in _OWN})
            beside = f"; what is in {', '.join(foreign)} was not looked into" if foreign else ""
            reason = (
                f"attention without a map: the module {path} has no softmax over keys (linear attention, a Fourier "
                f"transform, a convolution or a recurrence){beside}"
            )
            yield miss(mixing, reason, attention=False)
