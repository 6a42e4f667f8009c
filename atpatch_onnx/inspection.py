"""Look into a patched model: its inner values as outputs, for `verify`, `evaluate` and `report`."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx import graph as graphs
from atpatch_onnx.emission import find_value
from atpatch_onnx.errors import StripError
from atpatch_onnx.matching import find_sites
from atpatch_onnx.metadata import PatchedSite, PatchRecord
from atpatch_onnx.redistribution import redistributed_map, redistributed_output, unpack_heads
from atpatch_onnx.runtime import Array
from atpatch_onnx.sites import AttentionSite


def expose(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """A copy of `model` with the values of these names as further outputs, in this order."""
    exposed = graphs.copy(model)
    present = {output.name for output in exposed.graph.outputs}
    for name in dict.fromkeys(names):
        if name not in present:
            exposed.graph.outputs.append(find_value(exposed.graph, name))
    return exposed


def last_flags(sites: Sequence[PatchedSite]) -> str:
    """The value that holds the flags of all sites: they are carried along, so the last site has them all.

    Raises:
        StripError: The file names no patched site.
    """
    if not sites:
        raise StripError(
            "the metadata entry atpatch.sites",
            expected="at least one patched site",
            found="none",
            advice="The file was edited after it was baked: bake the patch into the base again.",
        )
    return sites[-1].flags


@dataclass(frozen=True, eq=False)
class SiteValues:
    """One redistributing site's values for some inputs, float64, one axis a head."""

    P: NDArray[np.float64]
    V: NDArray[np.float64]
    Y: NDArray[np.float64]
    """As the base computes it."""

    corrected: NDArray[np.float64]
    """As the model goes on with it."""

    flags: NDArray[np.bool_]
    beta: Array
    neutral: Array | None

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
    """Gather a redistributing site's values from the outputs of the exposed model."""
    P = np.asarray(outputs[site.map], np.float64)
    V = np.asarray(outputs[site.values], np.float64)
    results = [np.asarray(outputs[name], np.float64) for name in (site.base_output, site.output)]
    if site.packed_output:
        results = [unpack_heads(array, P.shape[1]) for array in results]
    return SiteValues(
        P=P,
        V=V if site.kv_heads is None else unpack_heads(V, site.kv_heads),
        Y=results[0],
        corrected=results[1],
        flags=np.asarray(outputs[site.flags], bool),
        beta=baked_weight(model, site, "beta"),
        neutral=baked_weight(model, site, "neutral") if site.value == "neutral" else None,
    )


def weight_names(site: PatchedSite) -> list[str]:
    """The weights that decide what a site does, besides its detector's."""
    names = ["threshold"] if site.threshold is not None else []
    if site.value is not None:
        names += ["beta", "neutral"] if site.value == "neutral" else ["beta"]
    return names


def baked_weight(model: ir.Model, site: PatchedSite, name: str) -> Array:
    """A weight that baking wrote for a site.

    Raises:
        StripError: It is not there.
    """
    value = model.graph.initializers.get(f"{graphs.PREFIX}{site.site}/{name}")
    if value is None or value.const_value is None:
        raise StripError(
            f"site {site.site}",
            expected=f"the weight {graphs.PREFIX}{site.site}/{name}",
            found="none",
            advice="The file was edited after it was baked: bake the patch into the base again.",
        )
    return value.const_value.numpy()
