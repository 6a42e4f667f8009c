"""Bake again what a patched file holds: a file that differs from that is not what `bake` wrote."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.metadata import PatchRecord, edited_file, read_record
from atpatch_onnx.baking.read_back import patch_in
from atpatch_onnx.baking.unbake import unbake
from atpatch_onnx.graph.names import ENTRY, FLAGGED, PREFIX, SCORE
from atpatch_onnx.patches.patch import Patch


def baked_again(
    base: ir.Model, patched: ir.Model, record: PatchRecord, patch: Patch | Sequence[Patch] | None = None
) -> ir.Model:
    """The base with the same patch baked into it in the same way.

    Args:
        base: The model before.
        patched: The patched model.
        record: What the file says of itself.
        patch: The patch, or several in their order; None: as it stands in the file.

    Raises:
        AtPatchError: The base has no such sites, the file lacks weights of theirs, or they cannot be baked.
    """
    if patch is None:
        first = graphs.beginning(patched)
        patch = replace(patch_in(graphs.beginning(base), first, read_record(first)), base=record.base)
    return bake(
        base,
        patch,
        conditional=record.conditional,
        monitor=FLAGGED in record.monitors,
        site_flags=bool(set(record.monitors) - {FLAGGED, SCORE}),
    )


def require_as_baked(patched: ir.Model) -> ir.Model:
    """The base of a patched model that is what baking writes, and nothing else.

    Raises:
        AtPatchError: It is not: see `unbake` and `differences`.
    """
    base, record = unbake(patched), read_record(patched)
    again = baked_again(base, patched, record)
    found = [*additions(patched, again, ours=True), *parameters(patched, again)]
    if found:
        raise edited_file("the patched model", "what baking its patch into its base writes", found[0])
    return base


def additions(patched: ir.Model, again: ir.Model, *, ours: bool) -> Iterator[str]:
    """What is not as baking writes it, the weights apart: nodes, their order, outputs, metadata. One line each.

    Args:
        patched: The patched model.
        again: Its base with the patch baked again.
        ours: Whether the patch was read back from the file, whose name for it cannot be known then.
    """
    found, wanted = _bare(patched), _bare(again)
    for name in ("input", "output", "value_info", "sparse_initializer"):
        yield from _unlike(getattr(found.graph, name), getattr(wanted.graph, name), f"the {name.replace('_', ' ')}")
    yield from _unlike(found.graph.node, wanted.graph.node, "the node")
    entries, expected = dict(patched.metadata_props), dict(again.metadata_props)
    if ours:
        expected[f"{ENTRY}patch"] = entries.get(f"{ENTRY}patch", "")
    for key in sorted(entries.keys() | expected.keys()):
        if entries.get(key) != expected.get(key):
            yield f"the metadata entry {key} is not what baking writes"
    for proto in (found, wanted):
        del proto.metadata_props[:]
    if found.SerializeToString(deterministic=True) != wanted.SerializeToString(deterministic=True):
        yield "the graph differs from what baking writes"


def _bare(model: ir.Model) -> onnx.ModelProto:
    """The model as a proto, without weights of the main graph: unbaking proves the base's."""
    graph = model.graph
    weights = [value for value in graph.initializers.values() if not value.is_graph_input()]
    view = ir.GraphView(
        [*graph.inputs, *(ir.Value(name=value.name, type=value.type, shape=value.shape) for value in weights)],
        graph.outputs,
        nodes=graph,
        opset_imports=dict(graph.opset_imports),
        name=graph.name,
        doc_string=graph.doc_string,
        metadata_props=dict(graph.metadata_props),
    )
    functions = list(model.functions.values())
    return ir.to_proto(ir.Model(view, ir_version=model.ir_version, functions=functions))  # type: ignore[arg-type]


def _unlike(found: Sequence[onnx.NodeProto], wanted: Sequence[onnx.NodeProto], what: str) -> Iterator[str]:
    """The first entry that is not as it should be."""
    for one, other in zip(found, wanted, strict=False):
        if one.SerializeToString(deterministic=True) != other.SerializeToString(deterministic=True):
            yield (
                f"{what} {one.name!r} stands where baking writes {other.name!r}"
                if one.name != other.name
                else (f"{what} {one.name!r} is not as baking writes it")
            )
            return
    if len(found) > len(wanted):
        yield f"{what} {found[len(wanted)].name!r} is one that baking does not write"
    elif len(found) < len(wanted):
        yield f"{what} {wanted[len(found)].name!r} is missing"


def parameters(patched: ir.Model, again: ir.Model) -> Iterator[str]:
    """The weights under `atpatch/` that are not those which baking writes, a line each."""
    found, wanted = _own_weights(patched), _own_weights(again)
    for name in sorted(found.keys() | wanted.keys()):
        one, other = found.get(name), wanted.get(name)
        if one is None or other is None:
            yield f"{name} is {'missing' if one is None else 'one that baking does not write'}"
        elif (one.dtype, one.shape) != (other.dtype, other.shape):
            yield f"{name} is {one.dtype}{list(one.shape)}, where baking writes {other.dtype}{list(other.shape)}"
        elif one.tobytes() != other.tobytes():
            yield f"{name} does not hold the numbers that baking writes"


def _own_weights(model: ir.Model) -> Mapping[str, np.ndarray]:
    weights = model.graph.initializers.items()
    return {
        name: np.asarray(value.const_value.numpy())
        for name, value in weights
        if name.startswith(PREFIX) and value.const_value is not None
    }
