"""Is the second pass of a joint decision the base once more? Node by node, nothing is run.

A copied node does what the base's node does, and reads the copies of what that reads, where there are copies; a node of
the base that reads something copied, and that outputs depend on, has a copy. What stands between, the repaired outputs
of sites and edited hidden units, is ours and is held against the numpy reference where numbers are checked.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.emission import MODE
from atpatch_onnx.baking.metadata import PatchRecord
from atpatch_onnx.baking.second_pass import needed, read, unfold
from atpatch_onnx.graph.names import SITE_KEY, again, base_name, first_name, output_scope


def differences(patched: ir.Model, record: PatchRecord) -> Iterator[str]:
    """What of the second pass is not the base, in words."""
    if record.joint is None:
        return
    flat = graphs.copy(patched)
    unfold(flat)
    passes = _Passes.of(flat, record)
    wanted = needed([passes.values[name] for name in passes.outputs if name in passes.values], flat.graph)
    for node in flat.graph:
        if SITE_KEY not in node.metadata_props and node in wanted:
            yield from passes.compare(node)
    for name in record.joint.outputs:
        chosen = passes.values.get(name)
        producer = None if chosen is None else chosen.producer()
        if producer is None or again(name) not in _names_behind(producer):
            yield f"the output {name!r} does not come from the second pass"


def _names_behind(node: ir.Node) -> set[str]:
    """The names of what a node reads, and of what is cast and chosen for that by nodes of ours."""
    found = {value.name or "" for value in read(node)}
    for before in (value.producer() for value in read(node)):
        if before is not None and SITE_KEY in before.metadata_props and before.op_type in ("Where", "Cast"):
            found |= _names_behind(before)
    return found


@dataclass(frozen=True)
class _Passes:
    """Both passes of a flat graph."""

    values: Mapping[str, ir.Value]
    """Of all graphs, by name."""

    outputs: Mapping[str, str]
    """The names of the model's outputs by those that the base's own values have."""

    sites: Mapping[str, str]
    """By the names of the redistributing sites' outputs in the base, those that the second pass gives before repair."""

    @classmethod
    def of(cls, model: ir.Model, record: PatchRecord) -> "_Passes":
        assert record.joint is not None
        values = [value for graph in model.graphs() for node in graph for value in node.outputs]
        values += [value for graph in model.graphs() for value in (*graph.inputs, *graph.initializers.values())]
        return cls(
            values={value.name: value for value in values if value.name},
            outputs={base_name(output_scope(number)): name for number, name in enumerate(record.joint.outputs)},
            sites={first_name(site.output): site.base_output for site in record.sites if site.value is not None},
        )

    def compare(self, node: ir.Node) -> Iterator[str]:
        """What the copy of a node does otherwise, if there has to be one."""
        copies = [self._computed(value) for value in node.outputs if value.name]
        names = {self._base_name(value) for value in node.outputs}
        if all(copy is None for copy in copies):
            if any(self._read_again(value) != value.name for value in read(node)) or names & set(self.sites):
                yield f"the node {node.name!r} is not in the second pass"
            return
        producers = {copy.producer() for copy in copies if copy is not None}
        copied = producers.pop()
        if producers or copied is None or not self._alike(node, copied):
            yield f"the node {node.name!r} is another one in the second pass"

    def _base_name(self, value: ir.Value) -> str:
        """What a value is called in the base."""
        return self.outputs.get(value.name or "", value.name or "")

    def _computed(self, value: ir.Value) -> ir.Value | None:
        """What the second pass computes for a value of the first."""
        name = self._base_name(value)
        return self.values.get(self.sites.get(name, again(name)))

    def _read_again(self, value: ir.Value) -> str:
        """The name of what the second pass reads instead of a value of the first."""
        name = again(self._base_name(value))
        return name if name in self.values else value.name or ""

    def _alike(self, node: ir.Node, copied: ir.Node) -> bool:
        """Whether a copied node is the node, as far as it has to be."""
        if node.op_identifier() != copied.op_identifier() or len(node.inputs) != len(copied.inputs):
            return False
        for value, other in zip(node.inputs, copied.inputs, strict=True):
            if (None if value is None else self._read_again(value)) != (None if other is None else other.name):
                return False
        # asked for its map, in one of the passes or in both
        names = {name for one in (node, copied) for name in one.attributes if name != MODE}
        return all(
            name in node.attributes
            and name in copied.attributes
            and self._same(node.attributes[name], copied.attributes[name])
            for name in names
        )

    def _same(self, attribute: ir.Attr, other: ir.Attr) -> bool:
        if attribute.type is ir.AttributeType.GRAPH and other.type is ir.AttributeType.GRAPH:
            return self._same_graph(attribute.as_graph(), other.as_graph())
        if attribute.type is ir.AttributeType.GRAPHS:
            return False  # no operator has them
        one, two = (ir.serde.serialize_attribute(each).SerializeToString() for each in (attribute, other))
        return bool(one == two)

    def _same_graph(self, graph: ir.Graph, other: ir.Graph) -> bool:
        nodes = list(zip(graph, other, strict=False))
        weights = [list(one.initializers.values()) for one in (graph, other)]
        return (
            len(graph) == len(other)
            and [self._read_again(value) for value in graph.outputs] == [value.name for value in other.outputs]
            and [self._read_again(value) for value in weights[0]] == [value.name for value in weights[1]]
            and all(_equal(*pair) for pair in zip(*weights, strict=True))
            and all(self._alike(*pair) for pair in nodes)
            and all(
                [self._read_again(value) for value in one.outputs if value.name]
                == [value.name for value in two.outputs if value.name]
                for one, two in nodes
            )
        )


def _equal(value: ir.Value, other: ir.Value) -> bool:
    """Whether two weights of subgraphs are the same."""
    one, two = value.const_value, other.const_value
    return one is not None and two is not None and one.dtype == two.dtype and one.tobytes() == two.tobytes()
