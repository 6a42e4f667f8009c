"""Look into a patched model: its inner values as outputs, for `verify`, `evaluate` and `report`."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.baking.edits import ARRAYS
from atpatch_onnx.baking.metadata import PatchedLayer, PatchedSite, PatchRecord
from atpatch_onnx.baking.reference import redistributed_map, redistributed_output
from atpatch_onnx.errors import UnbakeError
from atpatch_onnx.graph.names import PREFIX, own_name
from atpatch_onnx.matching import find_sites
from atpatch_onnx.matching.hidden import find_hidden_layers
from atpatch_onnx.matching.layout import canonical
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.patches.patch import LayerEdit
from atpatch_onnx.running.sessions import Array


def last_flags(sites: Sequence[PatchedSite]) -> str:
    """The value that holds the flags of all sites of one token axis: they are carried along, so the last has them all.

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
    return sites[-1].flags


@dataclass(frozen=True, eq=False)
class SiteValues:
    """One redistributing site's values for some inputs, float64, in canonical axes (see `layout`)."""

    P: NDArray[np.float64]
    V: NDArray[np.float64]
    Y: NDArray[np.float64]
    """As the base computes it."""

    corrected: NDArray[np.float64]
    """As the model goes on with it."""

    flags: NDArray[np.bool_]
    """`[maps, keys]`."""

    beta: Array
    neutral: Array | None

    def fits(self) -> bool:
        """Whether the shapes are those of one site."""
        maps, heads, queries, keys = self.P.shape
        shared, kv_heads, own_keys, depth = self.V.shape
        return (
            self.Y.shape == self.corrected.shape == (maps, heads, queries, depth)
            and (own_keys, heads % kv_heads) == (keys, 0)
            and shared in (1, maps)
        )

    def reference(self) -> NDArray[np.float64]:
        """What the numpy reference makes of P, V, Y and the flags."""
        return redistributed_output(self.P, self.V, self.Y, self.flags, self.beta, self.neutral)

    def redistributed_map(self) -> NDArray[np.float64]:
        """The map after redistribution, by the numpy reference."""
        return redistributed_map(self.P, self.flags, self.beta)


def axis_sites(base: ir.Model, record: PatchRecord) -> tuple[AttentionSite, ...]:
    """The base's sites on the token axes that the patch works on; all of them where the patch names none of them."""
    sites, patched = find_sites(base), {site.site for site in record.sites}
    axes = {site.token_axis for site in sites if site.name in patched}
    return tuple(site for site in sites if site.token_axis in axes) or sites


def value_names(site: PatchedSite) -> list[str]:
    """The values that `site_values` needs."""
    return [site.map, site.values, site.base_output, site.output, site.flags]


def site_values(model: ir.Model, site: PatchedSite, outputs: dict[str, Array]) -> SiteValues:
    """Gather a redistributing site's values from the outputs of the exposed model.

    Raises:
        UnbakeError: A weight of the site is not there, or the values that the file names are not those of a site.
    """
    try:
        values = _gathered(model, site, outputs)
        fitting = values.fits()
    except (IndexError, TypeError, ValueError, ZeroDivisionError):  # where axes are missing or cannot be folded
        fitting = False
    if not fitting:
        raise UnbakeError(
            f"site {site.site}",
            expected="the map, values and outputs of an attention site",
            found=", ".join(f"{name} {list(np.shape(outputs[name]))}" for name in value_names(site)),
            advice="The file was edited after it was baked: bake the patch into the base again.",
        )
    return values


def _gathered(model: ir.Model, site: PatchedSite, outputs: dict[str, Array]) -> SiteValues:
    P = np.asarray(outputs[site.map], np.float64)
    sizes = {"h": P.shape[1], "w": site.parts or 1}

    def laid_out(name: str, layout: str, heads: int) -> NDArray[np.float64]:
        return np.asarray(canonical(outputs[name], layout, {**sizes, "h": heads}), np.float64)

    return SiteValues(
        P=P,
        V=laid_out(site.values, site.value_layout, site.kv_heads),
        Y=laid_out(site.base_output, site.output_layout, P.shape[1]),
        corrected=laid_out(site.output, site.output_layout, P.shape[1]),
        flags=np.asarray(outputs[site.flags], bool).reshape(len(P), P.shape[3]),
        beta=baked_weight(model, site.site, "beta"),
        neutral=baked_weight(model, site.site, "neutral")[0, :, 0] if site.value == "neutral" else None,
    )


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


def weight_names(site: PatchedSite) -> list[str]:
    """The weights that decide what a site does alone, besides its detector's."""
    names = ["threshold"] if site.threshold is not None else []
    if site.reach:
        names.append("reach")
    if site.value is not None:
        names += ["beta", "switch", "neutral"] if site.value == "neutral" else ["beta", "switch"]
    return names


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
