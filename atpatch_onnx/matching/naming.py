"""Recognisable names for sites, the same for every way of export that leaves the module path in the graph."""

import ast
from collections.abc import Iterable

import onnx_ir as ir

_WRAPPERS = {"", "m", "model", "module", "_orig_mod", "wrapped", "wrapper", "inner"}
"""Leading path components that come from wrapping a model for export; they differ between ways of export."""


def site_names(nodes: Iterable[tuple[ir.Node, ...]]) -> list[str]:
    """A unique name for each site, from its nodes (the anchor first)."""
    names: list[str] = []
    for index, group in enumerate(nodes):
        wanted = next((scope for node in group if (scope := module_path(node))), "") or f"site_{index}"
        name, count = wanted, 1
        while name in names:
            count += 1
            name = f"{wanted}_{count}"
        names.append(name)
    return names


def module_path(node: ir.Node) -> str:
    """The path of the module that the node was exported from, without wrappers; empty where the graph does not say."""
    parts = _parts(node)
    while parts and parts[0] in _WRAPPERS:
        parts = parts[1:]
    return ".".join(parts)


def _parts(node: ir.Node) -> list[str]:
    scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if scopes:
        try:
            path = ast.literal_eval(scopes)
        except (SyntaxError, ValueError):
            path = []
        if isinstance(path, list) and len(path) > 1:
            return str(path[-2]).split(".")
    namespace = node.metadata_props.get("namespace", "").split("/")
    if len(namespace) > 1:
        return namespace[-2].split(":")[0].split(".")
    if node.name and node.name.startswith("/"):  # the TorchScript exporter: /vit/layers.0/attention/Softmax
        return ".".join(node.name.split("/")[1:-1]).split(".")
    return []
