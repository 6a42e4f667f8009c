"""The manifest of a patched file for the terminal: what was added, node by node, and what its fit measured."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from atpatch_onnx.provenance.manifest import Manifest
from atpatch_onnx.report import text
from atpatch_onnx.report.rows import NONE, shown
from atpatch_onnx.report.tables import FOLD, RIGHT, Columns, table, texts


def manifest_view(manifest: Manifest, signed: str) -> Group:
    """All of it; `signed` says by whom, or that it is not."""
    record = manifest.record
    facts = [
        ("Written", "with If" if record.conditional else "without If"),
        ("Added outputs", ", ".join(record.monitors) or "none"),
        ("Nodes", f"{len(manifest.nodes)} added to the base's {manifest.base_nodes}"),
        ("Weights", f"{len(manifest.weights)} added, {sum(one.bytes for one in manifest.weights):,} bytes"),
        *((f"SHA-256 of {name}", digest) for name, digest in manifest.files.items()),
        ("Signed", signed),
    ]
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for fact in facts:
        grid.add_row(*texts(map(shown, fact)))
    blank: RenderableType = Text("")
    parts = [grid, blank, _nodes(manifest), blank, _weights(manifest), blank, text.fit_summary(record)]
    return Group(*parts)


def _nodes(manifest: Manifest) -> Table:
    columns: Columns = {"Node": {**FOLD, "ratio": 2}, "Operator": {}, "Site": FOLD, "Read in place of": FOLD}
    cells = (
        (shown(node.name), shown(node.operator), shown(node.site) or NONE, shown(node.replaces or NONE))
        for node in manifest.nodes
    )
    return table("Nodes that were added", columns, cells)


def _weights(manifest: Manifest) -> Table:
    columns: Columns = {"Weight": {**FOLD, "ratio": 2}, "Type": {}, "Shape": FOLD, "Bytes": RIGHT}
    cells = (
        (shown(one.name), shown(one.dtype.lower()), shown(list(one.shape)), f"{one.bytes:,}")
        for one in manifest.weights
    )
    return table("Weights that were added", columns, cells)
