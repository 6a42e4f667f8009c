"""How a site's nodes are written into a graph: shared by the probe, the trial graph and the patched graph.

Every site is reached through three values: the map P, the values V and the output Y. The product that computes Y stays
as it is. Redistribution corrects its result, so an input without a flag gets Y itself: the base's own kernel, fused or
not, and the base's own bits. To put the correction in, the product's output is renamed and the corrected value takes
the old name; taking it out again is the reverse.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import InlinePass

from atpatch_onnx.errors import BakeError
from atpatch_onnx.functions import DOMAIN, DOMAIN_VERSION, MIN_OPSET, local_functions
from atpatch_onnx.graph import PREFIX, opset_version
from atpatch_onnx.sites import AttentionSite, Form, Layout

SITE_KEY = "atpatch.site"
"""Metadata of every node that this package adds: the site it belongs to."""

OUTPUTS_KEY = "atpatch.outputs"
"""Metadata of a base node that was asked for more outputs: how many it had."""


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
    """Attention map `[batch, heads, queries, keys]`."""

    V: ir.Value
    """Values, `[batch, kv heads, keys, depth]`, or `[batch, keys, kv heads * depth]` where `packed_values`."""

    Y: ir.Value
    """The site's output, in the site's layout."""

    packed_values: bool


class Insertion:
    """Adds nodes behind an anchor, in call order; every node, value and weight is named `atpatch/<scope>/...`."""

    def __init__(self, graph: ir.Graph, scope: str, *, anchor: ir.Node | None = None) -> None:
        """Add to `graph`, after `anchor`, or at its end where there is none."""
        self.graph = graph
        self._anchor = anchor
        self.scope = scope

    def constant(self, name: str, array: NDArray[np.generic]) -> ir.Value:
        """A weight of the graph, of the array's shape and type."""
        name = f"{PREFIX}{self.scope}/{name}"
        if name not in self.graph.initializers:
            tensor = ir.tensor(np.ascontiguousarray(array), name=name)
            value = ir.Value(name=name, shape=ir.Shape(array.shape), const_value=tensor)
            value.dtype = tensor.dtype
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def call(self, function: str, *inputs: ir.Value, name: str) -> ir.Value:
        """Call one of our functions; the result is named `atpatch/<scope>/<name>`."""
        return self._add(ir.Node(DOMAIN, function, inputs), name)

    def op(self, op_type: str, *inputs: ir.Value, name: str, attributes: Sequence[ir.Attr] = ()) -> ir.Value:
        """Add an ONNX operator; the result is named `atpatch/<scope>/<name>`."""
        return self._add(ir.Node("", op_type, inputs, attributes), name)

    def _add(self, node: ir.Node, name: str) -> ir.Value:
        node.name = f"{PREFIX}{self.scope}/{name}"
        node.metadata_props[SITE_KEY] = self.scope
        node.outputs[0].name = node.name
        self.place(node)
        return node.outputs[0]

    def place(self, node: ir.Node) -> None:
        """Put a node behind what was added last."""
        if self._anchor is None:
            self.graph.append(node)
        else:
            self.graph.insert_after(self._anchor, node)
            self._anchor = node


def find_value(graph: ir.Graph, name: str) -> ir.Value:
    """The value of this name among a graph's inputs, weights and node outputs.

    Raises:
        BakeError: There is none.
    """
    for value in _values(graph):
        if value.name == name:
            return value
    raise BakeError(
        name,
        expected="a value of this name in the graph",
        found="none",
        advice="Find the sites of this very model again: it changed since.",
    )


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def require_opset(model: ir.Model) -> None:
    """Refuse models whose operators are too old for our functions.

    Raises:
        BakeError: The model imports an opset before `MIN_OPSET`.
    """
    if opset_version(model) < MIN_OPSET:
        raise BakeError(
            "the model's opset",
            expected=f"opset {MIN_OPSET} or later",
            found=f"opset {opset_version(model)}",
            advice="Export the model at a later opset, or lift it with onnx.version_converter.",
        )


