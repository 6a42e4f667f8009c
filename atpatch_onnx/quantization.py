"""What a quantizer has to be told so that detector and redistribution stay as they were fitted: in float32.

onnxruntime's quantizers pick nodes of the main graph by operator and name, those within branches if they are asked to
(`EnableSubgraph`), and never look into model-local functions. So the settings name each of our nodes in the graph and
its branches, calls of functions included; the bodies of functions need no names.
"""

import json
import os
from pathlib import Path

import onnx_ir as ir

from atpatch_onnx.errors import AtPatchError, BakeError
from atpatch_onnx.functions import local_functions
from atpatch_onnx.graph import PREFIX, opset_version
from atpatch_onnx.insertion import SITE_KEY

OP_TYPES = ("MatMul",)
"""What may be quantized: onnxruntime writes a graph that does not load for ai.onnx `Attention`, one of its defaults."""


def quantizer_settings(patched: ir.Model) -> dict[str, list[str]]:
    """Keyword arguments for onnxruntime's quantizers, which leave all that `bake` added in float32.

    Ask for them with the very file that will be quantized: other tools rename nodes. Ours are told by their names under
    `atpatch/`, by their mark in the metadata, or, where onnxruntime put the body of a function into the graph, by the
    name it gives such nodes.

    Args:
        patched: A patched model, as baked or optimized by another tool since.

    Returns:
        `op_types_to_quantize` and `nodes_to_exclude`, the latter in graph order. JSON can hold them.

    Raises:
        BakeError: No node of the model is ours.
    """
    prefixes = (PREFIX, *(f"_inlfunc_{name}_" for name in local_functions(opset_version(patched))))
    names = [
        node.name
        for node in patched.graph.all_nodes()
        if node.name and (SITE_KEY in node.metadata_props or node.name.startswith(prefixes))
    ]
    if not names:
        raise BakeError(
            "the model",
            expected=f"a patched model, with nodes under {PREFIX!r}",
            found="none",
            advice="Bake a patch first; the base needs no settings.",
        )
    return {"op_types_to_quantize": list(OP_TYPES), "nodes_to_exclude": list(dict.fromkeys(names))}


def write_settings(patched: ir.Model, path: str | os.PathLike[str]) -> None:
    """Write `quantizer_settings` to a JSON file, for `quantize_dynamic(..., **json.load(file))`.

    Raises:
        AtPatchError: The file cannot be written.
        BakeError: No node of the model is ours.
    """
    text = json.dumps(quantizer_settings(patched), indent=2) + "\n"
    try:
        Path(path).write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise AtPatchError(
            str(path), expected="a place that can be written to", found=str(error), advice="Choose another path."
        ) from error
