"""What stands between a softmax and its values, or its queries and keys, where the walks of `chains` end.

That is looked at with a wider walk, over any operator, so that a softmax is called no attention only where there is a
reason to: its scores are features of a linear layer, or given, or the same for every input, or its result is an output.
"""

from collections.abc import Iterator, Sequence, Set
from math import prod

import onnx_ir as ir

from atpatch_onnx.matching import chains
from atpatch_onnx.matching.linear import LINEAR, weight_of
from atpatch_onnx.matching.mixing import in_front, same_for_all
from atpatch_onnx.matching.normalized import Normalized
from atpatch_onnx.matching.provenance import Source, factors
from atpatch_onnx.matching.rules import miss
from atpatch_onnx.matching.sites import NearMiss
from atpatch_onnx.matching.view import View

_FARTHEST = 24
"""Nodes that a wider walk looks at."""

_PRODUCTS = chains.PRODUCTS | LINEAR | {"Conv", "FusedConv"}
_ASKED = {"Shape", "Size", "IsNaN"}
_PAIRED = {"Add", "Sub", "Mul", "Div"}
_NONLINEAR = {"Tanh", "Relu", "LeakyRelu", "Elu", "Gelu", "Sigmoid", "Cast", "Identity", "Dropout", "Reshape"}


def scores_of(softmax: Normalized, view: View) -> chains.Product | NearMiss:
    """The product of Q and K that the softmax is taken of, or why there is none."""
    linear: chains.Product | None = None
    for product in chains.back(softmax.scores, in_front(softmax, view)):
        second = product.node.inputs[1]
        if view.is_static(second) and (view.rank(second) or 3) < 3:
            linear = linear or product
        else:
            return product
    if linear is None:
        return _without_product(softmax, view)
    return _from_weights(softmax, linear.node, linear.path, view)


def _from_weights(softmax: Normalized, linear: ir.Node, path: Sequence[ir.Node], view: View) -> NearMiss:
    """What is said of scores that a product with weights gives."""
    nodes = [linear, *path, softmax.node]
    before = linear.inputs[0]
    inner = None if before is None else next(chains.back(before), None)
    between = inner is not None and _computed_twice(inner.node, view) and not _is_features(softmax, view)
    if inner is not None and between and _mixes(linear, view):
        reason = "attention, but its heads are mixed by weights in front of the softmax (talking heads)"
        return miss([inner.node, *inner.path, *nodes], reason, attention=True)
    added = None if before is None or _is_features(softmax, view) else _sum_of_two(before, view)
    if added is not None:
        reason = (
            "attention, but its scores are weights times sums of queries and keys (additive attention); only products "
            "of both are patched"
        )
        return miss([added, *nodes], reason, attention=True)
    what = "convolution" if "Conv" in linear.op_type else "linear layer"
    reason = f"not attention: its scores come from a {what} and not from a product of queries and keys"
    return miss(nodes, reason, attention=False)


def _without_product(softmax: Normalized, view: View) -> NearMiss:
    """Why there is none, by what is found with the wider walk."""
    if view.is_static(softmax.scores):
        return miss([softmax.node], "not attention: its scores are the same for every input", attention=False)
    linear: ir.Node | None = None
    seen: list[ir.Node] = []
    for node in _wider(softmax.scores):
        if node.op_type not in _PRODUCTS:
            seen.append(node)
        elif _computed_twice(node, view):
            unknown = next((one for one in seen if one.op_type not in chains.WALKED), softmax.node)
            reason = (
                f"attention, it seems, but {_kind(unknown)} stands between the softmax and the product of queries and "
                "keys, and is not followed"
            )
            return miss([node, unknown, softmax.node], reason, attention=True)
        else:
            linear = linear or node
    pairs = next((node for node in seen if _of_pairs(node, view)), None)
    if pairs is not None:
        reason = (
            f"attention, it seems, but its scores come from {_kind(pairs)} of each pair of entries of two tensors and "
            "not from a product of queries and keys; only products are patched"
        )
        return miss([pairs, softmax.node], reason, attention=True)
    if linear is not None:
        return _from_weights(softmax, linear, (), view)
    names = ", ".join(dict.fromkeys(_kind(node) for node in seen[:3])) or "an input of the model"
    reason = f"no product of queries and keys was found in front of the softmax: its scores come from {names}"
    return miss([softmax.node], reason, attention=False)


def without_values(
    softmax: Normalized, meetings: Sequence[chains.Meeting], scores: chains.Product | NearMiss, view: View
) -> NearMiss:
    """Why nothing is known to be multiplied with the map of a softmax."""
    if isinstance(scores, NearMiss) and not scores.attention:
        return scores
    nodes = [softmax.node] if isinstance(scores, NearMiss) else [scores.node, *scores.path, softmax.node]
    met = dict.fromkeys(_kind(meeting.node) for meeting in meetings)
    if not met:
        found = "is an output of the model" if softmax.weights.is_graph_output() else "is not used"
        return miss(nodes, f"not attention: the result of the softmax {found}", attention=False)
    for meeting in meetings:
        values = _values_behind(meeting, view)
        if values is not None:
            mixed = meeting.node.op_type in _PRODUCTS
            reason = (
                "its heads are mixed by weights between the softmax and the values (talking heads)"
                if mixed
                else f"{_kind(meeting.node)} stands between the softmax and the values, and is not followed"
            )
            return miss([*nodes, *meeting.path, meeting.node, values], f"attention, but {reason}", attention=True)
    if isinstance(scores, NearMiss):
        return scores
    reason = (
        f"perhaps attention: the result of the softmax goes into {', '.join(met)}; no product with values was found"
    )
    return miss(nodes, reason, attention=False)


