"""Find the attention sites of a graph, and say of everything else that looked like one why it is none.

One form of attention a file; `RULES` is the table of contents.
"""

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from atpatch_onnx.matching import attention_op, fused, softmax
from atpatch_onnx.matching.axes import token_axes
from atpatch_onnx.matching.naming import site_names
from atpatch_onnx.matching.provenance import Source, factors
from atpatch_onnx.matching.rules import Candidate, Rule, label
from atpatch_onnx.matching.sites import AttentionSite, Dim, Matches, NearMiss
from atpatch_onnx.matching.unmapped import unmapped
from atpatch_onnx.matching.view import View, view

__all__ = ["RULES", "explain", "find_sites", "known_shapes", "sample_outputs"]

RULES: tuple[Rule, ...] = (softmax.RULE, attention_op.RULE, fused.RULE)
"""In order: the first rule that is anchored at a node's operator answers for it."""


def find_sites(model: ir.Model) -> tuple[AttentionSite, ...]:
    """The attention sites of a model in the graph's node order; `explain` also says what was refused and why."""
    return explain(model).sites


def known_shapes(model: ir.Model) -> Mapping[str, tuple[Dim, ...]]:
    """The shapes of a model's values by name, as far as they can be told."""
    return view(model).inferred.shapes


def sample_outputs(model: ir.Model) -> frozenset[str]:
    """The outputs with the samples, and nothing else, on their first axis, as far as that can be told.

    Traced back to an input, or of a size that no other axis has: that of the samples, which is a number of its own
    where the model leaves it free.
    """
    seen = view(model)
    return frozenset(str(output.name) for output in model.graph.outputs if _begins_with_samples(output, seen))


def _begins_with_samples(output: ir.Value, seen: View) -> bool:
    sizes = seen.sizes(output)
    if not sizes:
        return False
    if [factor.source for factor in factors(output, 0, seen) or ()] == [Source.SAMPLES]:
        return True
    return sizes[0] == seen.samples and seen.samples not in sizes[1:]


def explain(model: ir.Model) -> Matches:
    """The attention sites of a model, and a near miss with its reason for everything that looked like one.

    The model is left as it is.
    """
    seen = view(model)
    answers = list(_answers(model, seen))
    candidates = [answer for answer in answers if isinstance(answer, Candidate)]
    names = site_names((candidate.anchor, *candidate.nodes) for candidate in candidates)
    axes = token_axes(candidates, seen)
    sites = tuple(
        AttentionSite(
            name=name,
            index=index,
            form=candidate.form,
            map=None if candidate.map is None else candidate.map.name,
            value=str(candidate.value.name),
            output=str(candidate.output.name),
            map_layout=candidate.map_layout,
            value_layout=candidate.value_layout,
            output_layout=candidate.output_layout,
            parts=candidate.parts,
            heads=candidate.heads,
            kv_heads=candidate.kv_heads,
            queries=candidate.queries,
            keys=candidate.keys,
            depth=candidate.depth,
            dtype=str((seen.dtype(candidate.output) or seen.dtype(candidate.query) or ir.DataType.UNDEFINED).name),
            masked=candidate.masked,
            self_attention=axis.self_attention,
            token_axis=axis.name,
            nodes=tuple(dict.fromkeys(label(node) for node in candidate.nodes)),
        )
        for index, (candidate, name, axis) in enumerate(zip(candidates, names, axes, strict=True))
    )
    misses = [answer for answer in answers if isinstance(answer, NearMiss)]
    known = {name for nodes in (*(s.nodes for s in sites), *(m.nodes for m in misses)) for name in nodes}
    return Matches(sites, (*misses, *unmapped(list(model.graph), known)))


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
