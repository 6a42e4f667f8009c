"""The map of an op `Attention`, written out only where something is flagged, and flagged values held back from it.

Asked for its map, the op writes it out beside all that it computes anyway: of a long sequence, a tenth of the memory.
Where detectors read a few rows, a small `Attention` of these queries gives them as well, with one column of V in place
of all. So the base's own node moves into the branches of the site's `If`: as it was into the one that leaves Y alone,
asked for its map into the other one.

    as woven   Attention -> Y, P       ->  rows of P   ->  flags  ->  If flagged: Y corrected by P, else: Y
    deferred   Attention of rows of Q  ->  their map   ->  flags  ->  If flagged: Attention -> Y, P; Y corrected by P,
                                                                      else: Attention -> Y

Where flags are known before Y is, the node may hold back what flagged tokens say: given zeros for their values, it
computes what benign ones bring, of which the correction would need a second product. A sample without a flag is given
its values times one and keeps its bits, so there is nothing to choose between in the end. This is done in branchless
emission as well, where the map is always written out.

`recall` brings the base's node back: whoever looks into a patched graph sees it as it was woven.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.emission import asked_before, forget_the_map
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.graph.names import DOMAIN, OUTPUTS_KEY, PREFIX, SITE_KEY, own_name
from atpatch_onnx.matching.sites import Dim

_VALUES, _MASK = 2, 3
"""Positions among the inputs, behind Q and K."""

_PLACES = ("ProbedQueries", "LandmarkRows")
"""Functions that read no more of a map than how many queries it has."""

_CORRECTION = ("Attend", "VisibleOfSoftmax", "NeutralHanded")
"""Functions that read a map once flags are known."""

_BENIGN = "benign_values"
"""Last part of the name of what a node is given that holds values back."""

Shapes = Mapping[str, tuple[Dim, ...]]
"""Of the base's values, by name."""


def defer(model: ir.Model, shapes: Shapes) -> None:
    """Let every op `Attention` that was asked for its map write it out only where it is needed, in place.

    That is where the other readers of the map read rows, and rows of Q and of the mask are known to be those of the
    map: there is no past, the op itself is not causal, and the mask has a row for each query.

    Args:
        model: A patched model whose sites decide alone or in conditional emission, its functions not inlined yet.
        shapes: What is known of the base.
    """
    rows = _Rows(shapes)
    for node in [node for node in model.graph if _is_asked(node)]:
        conditional = _conditional(model.graph, node)
        correction = _Correction.of(model.graph, _scope(node))
        if correction is not None:
            _hold_back_at_once(node, correction, rows)
            continue
        branches = () if conditional is None else tuple(_branches(conditional))
        nested = [graph for branch in branches for graph in branch.subgraphs()]
        Y, P = node.outputs[0], node.outputs[3]
        readers = [user for user, _ in P.uses() if user.graph is model.graph]
        within = _used_within(P, model.graph, *branches, *nested)
        within = within and (conditional is None or _used_within(Y, *branches))
        if not within or not all(rows.suffice(node, user) for user in readers):
            continue
        for reader in readers:
            rows.read(reader, node)
        if conditional is None:
            _as_before(node)
        else:
            _move_into(node, *branches)


def _is_asked(node: ir.Node) -> bool:
    """Whether this is an op `Attention` without a past, not causal, that was asked for its map and for no more."""
    if (node.domain, node.op_type) != ("", "Attention") or OUTPUTS_KEY not in node.metadata_props:
        return False
    named = [bool(output.name) for output in node.outputs]
    causal = "is_causal" in node.attributes and node.attributes["is_causal"].as_int() != 0
    past = any(value is not None for value in node.inputs[_MASK + 1 :])
    return named == [True, False, False, True] and not causal and not past


def _scope(node: ir.Node) -> str:
    """What is ours of a node's site is marked with this."""
    return (node.outputs[3].name or "").removeprefix(PREFIX).removesuffix("/map")


def _conditional(graph: ir.Graph, node: ir.Node) -> ir.Node | None:
    """The `If` that corrects this node's output."""
    name = own_name(_scope(node), "if_flagged")
    return next((one for one in graph if one.op_type == "If" and one.name == name), None)


