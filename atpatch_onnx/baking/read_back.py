"""What a patched file holds, read back: its sites, its weights, and the patch whose baking gives them again."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.baking.edits import ARRAYS
from atpatch_onnx.baking.metadata import PatchedLayer, PatchedSite, PatchRecord, edited_file
from atpatch_onnx.baking.read import own_bias
from atpatch_onnx.baking.replace import is_packed
from atpatch_onnx.graph.names import PREFIX, own_name
from atpatch_onnx.matching import find_sites
from atpatch_onnx.matching.hidden import find_hidden_layers
from atpatch_onnx.matching.sites import AttentionSite, Place
from atpatch_onnx.patches.patch import Detector, LayerEdit, Neutral, Patch, Places, SitePatch

Array = NDArray[Any]


def patch_in(base: ir.Model, patched: ir.Model, record: PatchRecord) -> Patch:
    """The patch of a patched file, such that baking it gives the file's weights again, bit for bit.

    It is not always the patch that was baked: half precision rounds neutral tokens, and what an operator adds to keys
    by itself was taken off. Arrays are float64 where the latter has to come out exactly.

    Raises:
        UnbakeError: The base has no such sites or layers, or the file lacks weights of theirs or has others.
    """
    sites = tuple(
        SitePatch(
            entry.site,
            None if entry.own is None else _detector(base, patched, entry, site),
            _neutral(base, patched, site) if entry.redistributes else None,
        )
        for entry, site in sites_of(base, record.sites)
    )
    return Patch(record.base, sites, record.figures, tuple(baked_edits(base, patched, record)))


def sites_of(base: ir.Model, chosen: Sequence[PatchedSite]) -> list[tuple[PatchedSite, AttentionSite]]:
    """The patched sites of a file beside those of the base.

    Raises:
        UnbakeError: The base has no site of a name, or the file names other values of it.
    """
    found = {site.name: site for site in find_sites(base)} if chosen else {}
    for patched in chosen:
        site = found.get(patched.site)
        if site is None or (site.key.value, site.value.value) != (patched.key, patched.value):
            raise edited_file(
                "the metadata entry atpatch.sites",
                f"sites of the base ({', '.join(found) or 'none'}), with their own keys and values",
                f"{patched.site}, of {patched.key} and {patched.value}",
            )
    return [(patched, found[patched.site]) for patched in chosen]


def _detector(base: ir.Model, patched: ir.Model, entry: PatchedSite, site: AttentionSite) -> Detector | Places:
    found = baked_detector(patched, entry.site)
    if isinstance(found, Places):
        return found
    if len(found.weights) != np.prod(site.key.sizes):
        raise edited_file(
            f"site {entry.site}",
            f"a detector of {np.prod(site.key.sizes)} rows, as its keys have features",
            f"one of {len(found.weights)}",
        )
    weights, bias, own = found.weights[site.key.columns.reshape(-1)], found.bias, own_bias(base.graph, site.key)
    if bias is not None and own is not None:
        bias = bias.astype(np.float64) - np.asarray(own.reshape(-1) @ weights, np.float32)
    threshold = float("nan") if entry.threshold is None else entry.threshold
    return Detector(weights, bias, None if found.output is None else found.output[:, 0], threshold)


def _neutral(base: ir.Model, patched: ir.Model, site: AttentionSite) -> Neutral:
    def of(place: Place, name: str) -> Array:
        stored, own = baked_weight(patched, site.name, f"neutral_{name}"), own_bias(base.graph, place)
        if stored.shape != place.sizes:
            raise edited_file(
                own_name(site.name, f"neutral_{name}"),
                f"an array of shape {list(place.sizes)}",
                f"one of shape {list(stored.shape)}",
            )
        features = stored.reshape(-1)[place.columns].astype(np.float64)
        return features if own is None else features + own

    names = ("key_value", "key_value") if is_packed(site) else ("key", "value")
    return Neutral(of(site.key, names[0]), of(site.value, names[1]))


@dataclass(frozen=True, eq=False)
class BakedDetector:
    """The detector of a site as its file has it: rows of `weights` stand where the features do in the tensor."""

    weights: Array
    bias: Array | None
    output: Array | None
    threshold: Array


def baked_detector(model: ir.Model, site: str) -> BakedDetector | Places:
    """The detector that baking wrote for a site.

    Raises:
        UnbakeError: It is not there, or not one of these shapes.
    """
    if own_name(site, "places") in model.graph.initializers:
        return _places(model, site)
    weights, threshold = (baked_weight(model, site, name) for name in ("detector", "threshold"))
    hidden = own_name(site, "detector_bias") in model.graph.initializers
    bias, output = (baked_weight(model, site, f"detector_{name}") if hidden else None for name in ("bias", "output"))
    units = None if weights.ndim != 2 else weights.shape[1]
    fits = threshold.shape == (1,) and (units == 1 if bias is None else bias.shape == (units,))
    if not fits or (output is not None and output.shape != (units, 1)):
        raise edited_file(
            f"site {site}", "a detector of one product or one hidden layer", f"weights of shape {weights.shape}"
        )
    return BakedDetector(weights, bias, output, threshold)


def _places(model: ir.Model, site: str) -> Places:
    marks, threshold = (baked_weight(model, site, name) for name in ("places", "threshold"))
    if marks.shape != (1, marks.size, 1) or threshold.shape != (1,) or not np.isin(marks, (0, 1)).all():
        raise edited_file(
            f"site {site}",
            "a one or a zero for each token, and a threshold",
            f"arrays of shape {list(marks.shape)} and {list(threshold.shape)}",
        )
    return Places(np.asarray(marks, np.float32).reshape(-1), float(threshold[0]))


def always_on(model: ir.Model, record: PatchRecord) -> bool:
    """Whether a patched model names tokens by where they stand, in every input."""
    return any(own_name(entry.site, "places") in model.graph.initializers for entry in record.sites)


def baked_edits(base: ir.Model, patched: ir.Model, record: PatchRecord) -> list[LayerEdit]:
    """The edits of a patched model, of all layers that it names.

    Raises:
        UnbakeError: The base has no such layer, or the file not what an edit of it is made of.
    """
    layers = {layer.name: layer for layer in find_hidden_layers(base)} if record.layers else {}
    edits = []
    for layer in record.layers:
        own = layers.get(layer.layer)
        if own is None or own.value != layer.value:
            raise edited_file(
                "the metadata entry atpatch.layers",
                f"hidden layers of the base ({', '.join(layers) or 'none'})",
                f"{layer.layer}, of the value {layer.value}",
            )
        edits.append(_edit(patched, layer, own.units))
    return edits


def _edit(model: ir.Model, layer: PatchedLayer, units: int) -> LayerEdit:
    arrays = [baked_weight(model, layer.scope, name) for name in ARRAYS]
    edited, factor, constant = arrays
    wanted = [(np.dtype(np.bool_), (units,)), *[(np.dtype(np.float32), (units,))] * 2]
    if [(array.dtype, array.shape) for array in arrays] != wanted or not edited.any():
        raise edited_file(
            f"hidden layer {layer.layer}",
            f"{', '.join(ARRAYS)} for each of its {units} units, some of them edited",
            ", ".join(f"{array.dtype}{list(array.shape)}" for array in arrays),
        )
    chosen = np.flatnonzero(edited)
    return LayerEdit(layer.layer, chosen, factor[chosen], constant[chosen])


def baked_weight(model: ir.Model, scope: str, name: str) -> Array:
    """A weight that baking wrote for a site or a hidden layer.

    Raises:
        UnbakeError: It is not there.
    """
    value = model.graph.initializers.get(own_name(scope, name))
    if value is None or value.const_value is None:
        raise edited_file(scope, f"the weight {PREFIX}{scope}/{name}", "none")
    return value.const_value.numpy()