def open_site(model: ir.Model, site: AttentionSite) -> tuple[Handles, Insertion]:
    """The site's values in this graph, and an insertion point right behind its product.

    A fused `Attention` is asked for its map (4th output, `qk_matmul_output_mode=3`), which leaves its Y as it was bit
    for bit, and, with a past, for the values that meet the map (3rd output).
    """
    graph = model.graph
    Y = find_value(graph, site.output)
    product = Y.producer()
    assert product is not None, "a site's output is computed by a node"
    at = Insertion(graph, site.name, anchor=product)
    if site.form is Form.SOFTMAX:
        assert site.map is not None, "a decomposed site names its map"
        return Handles(find_value(graph, site.map), find_value(graph, site.value), Y, packed_values=False), at
    P = _fused_map(product, at)
    past = len(product.inputs) > 5 and product.inputs[5] is not None
    V = _extra_output(product, 2, at, "values") if past else find_value(graph, site.value)
    return Handles(P, V, Y, packed_values=site.layout is Layout.PACKED and not past), at


_MODE = "qk_matmul_output_mode"

MODE_KEY = "atpatch.mode"
"""Metadata of a base node that was asked for its map: the mode that it stated before, if it did."""


def _fused_map(product: ir.Node, at: Insertion) -> ir.Value:
    has_output = len(product.outputs) > 3 and bool(product.outputs[3].name)
    mode = product.attributes[_MODE].as_int() if _MODE in product.attributes else None
    if has_output and mode == 3:
        return product.outputs[3]
    if not has_output:
        if mode is not None:  # exporters write the default out
            product.metadata_props[MODE_KEY] = str(mode)
        product.attributes[_MODE] = ir.AttrInt64(_MODE, 3)
        P = _extra_output(product, 3, at, "map")
        P.type = product.outputs[0].type
        return P
    # The op already hands out its scores at another stage: a second one computes the map.
    attributes = [*(attr for attr in product.attributes.values() if attr.name != _MODE), ir.AttrInt64(_MODE, 3)]
    second = ir.Node("", "Attention", product.inputs, attributes, num_outputs=4, name=f"{PREFIX}{at.scope}/map")
    second.metadata_props[SITE_KEY] = at.scope
    for index, output in enumerate(second.outputs):
        used = index in (0, 3) or (index in (1, 2) and len(product.inputs) > 5 and product.inputs[5] is not None)
        output.name = f"{PREFIX}{at.scope}/map" + ("" if index == 3 else f"_{index}") if used else ""
    second.outputs[3].type = product.outputs[0].type
    at.place(second)
    return second.outputs[3]


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
    product.outputs[index].name = f"{PREFIX}{at.scope}/{name}"
    product.outputs[index].type = product.outputs[0].type  # not its dtype: exporters may leave the type unknown
    return product.outputs[index]


def column_features(at: Insertion, P: ir.Value, site: AttentionSite, *, whole: bool) -> ir.Value:
    """Column features `[batch, features, keys]`, float32."""
    if whole:
        return at.call("WholeColumns", P, name="features")
    queries = "ValidQueries" if site.self_attention else "AllQueries"
    return at.call("ColumnSummary", P, at.call(queries, P, name="valid_queries"), name="features")


@dataclass(frozen=True)
class Repair:
    """What redistribution at one site needs, as values of the graph."""

    flags: ir.Value
    """bool `[batch, keys]`."""

    beta: ir.Value
    """float, broadcasts to `[batch, heads, queries, 1]`."""

    neutral: ir.Value | None
    """float `[kv heads, depth]`, or None: tokens keep their own value."""