def _hold_back_at_once(node: ir.Node, correction: "_Correction", rows: "_Rows") -> None:
    """Let a node hold values back in the main graph, behind the flags, if its map is read for them as rows only."""
    Y, P = node.outputs[0], node.outputs[3]
    before = [user for user, _ in P.uses() if user.op_type not in _CORRECTION]
    within = all(_used_within(value, correction.graph) for value in (Y, P))
    corrected_only = set(Y.consumers()) == {correction.selected} and correction.leaves_nothing(node)
    if within and corrected_only and all(rows.suffice(node, user) for user in before):
        for reader in before:
            rows.read(reader, node)
        correction.hold_back(node)


def _used_within(value: ir.Value, *within: ir.Graph) -> bool:
    return not value.is_graph_output() and {user.graph for user, _ in value.uses()} <= {*within}


def _branches(conditional: ir.Node) -> Iterator[ir.Graph]:
    """The one that runs where something is flagged, and the other one."""
    for name in ("then_branch", "else_branch"):
        yield conditional.attributes[name].as_graph()


def _mask(node: ir.Node) -> ir.Value | None:
    return node.inputs[_MASK] if len(node.inputs) > _MASK else None


def _is_gather(reader: ir.Node) -> bool:
    return (reader.domain, reader.op_type) == ("", "Gather") and reader.attributes["axis"].as_int() == 2


class _Rows:
    """Readers of maps, and the rows of Q and of masks that they are given instead.

    Sites share the rows of a mask, and the few values that nobody reads.
    """

    def __init__(self, shapes: Shapes) -> None:
        self._shapes = shapes
        self._masks: dict[tuple[ir.Value, ir.Value], ir.Value] = {}
        self._values: dict[tuple[Dim, ...], ir.Value] = {}

    def suffice(self, node: ir.Node, reader: ir.Node) -> bool:
        """Whether a reader of the map would find the same in the map of some rows of Q."""
        ranks = [len(self._shape(value)) for value in (node.inputs[0], _mask(node)) if value is not None]
        if reader.inputs[0] is not node.outputs[3] or 0 in ranks or not self._has_rows_of(_mask(node), node.inputs[0]):
            return False
        ours = reader.domain == DOMAIN and reader.op_type in (*_PLACES, "RowsAt")
        return _is_gather(reader) or (ours and set(ranks) == {4})

    def _shape(self, value: ir.Value | None) -> tuple[Dim, ...]:
        """Empty where it is not known."""
        return () if value is None else self._shapes.get(value.name or "", ())

    def _has_rows_of(self, mask: ir.Value | None, Q: ir.Value | None) -> bool:
        """Whether a mask is known to have a row for each query; onnxruntime takes no other."""
        if mask is None:
            return True
        rows, queries = self._shape(mask)[-2:-1], self._shape(Q)[-2:-1]
        return rows == queries and None not in rows

    def read(self, reader: ir.Node, node: ir.Node) -> None:
        """Let a reader of the map read of Q alone, or put the map of some rows of Q in its place."""
        Q, mask = node.inputs[0], _mask(node)
        assert Q is not None, "an op Attention has a Q"
        if reader.op_type in _PLACES:
            reader.replace_input_with(0, Q)
            return
        result, graph = reader.outputs[0], reader.graph
        assert isinstance(graph, ir.Graph)
        at = Insertion(graph, reader.metadata_props[SITE_KEY], anchor=reader)
        name = (result.name or "").removeprefix(f"{PREFIX}{at.scope}/")
        if mask is not None:
            mask = self._rows_of_mask(at, reader, mask, f"{name}/mask")
        rows = self._rows_of(at, reader, Q, f"{name}/queries")
        inputs = [rows, node.inputs[1], self._few_values(at, node, f"{name}/values"), mask]
        small = ir.Node("", "Attention", inputs, list(node.attributes.values()), num_outputs=4)
        small.name, small.metadata_props[SITE_KEY] = f"{PREFIX}{at.scope}/{name}/attention", at.scope
        for output, own in zip(small.outputs, (f"{small.name}/output", "", "", f"{small.name}/map"), strict=True):
            output.name = own
        small.outputs[3].type = node.outputs[3].type
        at.place(small)
        ir.convenience.replace_all_uses_with(result, small.outputs[3])
        graph.remove(reader, safe=True)

    def _few_values(self, at: Insertion, node: ir.Node, name: str) -> ir.Value:
        """One column of each head's V, or that of another V of its shape.

        The op wants some, nobody reads what becomes of it, and all double the cost.
        """
        V = node.inputs[_VALUES]
        assert V is not None, "an op Attention has a V"
        packed = len(self._shape(node.inputs[0])) == 3
        columns = node.attributes["kv_num_heads"].as_int() if packed else 1
        shape = (*self._shape(V)[:-1], columns)
        if len(shape) == 1 or None in shape or shape not in self._values:
            limits = [at.constant(f"first_{number}_columns", np.array([number])) for number in (0, columns)]
            self._values[shape] = at.op("Slice", V, *limits, at.constant("last_axis", np.array([-1])), name=name)
        return self._values[shape]

    def _rows_of_mask(self, at: Insertion, reader: ir.Node, mask: ir.Value, name: str) -> ir.Value:
        where = reader.inputs[1]
        assert where is not None
        if (mask, where) not in self._masks:
            self._masks[mask, where] = self._rows_of(at, reader, mask, name, own_heads=True)
        return self._masks[mask, where]

    def _rows_of(
        self, at: Insertion, reader: ir.Node, value: ir.Value, name: str, *, own_heads: bool = False
    ) -> ir.Value:
        """The rows that a reader takes of the map, of Q or of a mask, which may have other heads."""
        where = reader.inputs[1]
        assert where is not None
        if _is_gather(reader):
            axis = len(self._shape(value)) - 2
            return at.op("Gather", value, where, name=name, attributes=[ir.AttrInt64("axis", axis)])
        if own_heads:
            places = where.producer()
            assert places is not None, "places of rows are computed"
            landmarks = places.inputs[1]
            assert landmarks is not None
            where = at.call("LandmarkRows", value, landmarks, name=f"{name}_places")
        return at.call("RowsAt", value, where, name=name)


