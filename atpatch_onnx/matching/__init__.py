"""Find the attention sites of a graph, and say of everything else that looked like one why it is none.

One form of attention a file; `RULES` is the table of contents.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.matching import attention_op, fused, softmax
from atpatch_onnx.matching.axes import token_axes, tokens_of
from atpatch_onnx.matching.batches import batching, look
from atpatch_onnx.matching.naming import site_names
from atpatch_onnx.matching.pieces import steps_back
from atpatch_onnx.matching.places import first_place, key_place, value_place, without_cache
from atpatch_onnx.matching.provenance import Source, factors
from atpatch_onnx.matching.quantized import has_other_scales
from atpatch_onnx.matching.rules import Candidate, Rule, label, miss
from atpatch_onnx.matching.shapes import told
from atpatch_onnx.matching.sites import AttentionSite, Dim, Matches, NearMiss, Place
from atpatch_onnx.matching.unmapped import unknown_operators, unmapped
from atpatch_onnx.matching.view import View

WIDEST = 2**20
"""Features of a token that a site may have: what is fitted and drawn for it is of this size."""

__all__ = ["RULES", "batching", "explain", "find_sites", "known_shapes", "sample_outputs"]

RULES: tuple[Rule, ...] = (softmax.RULE, attention_op.RULE, fused.RULE)
"""In order: the first rule that is anchored at a node's operator answers for it."""


def find_sites(model: ir.Model) -> tuple[AttentionSite, ...]:
    """The attention sites of a model in the graph's node order; `explain` also says what was refused and why."""
    return explain(model).sites


def known_shapes(model: ir.Model) -> Mapping[str, tuple[Dim, ...]]:
    """The shapes of a model's values by name, as far as they can be told."""
    return look(graphs.beginning(model)).inferred.shapes


def sample_outputs(model: ir.Model) -> frozenset[str]:
    """The outputs with the samples, and nothing else, on their first axis, as far as that can be told.

    Traced back to an input, or of a size that no other axis has: that of the samples, which is a separate number
    where the model leaves it free.
    """
    seen = look(model)
    return frozenset(str(output.name) for output in seen.model.graph.outputs if _begins_with_samples(output, seen))


def _begins_with_samples(output: ir.Value, seen: View) -> bool:
    sizes = seen.sizes(output)
    if not sizes:
        return False
    if [factor.source for factor in factors(output, 0, seen) or ()] == [Source.SAMPLES]:
        return True
    return sizes[0] == seen.samples and seen.samples not in sizes[1:]


def explain(model: ir.Model) -> Matches:
    """The attention sites of a model, and a near miss with its reason for everything that looked like one.

    Of a file of two graphs, a decoder's for prompts and for steps, those of the first; the second has them as well.
    The model is left as it is.
    """
    model = graphs.beginning(model)
    seen = look(model)
    order = {str(value.name): index for index, node in enumerate(seen.model.graph) for value in node.outputs}
    found: list[tuple[Candidate, tuple[Place, Place]]] = []
    misses: list[NearMiss] = []
    for answer in _answers(seen.model, seen):
        places = answer if isinstance(answer, NearMiss) else _places(answer, order, seen)
        if isinstance(places, NearMiss):
            misses.append(places)
        elif isinstance(answer, Candidate):
            found.append((answer, places))
    found.sort(key=lambda one: order.get(one[1][0].value, -1))  # flags are carried in the order of the keys
    candidates = [candidate for candidate, _ in found]
    names = site_names((candidate.anchor, *candidate.nodes) for candidate in candidates)
    axes = token_axes(candidates, [key for _, (key, _) in found], seen)
    sites = tuple(
        AttentionSite(
            name=name,
            index=index,
            form=candidate.form,
            key=key,
            value=value,
            map=_name_in_graph(candidate.map, seen),
            map_layout=candidate.map_layout,
            output=seen.in_graph(candidate.output),
            parts=told(candidate.parts),
            heads=told(candidate.heads),
            queries=told(candidate.queries),
            keys=told(axis.tokens),
            dtype=key.dtype,
            masked=candidate.masked,
            self_attention=axis.self_attention,
            token_axis=axis.name,
            samples=_samples(seen),
            nodes=tuple(dict.fromkeys(label(node) for node in candidate.nodes)),
        )
        for index, ((candidate, (key, value)), name, axis) in enumerate(zip(found, names, axes, strict=True))
    )
    known = {name for nodes in (*(s.nodes for s in sites), *(m.nodes for m in misses)) for name in nodes}
    nodes = list(seen.model.graph)
    strange = [*unknown_operators(nodes, known, model.functions)]
    known |= {name for one in strange for name in one.nodes}
    return Matches(sites, (*misses, *strange, *unmapped(nodes, known)))


def _name_in_graph(map_: ir.Value | None, seen: View) -> str | None:
    """The name of a map; None where a node keeps it to itself."""
    return None if map_ is None or map_.name in seen.stands_for else map_.name


def _samples(seen: View) -> tuple[str, int] | None:
    """An input with samples, and their axis: one of several axes where there is one."""
    found = [(name, axis) for name, axis in seen.batch.items() if axis is not None]
    known = [one for one in found if len(seen.inferred.shapes.get(one[0], ())) > 1]
    return next(iter(known or found), None)