def repair_output(at: Insertion, site: AttentionSite, handles: Handles, repair: Repair, emission: Emission) -> None:
    """Correct Y where a sample has a flag; the corrected value takes Y's name and all its uses."""
    Y = handles.Y
    name = Y.name
    assert name is not None, "values of a loaded model have names"
    packed = site.layout is Layout.PACKED
    per_sample = at.constant("per_sample", np.array([-1, 1, 1] if packed else [-1, 1, 1, 1], np.int64))
    shape = None
    if handles.packed_values:
        assert isinstance(site.kv_heads, int), "a packed site knows its heads"
        shape = at.constant("kv_heads", np.array([0, 0, site.kv_heads, -1], np.int64))

    def corrected(into: Insertion) -> ir.Value:
        V = handles.V if shape is None else into.call("UnpackHeads", handles.V, shape, name="unpacked_values")
        if repair.neutral is not None:
            V = into.call("NeutralValues", V, repair.flags, repair.neutral, name="neutral_values")
        P = into.call("RedistributedMap", handles.P, repair.flags, repair.beta, name="redistributed_map")
        repaired = into.call("Attend", P, V, name="repaired")
        if packed:
            repaired = into.call("PackHeads", repaired, name="packed")
        return into.call("SelectFlagged", repaired, Y, repair.flags, per_sample, name="selected")

    if emission is Emission.BRANCHLESS:
        result = corrected(at)
    else:
        any_flag = at.call("AnyFlag", repair.flags, name="any_flag")
        result = _if(at, any_flag, corrected, lambda into: into.op("Identity", Y, name="unchanged"))
    result.shape, result.type = Y.shape, Y.type
    added = {result.producer(), *(node for node in _inside(result.producer()))}
    uses = [(node, index) for node, index in Y.uses() if node not in added and SITE_KEY not in node.metadata_props]
    for node, index in uses:
        node.replace_input_with(index, result)
    outputs = at.graph.outputs
    for index, output in enumerate(outputs):
        if output is Y:
            outputs[index] = result
    Y.name = f"{PREFIX}{site.name}/base"
    result.name = name


def _if(
    at: Insertion,
    condition: ir.Value,
    then: Callable[[Insertion], ir.Value],
    otherwise: Callable[[Insertion], ir.Value],
) -> ir.Value:
    """An `If` whose branches are written by `then` and `otherwise`."""

    def branch(name: str, write: Callable[[Insertion], ir.Value]) -> ir.Graph:
        graph = ir.Graph([], [], nodes=[], name=f"{PREFIX}{at.scope}/{name}")
        result = write(Insertion(graph, f"{at.scope}/{name}"))
        graph.outputs.append(result)
        return graph

    attributes = [
        ir.AttrGraph("then_branch", branch("then", then)),
        ir.AttrGraph("else_branch", branch("else", otherwise)),
    ]
    return at.op("If", condition, name="if_flagged", attributes=attributes)


def _inside(node: ir.Node | None) -> Iterator[ir.Node]:
    if node is not None:
        for attribute in node.attributes.values():
            if attribute.type is ir.AttributeType.GRAPH:
                yield from attribute.as_graph()


def import_functions(model: ir.Model) -> None:
    """Give the model the functions of ours that its nodes call."""
    called = {node.op_type for node in model.graph.all_nodes() if node.domain == DOMAIN}
    functions = local_functions(opset_version(model))
    for name in sorted(called):
        model.functions[functions[name].identifier()] = functions[name]
    model.graph.opset_imports[DOMAIN] = DOMAIN_VERSION


def inline_functions(model: ir.Model) -> None:
    """Replace the calls of our functions by their nodes; names stay unique and under `atpatch/`."""
    before = {value.name for graph in model.graphs() for value in _values(graph)}
    InlinePass(criteria=lambda function: function.domain == DOMAIN)(model)
    model.graph.opset_imports.pop(DOMAIN, None)
    for number, node in enumerate(node for node in model.graph.all_nodes() if SITE_KEY in node.metadata_props):
        if not (node.name or "").startswith(PREFIX):
            node.name = f"{PREFIX}{node.metadata_props[SITE_KEY]}/{node.op_type}_{number}"
        for output in node.outputs:
            if output.name not in before:
                output.name = f"{PREFIX}{node.metadata_props[SITE_KEY]}/{node.op_type}_{number}_{output.name}"