def _as_before(node: ir.Node) -> None:
    """Take back that a node was asked for its map."""
    forget_the_map(node)
    node.resize_outputs(int(node.metadata_props.pop(OUTPUTS_KEY)))


def _move_into(node: ir.Node, then: ir.Graph, otherwise: ir.Graph) -> None:
    """The node itself, asked for its map, into one branch; as it was before into the other."""
    unchanged = otherwise[0]
    twin = ir.Node("", "Attention", node.inputs, asked_before(node), num_outputs=1, name=unchanged.name)
    _exchange(otherwise, unchanged, twin)
    assert node.graph is not None
    node.graph.remove(node)
    then.insert_before(then[0], node)
    correction = _Correction.of(then, f"{_scope(node)}/then")
    if correction is not None and correction.leaves_nothing(node):
        correction.hold_back(node)


@dataclass(frozen=True)
class _Correction:
    """The nodes of one site's correction that a node makes superfluous where it holds values back itself."""

    graph: ir.Graph
    benign_values: ir.Node
    selected: ir.Node
    ours: frozenset[str]
    """The functions that it calls."""

    @classmethod
    def of(cls, graph: ir.Graph, scope: str) -> "_Correction | None":
        """The correction that is written in this graph, in this scope, if any is."""
        of_scope = (one for one in graph if one.metadata_props.get(SITE_KEY) == scope)
        ours = {one.op_type: one for one in of_scope if one.domain == DOMAIN}
        if "SelectFlagged" not in ours:
            return None
        return cls(graph, ours["BenignValues"], ours["SelectFlagged"], frozenset(ours))

    def leaves_nothing(self, node: ir.Node) -> bool:
        """Whether nothing of a flagged map's Y is left, nor moved between what it reads and writes and the node.

        Where tokens hand over their own values, rows that see flagged keys only keep theirs.
        """
        repaired = self.selected.inputs[0]
        maker = None if repaired is None else repaired.producer()
        moved = self.benign_values.inputs[0] is not node.inputs[_VALUES]
        return not moved and maker is not None and maker.op_type == "Redistributed" and "SomeBenign" not in self.ours

    def hold_back(self, node: ir.Node) -> None:
        """Give the node benign values; it comes behind them, and in place of their product and of the choice."""
        values, (repaired, *_) = self.benign_values.outputs[0], self.selected.inputs
        assert repaired is not None, "SelectFlagged reads what it selects from"
        (product,) = values.consumers()
        assert node.graph is not None, "the node is in a graph"
        node.graph.remove(node)
        self.graph.insert_after(self.benign_values, node)
        node.replace_input_with(_VALUES, values)
        ir.convenience.replace_all_uses_with(product.outputs[0], node.outputs[0])
        result = self.selected.outputs[0]
        ir.convenience.replace_all_uses_with(result, repaired, replace_graph_outputs=True)
        repaired.name, repaired.shape, repaired.type = result.name, result.shape, result.type
        self.graph.remove([product, self.selected], safe=True)


