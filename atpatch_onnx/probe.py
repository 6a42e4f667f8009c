"""The probe: the base with what the detectors will see, and the values, as extra outputs."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.emission import column_features, import_functions, open_site, require_opset
from atpatch_onnx.patch import Features
from atpatch_onnx.sites import AttentionSite


def features_output(site: AttentionSite) -> str:
    """Name of the probe's output with the site's column features, float `[batch, features, keys]`."""
    return f"{graphs.PREFIX}{site.name}/probe/features"


def values_output(site: AttentionSite) -> str:
    """Name of the probe's output with the site's values, `[batch, kv heads, keys, depth]`."""
    return f"{graphs.PREFIX}{site.name}/probe/values"


def map_output(site: AttentionSite) -> str:
    """Name of the probe's output with the site's attention map, `[batch, heads, queries, keys]`."""
    return f"{graphs.PREFIX}{site.name}/probe/map"


def choose_features(site: AttentionSite) -> Features:
    """Whole columns where the map has one fixed, unmasked size; summaries, which padding does not change, elsewhere."""
    fixed = all(isinstance(size, int) for size in (site.heads, site.queries, site.keys))
    return Features.WHOLE if fixed and not site.masked else Features.SUMMARY


def probe(
    model: ir.Model, features: Mapping[AttentionSite, Features], *, maps: Sequence[AttentionSite] = ()
) -> ir.Model:
    """A copy of `model` with column features and values of the sites in `features`, and the maps of `maps`, as outputs.

    Raises:
        BakeError: The model's opset is too old, or a site is not in it.
    """
    require_opset(model)
    probed = graphs.copy(model)
    for site in sorted({*features, *maps}, key=lambda site: site.index):
        handles, at = open_site(probed, site)
        outputs = []
        if site in features:
            X = column_features(at, handles.P, site, whole=features[site] is Features.WHOLE)
            V = handles.V
            if handles.packed_values:
                assert isinstance(site.kv_heads, int), "a packed site knows its heads"
                V = at.call(
                    "UnpackHeads", V, at.constant("kv_heads", np.array([0, 0, site.kv_heads, -1])), name="unpacked"
                )
            outputs += [(X, features_output(site)), (V, values_output(site))]
        if site in maps:
            outputs.append((handles.P, map_output(site)))
        for value, name in outputs:
            own = name.removeprefix(f"{graphs.PREFIX}{site.name}/")
            output = at.op("Cast", value, name=own, attributes=[ir.AttrInt64("to", ir.DataType.FLOAT)])
            output.dtype = ir.DataType.FLOAT
            probed.graph.outputs.append(output)
    import_functions(probed)
    return probed
