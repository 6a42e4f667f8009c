"""Modules that are called attention and compute no map: linear attention, Fourier mixing, convolutions, recurrences.

There is no softmax to be anchored at, so the only trace is the module's name, where the export kept it.
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
            reason = (
                f"attention without a map: the module {path} has no softmax over keys (linear attention, a Fourier "
                "transform, a convolution or a recurrence)"
            )
            yield miss(mixing, reason, attention=False)