def _exchange(branch: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """Put another node in place of the only one of a branch."""
    own, other = old.outputs[0], new.outputs[0]
    new.metadata_props[SITE_KEY] = old.metadata_props[SITE_KEY]
    other.name, other.shape, other.type = own.name, own.shape, own.type
    branch.outputs[0] = other
    branch.remove(old, safe=True)
    branch.append(new)


def recall(model: ir.Model) -> None:
    """Bring back what `defer` moved into branches, in place; where both branches do not agree, nothing."""
    for conditional in [node for node in model.graph if node.op_type == "If" and SITE_KEY in node.metadata_props]:
        if conditional.attributes.keys() != {"then_branch", "else_branch"}:  # onnx's checker says so as well
            continue
        then, otherwise = _branches(conditional)
        moved = next((node for node in then if OUTPUTS_KEY in node.metadata_props), None)
        if moved is None or len(otherwise) != 1 or not _is_twin(otherwise[0], moved):
            continue
        _hand_out(moved)
        then.remove(moved)
        model.graph.insert_before(conditional, moved)
        unchanged = ir.Node("", "Identity", [moved.outputs[0]], name=otherwise[0].name)
        _exchange(otherwise, otherwise[0], unchanged)
    for node in [node for node in model.graph if OUTPUTS_KEY in node.metadata_props]:
        _hand_out(node)


def recalled(model: ir.Model) -> ir.Model:
    """A copy with what `defer` moved where it was."""
    copied = graphs.copy(model)
    recall(copied)
    return copied


def _all_values(moved: ir.Node) -> ir.Value | None:
    """The values that a node has, whether it holds some back or not: `BenignValues` reads them first, inlined too."""
    value = moved.inputs[_VALUES] if len(moved.inputs) > _VALUES else None
    if value is None or not (value.name or "").endswith(f"/{_BENIGN}"):
        return value
    maker = value.producer()
    scope = None if maker is None else maker.metadata_props.get(SITE_KEY)
    while scope and value and (maker := value.producer()) and maker.metadata_props.get(SITE_KEY) == scope:
        value = maker.inputs[0] if maker.inputs else None
    return value


def _hand_out(moved: ir.Node) -> None:
    """Give a node that holds values back all of them again, and let one of ours hold them back in its place."""
    values = _all_values(moved)
    if values is None or moved.inputs[_VALUES] is values:
        return
    held_back, graph = moved.inputs[_VALUES], moved.graph
    assert held_back is not None
    assert isinstance(graph, ir.Graph)
    maker = held_back.producer()
    assert maker is not None, "benign values are computed"
    name = (held_back.name or "").removesuffix("_values")
    ours = ir.Node("", "Attention", moved.inputs, asked_before(moved), num_outputs=1, name=name)
    ours.metadata_props[SITE_KEY] = maker.metadata_props[SITE_KEY]
    ours.outputs[0].name = ours.name
    graph.insert_before(moved, ours)
    ir.convenience.replace_all_uses_with(moved.outputs[0], ours.outputs[0])
    moved.replace_input_with(_VALUES, values)


def _is_twin(node: ir.Node, moved: ir.Node) -> bool:
    """Whether a node computes what the other one did before it was asked for its map, and may have held values back."""
    try:
        before = {attribute.name: attribute for attribute in asked_before(moved)}
    except ValueError:  # a mode that is no number: the file was edited
        return False
    inputs = [*moved.inputs]
    inputs[_VALUES:_MASK] = [_all_values(moved)]
    return (
        node.op_identifier() == moved.op_identifier()
        and list(node.inputs) == inputs
        and {name: attribute.value for name, attribute in node.attributes.items()}
        == {name: attribute.value for name, attribute in before.items()}
    )
