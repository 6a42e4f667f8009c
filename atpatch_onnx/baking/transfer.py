"""Carry a patch from one export of a model to another: the same detectors and neutral tokens, at its sites.

Keys and values are per token behind their projection, whatever an exporter makes of the rest, so a patch serves every
export. Sites go by their order; that they are the same is seen in their projections' weights, where both are weights.

An encoder-decoder computes the keys of its cross-attention once, in the graph that reads the prompt, and hands them to
the one that goes on. There they come from an input, neutral already, and nothing is to be done.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.errors import PatchMismatchError
from atpatch_onnx.graph import constant, fingerprint
from atpatch_onnx.graph.values import find_value
from atpatch_onnx.matching import find_sites
from atpatch_onnx.matching.batches import look
from atpatch_onnx.matching.sites import AttentionSite, Place
from atpatch_onnx.matching.view import View
from atpatch_onnx.patches.patch import Patch
from atpatch_onnx.running.slots import Slot


def transfer(patch: Patch, base: ir.Model, other: ir.Model) -> Patch:
    """The same patch for another export of the model that it was fitted on.

    Args:
        patch: Of the attention.
        base: The export that it was fitted on.
        other: Another export of the same model.

    Raises:
        PatchMismatchError: The patch is not of `base`, edits hidden units or was fitted after one that does, or the
            two are not exports of one model: other sites, heads, depths or projections. Or `other` needs no patch:
            all that this one replaces is handed to it.
    """
    if patch.base != fingerprint(base):
        raise _mismatch("the base", f"the model that the patch was fitted on, {patch.base}", fingerprint(base))
    if patch.edits or patch.after:
        raise _mismatch(f"patch {patch.id}", "a patch of the attention alone", "edits of hidden units")
    ours, theirs = find_sites(base), find_sites(other)
    handed = [site for site in theirs if _is_handed(site, other)]
    replaced = [site.name for site in ours if handed and not site.self_attention]
    ours = tuple(site for site in ours if site.name not in replaced)
    theirs = tuple(site for site in theirs if site not in handed)
    if len(ours) != len(theirs) or len(replaced) != len(handed):
        counts = (
            f"{len(sites)} attention sites" + f", {len(others)} of them on what it is handed" * bool(others)
            for sites, others in (((*ours, *replaced), replaced), ((*theirs, *handed), handed))
        )
        expected, found = counts
        raise _mismatch("the other model", f"{expected}, as the base has", found)
    seen = look(base), look(other)
    for site, own in zip(ours, theirs, strict=True):
        _compare(site, own, seen)
    names = {site.name: own.name for site, own in zip(ours, theirs, strict=True)}
    unknown = [entry.site for entry in patch.sites if entry.site not in (*names, *replaced)]
    if unknown:
        raise _mismatch("the base", f"the attention site {unknown[0]!r}", ", ".join((*names, *replaced)) or "none")
    sites = tuple(replace(entry, site=names[entry.site]) for entry in patch.sites if entry.site in names)
    if patch.sites and not sites:
        raise PatchMismatchError(
            "the other model",
            expected="a site that the patch is for",
            found="none: the keys and values that it replaces are handed to this graph",
            advice="Leave the graph as it is: it goes on from what the patched one hands it.",
        )
    return replace(patch, base=fingerprint(other), sites=sites)


def _is_handed(site: AttentionSite, model: ir.Model) -> bool:
    """Whether the keys of a cross-attention come from a cache as they are."""
    value = find_value(model.graph, site.key.value)
    return not site.self_attention and value.is_graph_input() and Slot.of(value).is_cache


def _compare(site: AttentionSite, other: AttentionSite, seen: tuple[View, View]) -> None:
    """Refuse two sites that are not one and the same in two exports."""
    for which, ours, theirs in (("key", site.key, other.key), ("value", site.value, other.value)):
        sizes = [f"{place.heads} heads of depth {place.depth}" for place in (ours, theirs)]
        where = f"site {other.name} of the other model"
        if sizes[0] != sizes[1]:
            raise _mismatch(where, f"{which}s of {sizes[0]}, as at {site.name} of the base", sizes[1])
        first, second = (_projection(place, one) for place, one in zip((ours, theirs), seen, strict=True))
        if first is not None and second is not None and not _same(first, second):
            raise _mismatch(where, f"the weights that project {which}s at {site.name} of the base", "others")


@dataclass(frozen=True, eq=False)
class _Projection:
    """What computes keys or values, as far as it is weights."""

    weights: NDArray[np.generic]
    """`[inputs, features]`."""

    bias: NDArray[np.generic] | None
    """`[features]`."""


def _same(one: _Projection, other: _Projection) -> bool:
    """Whether two are equal, in the smaller of their types; exporters leave a bias of zeros out."""
    none = np.zeros(one.weights.shape[1:], one.weights.dtype)
    biases = [none if projection.bias is None else projection.bias for projection in (one, other)]
    return _equal(one.weights, other.weights) and _equal(*biases)


def _equal(one: NDArray[np.generic], other: NDArray[np.generic]) -> bool:
    kind = min(one.dtype, other.dtype, key=lambda dtype: dtype.itemsize)
    return one.shape == other.shape and np.array_equal(one.astype(kind), other.astype(kind))


def _projection(place: Place, seen: View) -> _Projection | None:
    """The linear layer that a place stands behind; None where it is none of weights, or written in another way."""
    if np.prod(place.sizes) != place.sizes[-1]:
        return None
    value: ir.Value | None = find_value(seen.model.graph, place.value)
    columns, bias = place.columns.reshape(-1), None
    while value is not None:
        node = value.producer()
        if node is None:
            return None
        if node.op_type == "Split":
            before = node.outputs[: node.outputs.index(value)]  # along the last axis
            columns, value = columns + sum(_width(result, seen) or 0 for result in before), node.inputs[0]
        elif node.op_type in ("Reshape", "Identity") and _width(node.inputs[0], seen) == _width(value, seen):
            value = node.inputs[0]
        elif node.op_type == "Add" and bias is None:
            weight, value = _apart(node.inputs, seen)
            bias = None if weight is None or weight.ndim != 1 else weight[columns]
            if bias is None:
                return None
        elif node.op_type in ("MatMul", "Gemm"):
            return _linear(node, columns, bias, seen)
        else:
            return None
    return None


def _linear(
    node: ir.Node, columns: NDArray[np.int64], bias: NDArray[np.generic] | None, seen: View
) -> _Projection | None:
    weights = _weight(node.inputs[1], seen)
    if weights is None or weights.ndim != 2:
        return None
    if "transB" in node.attributes and node.attributes["transB"].as_int():
        weights = weights.T
    added = _weight(node.inputs[2], seen) if len(node.inputs) > 2 else None
    return _Projection(weights[:, columns], bias if added is None else added[columns])


def _width(value: ir.Value | None, seen: View) -> int | None:
    sizes = seen.sizes(value)
    return sizes[-1] if sizes else None


def _apart(inputs: Sequence[ir.Value | None], seen: View) -> tuple[NDArray[np.generic] | None, ir.Value | None]:
    """The one of two operands that is a weight, and the other."""
    for value, other in zip(inputs, reversed(inputs), strict=True):
        weight = _weight(value, seen)
        if weight is not None:
            return weight, other
    return None, None


def _weight(value: ir.Value | None, seen: View) -> NDArray[np.generic] | None:
    """A weight, whatever only hands it on; None for what is computed."""
    turned = False
    while value is not None and seen.is_static(value):
        tensor, node = constant(value), value.producer()
        if tensor is not None:
            return tensor.numpy().T if turned else tensor.numpy()
        if node is None or node.op_type not in ("Identity", "Transpose"):
            return None
        turned ^= node.op_type == "Transpose"  # of a matrix: two axes
        value = node.inputs[0]
    return None


def _mismatch(where: str, expected: str, found: str) -> PatchMismatchError:
    return PatchMismatchError(
        where, expected=expected, found=found, advice="Fit a patch for this model, or export the patched one again."
    )
