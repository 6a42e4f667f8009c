"""How a site's nodes are written into a graph: shared by the probe, the trial graph and the patched graph.

Every site is reached through three values: the map P, the values V and the output Y, each brought to its canonical axes
(`moves`) where it is needed. The product that computes Y stays as it is. Redistribution corrects its result, so an
input without a flag gets Y itself: the base's own kernel, fused or not, and the base's own bits. To put the correction
in, the product's output is renamed and the corrected value takes the old name; taking it out again is the reverse.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from atpatch_onnx.baking.functions import local_functions
from atpatch_onnx.baking.moves import axis_size, from_canonical, to_canonical
from atpatch_onnx.baking.shadow import map_and_values
from atpatch_onnx.graph import opset_version
from atpatch_onnx.graph.insertion import Insertion, take_place
from atpatch_onnx.graph.names import DOMAIN, DOMAIN_VERSION, MODE_KEY, OUTPUTS_KEY, PREFIX, SITE_KEY, own_name
from atpatch_onnx.graph.values import find_value, graph_values, sample_input
from atpatch_onnx.matching.layout import VALUES, Layout
from atpatch_onnx.matching.sites import AttentionSite, Dim, Form


class Emission(StrEnum):
    """The two forms of redistribution; their results are the same."""

    CONDITIONAL = "conditional"
    """Inside an `If` that runs only when something is flagged: for the CPU."""

    BRANCHLESS = "branchless"
    """Always computed and selected by `Where`: for devices and tools that do without `If`."""


@dataclass(frozen=True)
class Handles:
    """The three values of a site in a graph."""

    P: ir.Value
    """Attention map `[maps, heads, queries, keys]`."""

    V: ir.Value
    """Values, laid out as `value_layout` says."""

    Y: ir.Value
    """The site's output, in the site's own layout."""

    value_layout: str

    sample: ir.Value
    """An input of the model with the samples on its first axis."""


def open_site(model: ir.Model, site: AttentionSite) -> tuple[Handles, Insertion]:
    """The site's values in this graph, and an insertion point right behind its product.

    A fused `Attention` in float32 is asked for its map (4th output, `qk_matmul_output_mode=3`), which leaves its Y as
    it was bit for bit, and, with a past, for the values that meet the map (3rd output); `deferral` may move it later.
    Beside an operator of onnxruntime's own domain, which may not hand out its map, map and values are computed a second
    time (`shadow`).
    """
    graph = model.graph
    Y = find_value(graph, site.output)
    product = Y.producer()
    assert product is not None, "a site's output is computed by a node"
    at = Insertion(graph, site.name, anchor=product)
    V, value_layout = None, site.value_layout
    if site.form is Form.FUSED:
        P, V = map_and_values(product, at)
        value_layout = VALUES
    elif site.form is Form.ATTENTION:
        P = _fused_map(product, at, exact=site.dtype == ir.DataType.FLOAT.name)
        if len(product.inputs) > 5 and product.inputs[5] is not None:
            V = _extra_output(product, 2, at, "values")
    else:
        assert site.map is not None, "a decomposed site names its map"
        P = _read(at, find_value(graph, site.map), site, "map")
        P = to_canonical(at, P, Layout.parse(site.map_layout), _sizes(site, site.heads), "map")
    return Handles(P, V or find_value(graph, site.value), Y, value_layout, sample_input(graph)), at


def _read(at: Insertion, value: ir.Value, site: AttentionSite, name: str) -> ir.Value:
    """A value of the base, in float32 where that is float16.

    onnxruntime's CPU kernels compute much of float16 in float32 and round in between only where somebody reads float16:
    a Cast does, and would change the base's own bits; a Neg, which they compute in float32 as well, does not.
    """
    if site.dtype != ir.DataType.FLOAT16.name or site.form is Form.FUSED:
        return value
    negated = at.op("Neg", value, name=f"{name}/negated")
    cast = at.op("Cast", negated, name=f"{name}/cast", attributes=[ir.AttrInt64("to", ir.DataType.FLOAT)])
    result = at.op("Neg", cast, name=f"{name}/read")
    result.shape, result.dtype = value.shape, ir.DataType.FLOAT
    return result


def _sizes(site: AttentionSite, heads: Dim) -> dict[str, Dim]:
    """The sizes of letters that may be folded into one axis."""
    return {"h": heads, "w": site.parts, "hg": site.heads}


def canonical_values(at: Insertion, site: AttentionSite, handles: Handles) -> ir.Value:
    """The values `[maps, kv heads, keys, depth]`."""
    V = _read(at, handles.V, site, "values")
    return to_canonical(at, V, Layout.parse(handles.value_layout), _sizes(site, site.kv_heads), "values")


def per_sample(at: Insertion, site: AttentionSite, handles: Handles, of_maps: ir.Value, name: str) -> ir.Value:
    """`[maps, keys]` to `[samples, columns]`: the columns of a sample are those of all its parts, one after the other.

    Where samples share one map, its keys are those of all samples, one after the other.
    """
    if site.parts == 1:
        return of_maps
    samples = axis_size(at, handles.sample, 0, f"{name}/samples")
    rest = at.constant("rest", np.array([-1], np.int64))
    shape = at.op("Concat", samples, rest, name=f"{name}/shape", attributes=[ir.AttrInt64("axis", 0)])
    return at.op("Reshape", of_maps, shape, name=name)


def per_map(at: Insertion, site: AttentionSite, handles: Handles, of_samples: ir.Value, name: str) -> ir.Value:
    """`[samples, columns]` back to `[maps, keys]`."""
    if site.parts == 1:
        return of_samples
    sizes = [axis_size(at, handles.P, axis, f"{name}/size_{axis}") for axis in (0, 3)]
    shape = at.op("Concat", *sizes, name=f"{name}/shape", attributes=[ir.AttrInt64("axis", 0)])
    return at.op("Reshape", of_samples, shape, name=name)


MODE = "qk_matmul_output_mode"
"""Attribute of an op `Attention`: which stage of its map it hands out."""


def _fused_map(product: ir.Node, at: Insertion, *, exact: bool) -> ir.Value:
    """The map of an op `Attention`; `exact` says that handing it out leaves its Y as it was, as in float32 it does."""
    has_output = len(product.outputs) > 3 and bool(product.outputs[3].name)
    mode = product.attributes[MODE].as_int() if MODE in product.attributes else None
    if has_output and mode == 3:
        return product.outputs[3]
    if not has_output and exact:
        if mode is not None:  # exporters write the default out
            product.metadata_props[MODE_KEY] = str(mode)
        product.attributes[MODE] = ir.AttrInt64(MODE, 3)
        P = _extra_output(product, 3, at, "map")
        P.type = product.outputs[0].type
        return P
    # The op already hands out its scores at another stage, or would take another way in float16 (seen with packed
    # heads): a second one computes the map.
    attributes = [*(attr for attr in product.attributes.values() if attr.name != MODE), ir.AttrInt64(MODE, 3)]
    second = ir.Node("", "Attention", product.inputs, attributes, num_outputs=4, name=own_name(at.scope, "map"))
    second.metadata_props[SITE_KEY] = at.scope
    for index, output in enumerate(second.outputs):
        used = index in (0, 3) or (index in (1, 2) and len(product.inputs) > 5 and product.inputs[5] is not None)
        output.name = own_name(at.scope, "map") + ("" if index == 3 else f"_{index}") if used else ""
    second.outputs[3].type = product.outputs[0].type
    at.place(second)
    return second.outputs[3]


def asked_before(product: ir.Node) -> list[ir.Attr]:
    """The attributes of an op `Attention` as they were before it was asked for its map."""
    mode = product.metadata_props.get(MODE_KEY)
    stated = [] if mode is None else [ir.AttrInt64(MODE, int(mode))]
    return [kept for one in product.attributes.values() for kept in (stated if one.name == MODE else [one])]


def forget_the_map(product: ir.Node) -> None:
    """Let a node be asked for its map no more; its further outputs stay."""
    attributes = {attribute.name: attribute for attribute in asked_before(product)}
    product.attributes.clear()
    product.attributes.update(attributes)
    product.metadata_props.pop(MODE_KEY, None)


def _extra_output(product: ir.Node, index: int, at: Insertion, name: str) -> ir.Value:
    """Output `index` of a fused node, asked for if it was not there; the node remembers how many it had."""
    if len(product.outputs) > index and product.outputs[index].name:
        return product.outputs[index]
    product.metadata_props.setdefault(OUTPUTS_KEY, str(len(product.outputs)))
    before = len(product.outputs)
    if before <= index:
        product.resize_outputs(index + 1)
        for output in product.outputs[before:]:
            output.name = ""
    product.outputs[index].name = own_name(at.scope, name)
    product.outputs[index].type = product.outputs[0].type  # not its dtype: exporters may leave the type unknown
    return product.outputs[index]


@dataclass(frozen=True)
class Repair:
    """What redistribution at one site needs, as values of the graph."""

    flags: ir.Value
    """bool `[maps, keys]`."""

    beta: ir.Value
    """float, broadcasts to `[maps, heads, queries, 1]`."""

    neutral: ir.Value | None
    """float `[1, kv heads, 1, depth]`, or None: tokens keep their own value."""


def repair_output(at: Insertion, site: AttentionSite, handles: Handles, repair: Repair, emission: Emission) -> None:
    """Correct Y where a sample has a flag; the corrected value takes Y's name and all its uses."""
    Y = handles.Y

    def corrected(into: Insertion) -> ir.Value:
        V = canonical_values(into, site, handles)
        P, flags = handles.P, repair.flags
        benign = into.call("Attend", P, into.call("BenignValues", V, flags, name="benign_values"), name="benign")
        r = into.call("Attend", P, into.call("BenignColumn", flags, name="benign_column"), name="benign_mass")
        columns = into.call("CountColumns", flags, name="count_columns")
        chosen = into.call("MapFlag", flags, name="map_flag")
        if repair.neutral is not None:
            counts = _counts(into, P, columns, emission)
            handed = into.call("NeutralHanded", P, flags, repair.neutral, name="handed")
        else:
            visible = _visible(into, P)
            counts = into.op("MatMul", visible, columns, name="counts")
            flagged = into.call("FlaggedValues", V, flags, name="flagged_values")
            own = into.call("Attend", visible, flagged, name="own_values")
            handed = into.call("OwnHanded", own, counts, name="handed")
            rows = into.call("SomeBenign", r, name="some_benign")
            chosen = into.op("And", rows, chosen, name="flagged_rows")
        exact = site.dtype == ir.DataType.FLOAT.name  # rows of halves sum to one in two or three digits
        mass = into.call(*(("MassOfSoftmax", counts) if exact and _is_softmax(P) else ("Mass", P)), name="mass")
        repaired = into.call("Redistributed", benign, mass, r, counts, repair.beta, handed, name="repaired")
        return _selected(into, site, repaired, Y, chosen)

    if emission is Emission.BRANCHLESS:
        result = corrected(at)
    else:
        any_flag = at.call("AnyFlag", repair.flags, name="any_flag")
        result = _if(at, any_flag, corrected, lambda into: into.op("Identity", Y, name="unchanged"), "if_flagged")
    take_place(at, Y, result)