def also_feeds(
    meetings: Sequence[chains.Meeting], known: Set[ir.Node], view: View
) -> tuple[list[ir.Node], list[ir.Node]]:
    """The products that a map goes into beside those `known`, with its values.

    Those behind what is not followed, in which it meets other values; and those with weights.
    """
    others = [meeting for meeting in meetings if meeting.node not in known and meeting.node.op_type not in _ASKED]
    of_values = [_values_behind(meeting, view, as_large=True) for meeting in others]
    rest = [meeting for meeting, node in zip(others, of_values, strict=True) if node is None]
    of_weights = [_weights_behind(meeting, view) for meeting in rest]
    first, second = (
        dict.fromkeys(node for node in found if node is not None and node not in known)
        for found in (of_values, of_weights)
    )
    return list(first), list(second)


def _weights_behind(meeting: chains.Meeting, view: View) -> ir.Node | None:
    """The first product of the map with weights, or of what a node makes of it, where that is no smaller."""
    size = prod(view.sizes(meeting.value) or (0,))
    for node, read in ((meeting.node, meeting.value), *_ahead(meeting.node)):
        if node.op_type in _PRODUCTS and prod(view.sizes(read) or (size,)) >= size:
            return None if _computed_twice(node, view) else node
    return None


def _kind(node: ir.Node) -> str:
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def _computed_twice(node: ir.Node, view: View) -> bool:
    """Whether a node multiplies two tensors that both depend on the input."""
    operands = [value for value in node.inputs[:2] if value is not None]
    return (
        node.op_type in chains.PRODUCTS
        and len(operands) == 2
        and weight_of(node, view) is None
        and not any(view.is_static(value) for value in operands)
    )


def _mixes(node: ir.Node, view: View) -> bool:
    """Whether the weights of a product take as many features as they give, as those that mix heads do."""
    shape = view.sizes(node.inputs[1])
    if shape is None or len(shape) < 2:
        return False
    return shape[0] == shape[1] if "Conv" in node.op_type else shape[-1] == shape[-2]


def _sum_of_two(value: ir.Value, view: View) -> ir.Node | None:
    """The sum of two tensors, either given to entries of the other, behind a nonlinearity at most."""
    for _ in range(_FARTHEST):
        node = value.producer()
        if node is None or not node.inputs or node.inputs[0] is None:
            return None
        computed = [operand for operand in node.inputs if operand is not None and not view.is_static(operand)]
        if node.op_type == "Add" and len(computed) == 2:
            return node if len({view.sizes(operand) for operand in computed}) == 2 else None
        if node.op_type not in _NONLINEAR and not (node.op_type == "Add" and len(computed) == 1):
            return None
        value = computed[0] if computed else node.inputs[0]
    return None


def _of_pairs(node: ir.Node, view: View) -> bool:
    """Whether a node meets all entries of one computed tensor with all of another along some axis of each."""
    if node.op_type not in _PAIRED or len(node.inputs) != 2:
        return False
    sizes = [prod(view.sizes(value) or (0,)) for value in (*node.inputs, node.outputs[0])]
    return max(sizes[:2]) < sizes[2] and not any(same_for_all(value, view) for value in node.inputs)


def _is_features(softmax: Normalized, view: View) -> bool:
    """Whether a softmax is known to run over the features of a linear layer."""
    rank = view.rank(softmax.scores)
    found = None if rank is None else factors(softmax.scores, softmax.axis % rank, view)
    return found is not None and {factor.source for factor in found} == {Source.HEADS}


def _wider(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that a value is computed by, the nearest first, products as the last of each way."""
    pending, seen = [value], {value}
    count = 0
    while pending and count < _FARTHEST:
        node = pending.pop(0).producer()
        if node is None or node.op_type in _ASKED:
            continue
        count += 1
        yield node
        if node.op_type in _PRODUCTS:
            continue
        fresh = [source for source in node.inputs if source is not None and source not in seen]
        seen.update(fresh)
        pending += fresh


def _ahead(node: ir.Node) -> Iterator[tuple[ir.Node, ir.Value]]:
    """The nodes that read what a node gives, by way of any others, and what they read of it; the nearest first."""
    pending, seen = [node], {node}
    while pending and len(seen) < _FARTHEST:
        for output in pending.pop(0).outputs:
            for user in output.consumers():
                if user in seen or user.op_type in _ASKED:
                    continue
                seen.add(user)
                yield user, output
                pending.append(user)


def _values_behind(meeting: chains.Meeting, view: View, *, as_large: bool = False) -> ir.Node | None:
    """A product of what a node makes of the map with something else that depends on the input.

    As large as the map, if that is asked for: not what is pooled of it.
    """
    size = prod(view.sizes(meeting.value) or (0,))
    for node, read in _ahead(meeting.node):
        fits = not as_large or prod(view.sizes(read) or (size,)) == size
        if fits and _computed_twice(node, view) and not _from(meeting.node, node, read):
            return node
    return None


def _from(start: ir.Node, product: ir.Node, read: ir.Value) -> bool:
    """Whether the other operand of a product comes from the map as well, as queries of the next layer do."""
    others = [value for value in product.inputs[:2] if value is not None and value is not read]
    return any(start in _through(other) for other in others)


def _through(value: ir.Value) -> set[ir.Node]:
    """What a value is computed by, over products."""
    pending, seen = [value], set[ir.Node]()
    while pending and len(seen) < 4 * _FARTHEST:
        node = pending.pop(0).producer()
        if node is not None and node not in seen:
            seen.add(node)
            pending += [source for source in node.inputs if source is not None]
    return seen
