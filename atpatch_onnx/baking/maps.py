"""The attention maps of some sites as outputs, to look at: of the base, or of the patched model."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.baking.expose import expose
from atpatch_onnx.graph.values import find_value
from atpatch_onnx.matching.layout import canonical
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.running.sessions import Array

_MODE = "qk_matmul_output_mode"
"""Attribute of an op `Attention`: which stage of its map it returns; 3 is the map itself."""


def map_outputs(sites: Sequence[AttentionSite]) -> dict[str, str]:
    """The outputs with the maps, by site; of those that show theirs."""
    return {site.name: site.map or f"{site.output}/map" for site in sites if site.shows_map}


def with_maps(model: ir.Model, sites: Sequence[AttentionSite], names: Sequence[str]) -> ir.Model:
    """A copy of a base or patched model with the values of these names and the maps of these sites as outputs."""
    shown, outputs = expose(model, names), map_outputs(sites)
    present = {output.name for output in shown.graph.outputs}
    for site in (site for site in sites if outputs.get(site.name) not in (None, *present)):
        shown.graph.outputs.append(ask_for_map(shown, site))
    return shown


def ask_for_map(model: ir.Model, site: AttentionSite) -> ir.Value:
    """The map of a site in a graph; an op `Attention` is made to hand it out, in place.

    Where it returns another stage already, a second one beside it does.
    """
    if site.map is not None:
        return find_value(model.graph, site.map)
    node = find_value(model.graph, site.output).producer()
    assert node is not None, "attention is computed by a node"
    name, dtype = map_outputs([site])[site.name], node.outputs[0].type
    before = len(node.outputs)
    if before > 3 and node.outputs[3].name:
        beside = ir.Node(node.domain, node.op_type, node.inputs, node.attributes.values(), num_outputs=4, name=name)
        for output in beside.outputs:
            output.name = ""
        beside.outputs[0].name = f"{name}/output"
        model.graph.insert_after(node, beside)
        node = beside
    elif before < 4:
        node.resize_outputs(4)
        for output in node.outputs[before:]:
            output.name = ""
    node.attributes[_MODE] = ir.AttrInt64(_MODE, 3)
    node.outputs[3].name, node.outputs[3].type = name, dtype
    return node.outputs[3]


def mean_maps(array: Array, site: AttentionSite, samples: int) -> NDArray[np.float32]:
    """The map of each sample, mean over the heads, `[samples, queries, tokens]`."""
    return sample_maps(canonical_map(array, site).mean(axis=1), samples).astype(np.float32)


def canonical_map(array: Array, site: AttentionSite) -> NDArray[np.float64]:
    """A map as `with_maps` hands it out, as `[maps, heads, queries, tokens]`."""
    sizes = {letter: size for letter, size in (("h", site.heads), ("w", site.parts)) if isinstance(size, int) and size}
    return np.asarray(canonical(array, site.map_layout, sizes), np.float64)


def sample_maps(maps: NDArray[np.float64], samples: int) -> NDArray[np.float64]:
    """The map of each sample, `[samples, queries, columns]`, from maps `[maps, queries, keys]`.

    Where a sample has several (windows), they stand along the diagonal: a window sees its own keys only. Where samples
    share a map, each gets its own queries and keys of it.
    """
    count, queries, keys = maps.shape
    if count == samples:
        return maps
    if count > samples:
        parts = count // samples
        joined = np.zeros((samples, parts, queries, parts, keys), maps.dtype)
        for part in range(parts):
            joined[:, part, :, part] = maps.reshape(samples, parts, queries, keys)[:, part]
        return joined.reshape(samples, parts * queries, parts * keys)
    shared = samples // count
    own = maps.reshape(count, shared, queries // shared, shared, keys // shared)
    return np.stack([own[:, part, :, part] for part in range(shared)], axis=1).reshape(
        samples, queries // shared, keys // shared
    )