def _visible(at: Insertion, P: ir.Value) -> ir.Value:
    return at.call("VisibleOfSoftmax" if _is_softmax(P) else "Visible", P, name="visible")


def _counts(at: Insertion, P: ir.Value, columns: ir.Value, emission: Emission) -> ir.Value:
    """How many keys a query sees, all and flagged ones; where every query sees every key there is nothing to count.

    A branch in a branch calls no function that its surroundings call: onnxruntime, inlining both, names values twice.
    """

    def counted(into: Insertion) -> ir.Value:
        return into.op("MatMul", _visible(into, P), columns, name="counts")

    if emission is Emission.BRANCHLESS:
        return counted(at)
    hidden = at.call("SomeHidden", P, name="some_hidden")
    every = at.call("CountAll", columns, name="count_all")
    return _if(at, hidden, counted, lambda into: into.op("Identity", every, name="counts"), "if_hidden")


def _is_softmax(P: ir.Value) -> bool:
    """Whether no weight is above 1: the map comes out of a softmax as it is, not through a gate."""
    node = P.producer()
    return node is not None and (node.op_type == "Softmax" or (node.op_type == "Attention" and node.domain == ""))


def _selected(at: Insertion, site: AttentionSite, repaired: ir.Value, Y: ir.Value, chosen: ir.Value) -> ir.Value:
    """The repaired output where chosen, bool `[maps, 1, 1 or queries, 1]`, else Y; in the layout of Y.

    Y itself is not moved: in float16, onnxruntime's CPU kernels hand it on unrounded to whatever computes in float32,
    and a Reshape in between would round it.
    """
    layout, sizes = Layout.parse(site.output_layout), _sizes(site, site.heads)
    if not layout.is_canonical:
        every = at.op("Expand", chosen, at.op("Shape", repaired, name="repaired/shape"), name="flagged")
        chosen = from_canonical(at, every, Y, layout, sizes, "flagged")
    repaired = from_canonical(at, repaired, Y, layout, sizes, "output")
    return at.call("SelectFlagged", repaired, Y, chosen, name="selected")


