"""The probe: the base with what a fit collects at its sites as its only outputs."""

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.maps import ask_for_map
from atpatch_onnx.baking.read import read_features
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.graph.names import own_name
from atpatch_onnx.graph.parts import require_opset
from atpatch_onnx.graph.values import find_value
from atpatch_onnx.matching.layout import MAP
from atpatch_onnx.matching.sites import AttentionSite


def key_output(site: AttentionSite) -> str:
    """Name of the probe's output with the site's keys, float `[samples, tokens, heads * depth]`."""
    return own_name(site.name, "probe/key")


def value_output(site: AttentionSite) -> str:
    """Name of the probe's output with the site's values, float `[samples, tokens, heads * depth]`."""
    return own_name(site.name, "probe/value")


def mass_output(site: AttentionSite) -> str | None:
    """Name of the probe's output with the attention that each token draws, float `[samples, tokens]`.

    Its mean share over heads and queries. None where the graph does not return one map a sample for its tokens.
    """
    shown = site.shows_map and site.map_layout == MAP and site.parts == 1 and site.self_attention
    return own_name(site.name, "probe/mass") if shown else None


def probe(
    model: ir.Model, sites: Sequence[AttentionSite], *, masses: bool = False, kept: Sequence[str] = ()
) -> ir.Model:
    """A copy of `model` whose only outputs are keys and values of these sites; what lies behind them is not computed.

    Args:
        model: The base.
        sites: Whose keys and values are asked for.
        masses: Ask for the attention that tokens draw as well, where the graph tells.
        kept: Outputs of the base that stay, by name.

    Raises:
        BakeError: The model's opset is too old, or a site is not in it.
    """
    require_opset(model)
    probed = graphs.copy(model)
    remaining = [output for output in probed.graph.outputs if output.name in kept]
    probed.graph.outputs.clear()
    probed.graph.outputs.extend(remaining)
    for site in sites:
        for place, name in ((site.key, key_output(site)), (site.value, value_output(site))):
            producer = find_value(probed.graph, place.value).producer()
            at = Insertion(probed.graph, site.name, anchor=producer, first=producer is None)
            own = name.removeprefix(own_name(site.name, ""))
            _add_output(probed, at, read_features(at, site, place, f"{own}/read"), own)
        mass = mass_output(site) if masses else None
        if mass is not None:
            P = ask_for_map(probed, site)
            at = Insertion(probed.graph, site.name, anchor=P.producer())
            drawn = at.reduce("ReduceMean", P, [1, 2], name="probe/drawn")
            to = ir.AttrInt64("to", ir.DataType.FLOAT)
            _add_output(probed, at, at.op("Cast", drawn, name="probe/cast", attributes=[to]), "probe/mass")
    RemoveUnusedNodesPass()(probed)
    return probed


def _add_output(probed: ir.Model, at: Insertion, value: ir.Value, name: str) -> None:
    probed.graph.outputs.append(at.op("Identity", value, name=name, dtype=ir.DataType.FLOAT))