def _places(candidate: Candidate, order: Mapping[str, int], seen: View) -> tuple[Place, Place] | NearMiss:
    """Where keys and values of a candidate are replaced, or why they cannot be."""
    key = key_place(candidate.keys, candidate.key_reader, candidate.anchor, seen)
    product = candidate.output.producer()
    assert product is not None, "attention is computed by a node"
    value = None
    if key is not None:
        cut = without_cache(key, candidate.keys, seen)
        value = value_place(candidate.values, product, key, order, seen, cut=cut)
    if key is None or value is None:
        return miss(candidate.nodes, _without_place(candidate, key, seen), attention=True)
    if (key.folded or value.folded) and not _countable(candidate, key, seen):
        reason = (
            "attention, but its maps and tokens do not have an axis each, and neither how many maps a sample has is "
            "fixed nor how many tokens a map has"
        )
        return miss(candidate.nodes, reason, attention=True)
    if max(key.features, value.features) > WIDEST:
        reason = (
            f"attention, but with {max(key.features, value.features)} features for each token: more than any model has"
        )
        return miss(candidate.nodes, reason, attention=True)
    dtype = seen.dtype(candidate.output) or seen.dtype(candidate.query) or ir.DataType.UNDEFINED
    key, value = (_typed(place, dtype, seen) for place in (key, value))
    for kind in (ir.DataType[place.dtype] for place in (key, value) if place.quantization is None):
        if kind is not ir.DataType.UNDEFINED and not kind.is_floating_point():
            return miss(candidate.nodes, f"attention, but on {kind.name}, which are no floats", attention=True)
    if candidate.bias is not None:
        name, starts = str(candidate.bias.value.name), (candidate.bias.keys, candidate.bias.values)
        key, value = (
            replace(place, bias=name, bias_start=start) for place, start in zip((key, value), starts, strict=True)
        )
    return key, value


def _without_place(candidate: Candidate, key: Place | None, seen: View) -> str:
    """Why there is no place for keys, or, where `key` is one, for values."""
    which, pieces = ("keys", candidate.keys) if key is None else ("values", candidate.values)
    other = first_place(pieces, seen)
    if other is None and any(has_other_scales(at.value, seen) for at, _ in steps_back(pieces, seen)):
        return f"attention, but its {which} are whole numbers with several scales, or one that is no weight of float32"
    if other is None:
        where = "of the graph"
    elif key is None:
        where = f"that is read for it alone: {other} is read for more"
    elif first_place(pieces, seen, cut=without_cache(key, candidate.keys, seen)) is None:
        where = f"with the tokens that {key.value} has of its keys, as where a cache joins one of both earlier"
    else:
        where = f"that is read for it alone and behind its keys: {other} is read for more, or before"
    return f"attention, but its {which} do not stand token by token in any tensor {where}"


def _countable(candidate: Candidate, key: Place, seen: View) -> bool:
    """Whether tokens can be told from maps that do not have a separate axis: by how many there are of either."""
    if candidate.parts == 0:  # samples share a map: there is no other
        return all(piece.size == 1 for piece in candidate.keys.pieces if piece.letter == "n")
    return isinstance(candidate.parts, int) or isinstance(tokens_of(candidate, key, seen), int)


def _typed(place: Place, dtype: ir.DataType, seen: View) -> Place:
    """With the element type of the tensor, `dtype` where it is not declared, and its shape.

    Names of sizes are those that a runtime finds as well: it takes two of one name for equal.
    """
    found = seen.values[place.value]
    shape = seen.shape(found) or ()
    known = seen.inferred.declared.get(place.value, ())
    if len(known) != len(shape):
        known = (None,) * len(shape)
    named = tuple(size if isinstance(size, int) else own for size, own in zip(shape, known, strict=True))
    return replace(place, dtype=(seen.dtype(found) or dtype).name, shape=named)


def _answers(model: ir.Model, seen: View) -> Iterator[Candidate | NearMiss]:
    for node in model.graph:
        yield from _answer(node, seen)
    nested = (node for subgraph in model.graph.subgraphs() for node in subgraph if subgraph is not model.graph)
    within = (node for function in model.functions.values() for node in function.all_nodes())
    for place, nodes in (("a branch or loop body", nested), ("a model-local function", within)):
        for node in nodes:
            for answer in _answer(node, seen):
                yield _nested(answer, place)


def _answer(node: ir.Node, seen: View) -> tuple[Candidate | NearMiss, ...]:
    for rule in RULES:
        if (node.domain, node.op_type) in rule.anchors:
            return rule.answer(node, seen)
    return ()


def _nested(answer: Candidate | NearMiss, place: str) -> NearMiss:
    if isinstance(answer, NearMiss) and not answer.attention:
        return answer
    nodes = answer.nodes if isinstance(answer, NearMiss) else tuple(label(node) for node in answer.nodes)
    return NearMiss(nodes, f"attention, but inside {place}; only the main graph is patched", attention=True)
