"""Which patched files a session can exchange the fix of."""

import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.metadata import PatchRecord
from atpatch_onnx.errors import ServingError
from atpatch_onnx.graph.names import FLAGGED

_PLAIN = "Serve the file with onnxruntime's own session."


def require_servable(path: str, model: ir.Model, record: PatchRecord) -> None:
    """Refuse a patched file in which there is nothing to count, switch or exchange.

    Raises:
        ServingError: It edits hidden units alone, was baked without monitoring outputs, or is made of two graphs.
    """
    if not record.detects:
        raise ServingError(
            path,
            expected="a patch of the attention",
            found="edits of hidden units alone, which flag nothing that could be counted or switched",
            advice=_PLAIN,
        )
    if FLAGGED not in record.monitors:
        raise ServingError(
            path,
            expected=f"the monitoring output {FLAGGED}",
            found="a patch baked without it",
            advice="Bake the patch again with monitoring outputs.",
        )
    if graphs.branches(model) is not None:
        raise ServingError(
            path,
            expected="one graph",
            found="two under an If, whose weights no session can exchange",
            advice=f"Serve the two graphs as two files. {_PLAIN}",
        )
