"""How many kernels a patch adds to a run: what it costs on a device, where launching one takes longer than its work.

| node | counted as |
|---|---|
| `Reshape`, `Squeeze`, `Unsqueeze` | none: another view of the same tensor |
| `Shape`, and what is computed of sizes alone | none: sizes are known to the host |
| any other of the main graph, an `If` too | one |
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from atpatch_onnx.baking.metadata import read_record
from atpatch_onnx.graph.names import MONITOR, SITE_KEY
from atpatch_onnx.graph.values import find_value

VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze"})

_SIZES = frozenset({"Shape", "Size"})


@dataclass(frozen=True)
class SiteKernels:
    """Of one site."""

    site: str
    detecting: int
    """Its score over its threshold, of every token."""

    carrying: int
    """The larger of this and the earlier sites'."""

    redistributing: int
    """Flags, and neutral tokens in place."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.detecting + self.carrying + self.redistributing


@dataclass(frozen=True)
class Kernels:
    """Of a whole patch."""

    sites: tuple[SiteKernels, ...]
    edits: int
    """Of hidden units."""

    monitors: int
    """Of the outputs that say what was flagged."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(site.total for site in self.sites) + self.edits + self.monitors

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        sites = {
            one.site: {
                "detecting": one.detecting,
                "carrying": one.carrying,
                "redistributing": one.redistributing,
            }
            for one in self.sites
        }
        return {"total": self.total, "sites": sites, "edits": self.edits, "monitors": self.monitors}


def kernels(model: ir.Model) -> Kernels:
    """Count those of a patched model.

    Raises:
        UnbakeError: It is not patched.
    """
    record = read_record(model)
    by_scope = launched(model.graph)
    layers = [layer.scope for layer in record.layers]
    return Kernels(
        sites=of_sites(model.graph, {site.site: (site.own, site.margin) for site in record.sites}),
        edits=sum(len(by_scope.get(scope, ())) for scope in layers),
        monitors=len(by_scope.get(MONITOR, ())),
    )


def of_sites(graph: ir.Graph, values: Mapping[str, tuple[str | None, str]]) -> tuple[SiteKernels, ...]:
    """Of some patched sites.

    Args:
        graph: With the patch in it.
        values: By site the names of its own margin, where it detects, and of the carried one.
    """
    by_scope, found = launched(graph), []
    for site, (own, margin) in values.items():
        nodes = by_scope.get(site, set())
        detecting = set() if own is None else nodes & _behind(find_value(graph, own))
        carried = detecting if own is None else nodes & _behind(find_value(graph, margin))
        counts = len(detecting), len(carried - detecting), len(nodes - carried - detecting)
        found.append(SiteKernels(site, *counts))
    return tuple(found)


def launched(graph: ir.Graph) -> dict[str, set[ir.Node]]:
    """The nodes of a patch that are kernels, by the scope of their names: a site, or another."""
    sizes, found = sizes_of(graph), dict[str, set[ir.Node]]()
    for node in graph:
        if SITE_KEY in node.metadata_props and node.op_type not in VIEWS and node not in sizes:
            found.setdefault(node.metadata_props[SITE_KEY], set()).add(node)
    return found


def sizes_of(graph: Iterable[ir.Node]) -> frozenset[ir.Node]:
    """The nodes of a patch that compute sizes: `Shape`, and what is made of nothing else and of weights.

    `Expand` is none of them: what it spreads to a size is a tensor of the device.
    """
    found: set[ir.Node] = set()
    for node in graph:
        if SITE_KEY not in node.metadata_props:
            continue
        inputs = [value for value in node.inputs if value is not None and value.const_value is None]
        of_sizes = bool(inputs) and all(value.producer() in found for value in inputs)
        if node.op_type in _SIZES or (of_sizes and node.op_type != "Expand"):
            found.add(node)
    return frozenset(found)


def _behind(value: ir.Value) -> set[ir.Node]:
    """The nodes of a patch that a value is computed by, without those of the base between them."""
    pending, found = [value.producer()], set[ir.Node]()
    while pending:
        node = pending.pop()
        if node is not None and SITE_KEY in node.metadata_props and node not in found:
            found.add(node)
            pending += [other.producer() for other in node.inputs if other is not None]
    return found
