"""The probe: the base with what the detectors will see, and the values, as extra outputs."""

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.emission import Handles, canonical_values, import_functions, open_site
from atpatch_onnx.baking.features import Landmarks, column_features
from atpatch_onnx.baking.moves import axis_size
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.graph.names import PREFIX, own_name
from atpatch_onnx.graph.parts import require_opset
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.patches.patch import Features


def features_output(site: AttentionSite) -> str:
    """Name of the probe's output with the site's column features, float `[samples, features, columns]`.

    They are in units of `features.shares_in_one`.
    """
    return own_name(site.name, "probe/features")


def values_output(site: AttentionSite) -> str:
    """Name of the probe's output with the site's values, `[samples, kv heads, columns, depth]`."""
    return own_name(site.name, "probe/values")


def map_output(site: AttentionSite) -> str:
    """Name of the probe's output with the site's attention map, `[maps, heads, queries, keys]`."""
    return own_name(site.name, "probe/map")


def probe(
    model: ir.Model, features: Mapping[AttentionSite, Features], *, maps: Sequence[AttentionSite] = ()
) -> ir.Model:
    """A copy of `model` with column features and values of the sites in `features`, and the maps of `maps`, as outputs.

    Raises:
        BakeError: The model's opset is too old, or a site is not in it.
    """
    require_opset(model)
    probed = graphs.copy(model)
    landmarks = Landmarks()
    for site in sorted({*features, *maps}, key=lambda site: site.index):
        handles, at = open_site(probed, site)
        outputs = []
        if site in features:
            X = column_features(at, handles.P, site, features[site], landmarks)
            V = canonical_values(at, site, handles)
            outputs += [
                (_per_sample(at, site, handles, X, 3, "features/per_sample"), features_output(site)),
                (_per_sample(at, site, handles, V, 4, "values/per_sample"), values_output(site)),
            ]
        if site in maps:
            outputs.append((handles.P, map_output(site)))
        for value, name in outputs:
            own = name.removeprefix(f"{PREFIX}{site.name}/")
            output = at.op("Cast", value, name=own, attributes=[ir.AttrInt64("to", ir.DataType.FLOAT)])
            output.dtype = ir.DataType.FLOAT
            probed.graph.outputs.append(output)
    import_functions(probed)
    return probed


def _per_sample(
    at: Insertion, site: AttentionSite, handles: Handles, of_maps: ir.Value, rank: int, name: str
) -> ir.Value:
    """`[maps, features, keys, ...]` to `[samples, features, columns, ...]`: see `emission.per_sample`."""
    if site.parts == 1:
        return of_maps
    samples = axis_size(at, handles.sample, 0, f"{name}/samples")
    features, *behind = (axis_size(at, of_maps, axis, f"{name}/size_{axis}") for axis in (1, *range(3, rank)))
    keys = axis_size(at, of_maps, 2, f"{name}/size_2")
    rest = at.constant("rest", np.array([-1], np.int64))
    shared = site.parts == 0
    apart = [features, samples, rest, *behind] if shared else [samples, rest, features, keys, *behind]
    perm = [1, 0, *range(2, rank)] if shared else [0, 2, 1, *range(3, rank + 1)]
    axis = ir.AttrInt64("axis", 0)
    value = at.op(
        "Reshape", of_maps, at.op("Concat", *apart, name=f"{name}/apart", attributes=[axis]), name=f"{name}/a"
    )
    value = at.op("Transpose", value, name=f"{name}/ordered", attributes=[ir.AttrInt64s("perm", perm)])
    joined = at.op("Concat", samples, features, rest, *behind, name=f"{name}/joined", attributes=[axis])
    return at.op("Reshape", value, joined, name=name)
