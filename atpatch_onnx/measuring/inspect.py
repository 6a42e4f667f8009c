"""Look into a patched model: its inner values as outputs, for `verify`, `evaluate` and `report`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.baking.edits import ARRAYS
from atpatch_onnx.baking.metadata import PatchedLayer, PatchedSite, PatchRecord
from atpatch_onnx.errors import UnbakeError
from atpatch_onnx.graph.names import PREFIX, own_name
from atpatch_onnx.matching import find_sites
from atpatch_onnx.matching.hidden import find_hidden_layers
from atpatch_onnx.matching.sites import AttentionSite, Place
from atpatch_onnx.patches.patch import LayerEdit
from atpatch_onnx.running.sessions import Array


def last_margin(sites: Sequence[PatchedSite]) -> str:
    """The value that holds the largest margins of one token axis: they are carried along, so the last site has them.

    Raises:
        UnbakeError: The file names no patched site.
    """
    if not sites:
        raise UnbakeError(
            "the metadata entry atpatch.sites",
            expected="at least one patched site",
            found="none",
            advice="The file was edited after it was baked: bake the patch into the base again.",
        )
    return sites[-1].margin


def axis_sites(base: ir.Model, record: PatchRecord) -> tuple[AttentionSite, ...]:
    """The base's sites on the token axes that the patch works on; all of them where the patch names none of them."""
    sites, patched = find_sites(base), {site.site for site in record.sites}
    axes = {site.token_axis for site in sites if site.name in patched}
    return tuple(site for site in sites if site.token_axis in axes) or sites


@dataclass(frozen=True, eq=False)
class BakedDetector:
    """The detector of a site as its file has it: rows of `weights` stand where the features do in the tensor."""

    weights: Array
    bias: Array | None
    output: Array | None
    threshold: Array

    def margins(self, keys: Array, place: Place, maps: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """How far each score is above the threshold, `[maps, tokens]`, and by how much float32 may round it.

        Args:
            keys: The tensor of the place.
            place: Of the site's keys.
            maps: How many there are, which tells them from tokens where they do not have an axis each.
        """
        tokens = [axis for axis, letters in enumerate(place.axes) if letters]
        features = [axis for axis, letters in enumerate(place.axes) if not letters]
        X = np.asarray(keys, np.float64).transpose(tokens + features)
        X = X.reshape(*X.shape[: len(tokens)], -1)
        W = self.weights.astype(np.float64)
        found, size = X @ W, np.abs(X) @ np.abs(W)
        if self.output is not None and self.bias is not None:
            w = self.output.astype(np.float64)
            found, size = np.maximum(found + self.bias, 0) @ w, (size + np.abs(self.bias)) @ np.abs(w)
        found, size = found[..., 0] - self.threshold, size[..., 0] + np.abs(self.threshold)
        if not place.apart and maps and found.size % maps == 0:  # else the file was edited, or there is no sample
            sizes = (maps, -1) if place.order == "nk" else (-1, maps)
            found, size = found.reshape(sizes), size.reshape(sizes)
        if place.order == "kn":
            found, size = found.T, size.T
        return found, _ROUNDING[place.dtype] * size


_ROUNDING = {"FLOAT": 1e-5, "FLOAT16": 2**-10, "BFLOAT16": 2**-7}
"""By the type of the keys, of a float32 sum, relative to the sum of its terms' sizes: many times what is seen. In half
precision a runtime may read keys before it has rounded them."""


def baked_detector(model: ir.Model, site: str) -> BakedDetector:
    """The detector that baking wrote for a site.

    Raises:
        UnbakeError: It is not there, or not one of these shapes.
    """
    weights, threshold = (baked_weight(model, site, name) for name in ("detector", "threshold"))
    hidden = own_name(site, "detector_bias") in model.graph.initializers
    bias, output = (baked_weight(model, site, f"detector_{name}") if hidden else None for name in ("bias", "output"))
    units = None if weights.ndim != 2 else weights.shape[1]
    fits = threshold.shape == (1,) and (units == 1 if bias is None else bias.shape == (units,))
    if not fits or (output is not None and output.shape != (units, 1)):
        raise UnbakeError(
            f"site {site}",
            expected="a detector of one product or one hidden layer",
            found=f"weights of shape {weights.shape}",
            advice="The file was edited after it was baked: bake the patch into the base again.",
        )
    return BakedDetector(weights, bias, output, threshold)


def baked_edit(model: ir.Model, layer: PatchedLayer, units: int) -> LayerEdit:
    """The edit that baking wrote for a hidden layer of so many units.

    Raises:
        UnbakeError: It is not there, or not one entry a unit.
    """
    arrays = [baked_weight(model, layer.scope, name) for name in ARRAYS]
    edited, factor, constant = arrays
    wanted = [(np.dtype(np.bool_), (units,)), *[(np.dtype(np.float32), (units,))] * 2]
    if [(array.dtype, array.shape) for array in arrays] != wanted:
        raise UnbakeError(
            f"hidden layer {layer.layer}",
            expected=f"{', '.join(ARRAYS)} for each of its {units} units",
            found=", ".join(f"{array.dtype}{list(array.shape)}" for array in arrays),
            advice="The file was edited after it was baked: bake the patch into the base again.",
        )
    chosen = np.flatnonzero(edited)
    return LayerEdit(layer.layer, chosen, factor[chosen], constant[chosen])


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
            raise UnbakeError(
                "the metadata entry atpatch.layers",
                expected=f"hidden layers of the base ({', '.join(layers) or 'none'})",
                found=f"{layer.layer}, of the value {layer.value}",
                advice="The file was edited after it was baked: bake the patch into the base again.",
            )
        edits.append(baked_edit(patched, layer, own.units))
    return edits


def baked_weight(model: ir.Model, scope: str, name: str) -> Array:
    """A weight that baking wrote for a site or a hidden layer.

    Raises:
        UnbakeError: It is not there.
    """
    value = model.graph.initializers.get(own_name(scope, name))
    if value is None or value.const_value is None:
        raise UnbakeError(
            scope,
            expected=f"the weight {PREFIX}{scope}/{name}",
            found="none",
            advice="The file was edited after it was baked: bake the patch into the base again.",
        )
    return value.const_value.numpy()