def _if(
    at: Insertion,
    condition: ir.Value,
    then: Callable[[Insertion], ir.Value],
    otherwise: Callable[[Insertion], ir.Value],
    name: str,
) -> ir.Value:
    """An `If` whose branches are written by `then` and `otherwise`."""

    def branch(name: str, write: Callable[[Insertion], ir.Value]) -> ir.Graph:
        graph = ir.Graph([], [], nodes=[], name=own_name(at.scope, name))
        result = write(Insertion(graph, f"{at.scope}/{name}"))
        graph.outputs.append(result)
        return graph

    attributes = [
        ir.AttrGraph("then_branch", branch("then", then)),
        ir.AttrGraph("else_branch", branch("else", otherwise)),
    ]
    return at.op("If", condition, name=name, attributes=attributes)


def import_functions(model: ir.Model) -> None:
    """Give the model the functions of ours that its nodes call."""
    called = {node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN}
    functions = local_functions(opset_version(model))
    for name in sorted(called):
        model.functions[functions[name].identifier()] = functions[name]
    model.graph.opset_imports[DOMAIN] = DOMAIN_VERSION


def inline_functions(model: ir.Model) -> None:
    """Replace the calls of our functions by their nodes; names stay unique and under `atpatch/`."""
    before = {value.name for graph in model.graphs() for value in graph_values(graph)}
    InlinePass(criteria=lambda function: function.domain == DOMAIN)(model)
    model.graph.opset_imports.pop(DOMAIN, None)
    for number, node in enumerate(node for node in model.graph.all_nodes() if SITE_KEY in node.metadata_props):
        if not (node.name or "").startswith(PREFIX):
            node.name = own_name(node.metadata_props[SITE_KEY], f"{node.op_type}_{number}")
        for output in node.outputs:
            if output.name not in before:
                output.name = own_name(node.metadata_props[SITE_KEY], f"{node.op_type}_{number}_{output.name}")
