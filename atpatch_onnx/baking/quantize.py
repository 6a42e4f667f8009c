"""Quantized models, with a detector and a redistribution that stay as they were fitted: in float32.

A base is quantized first, and the patch baked into the result. Where the patch is in the file already, quantizers have
to be told what to leave alone (`quantizer_settings`).

onnxruntime's quantizers pick nodes of the main graph by operator and name, those within branches if they are asked to
(`EnableSubgraph`). So the settings name each of our nodes in the graph and its branches.
"""

import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import onnx
import onnx_ir as ir
from onnxruntime.quantization import QuantType, quantize_dynamic
from onnxruntime.transformers.float16 import convert_float_to_float16

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.metadata import is_patched
from atpatch_onnx.errors import AtPatchError, BakeError, PatchMismatchError
from atpatch_onnx.files import write_whole
from atpatch_onnx.graph.names import PREFIX, SITE_KEY
from atpatch_onnx.matching.hidden import find_hidden_layers
from atpatch_onnx.patches.patch import Patch

Precision = Literal["int8", "fp16"]
"""int8: weights of products, activations quantized as they come. fp16: weights and arithmetic."""

OP_TYPES = ("MatMul",)
"""What may be quantized: onnxruntime writes a graph that does not load for ai.onnx `Attention`, one of its defaults."""


def quantizer_settings(patched: ir.Model) -> dict[str, list[str]]:
    """Keyword arguments for onnxruntime's quantizers, which leave all that `bake` added in float32.

    Ask for them with the very file that will be quantized: other tools rename nodes. Ours are told by their names under
    `atpatch/`, or by their mark in the metadata.

    Args:
        patched: A patched model, as baked or optimized by another tool since.

    Returns:
        `op_types_to_quantize` and `nodes_to_exclude`, the latter in graph order. JSON can hold them.

    Raises:
        BakeError: No node of the model is ours.
    """
    names = [
        node.name
        for node in patched.graph.all_nodes()
        if node.name and (SITE_KEY in node.metadata_props or node.name.startswith(PREFIX))
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
        write_whole(Path(path), text.encode())
    except OSError as error:
        raise AtPatchError(
            str(path), expected="a place that can be written to", found=str(error), advice="Choose another path."
        ) from error


def quantize(base: ir.Model, precision: Precision = "int8") -> ir.Model:
    """A base as onnxruntime's own tools quantize it. A patch is baked into the result (`rebind`), and stays in float32.

    Dynamic int8 has one scale for a whole batch, so there a sample's result depends on its batch-mates, with a patch
    or without.

    Args:
        base: The model, without a patch.
        precision: `int8` or `fp16`; inputs and outputs stay float32.

    Raises:
        BakeError: The model is patched, or the tool fails.
    """
    if precision not in get_args(Precision):
        raise BakeError(
            "precision", expected=" or ".join(get_args(Precision)), found=repr(precision), advice="Choose one of them."
        )
    if is_patched(base):
        raise BakeError(
            "the model",
            expected="a base, into which the patch is baked once it is quantized",
            found="a patched model",
            advice="Unbake it first; or quantize it yourself, with what `bake --quantizer-settings` writes.",
        )
    try:
        quantized = ir.from_proto(_TOOLS[precision](_with_weights(base)))
        quantized.graph.sort()  # the float16 tool puts its casts of inputs behind all else
        return quantized
    except Exception as error:  # onnxruntime's tools raise what comes
        raise BakeError(
            "the model",
            expected=f"a model that onnxruntime's {precision} tool takes",
            found=" ".join(str(error).split())[:400],
            advice="Quantize it with onnxruntime alone first.",
        ) from error


def rebind(patch: Patch, base: ir.Model, quantized: ir.Model) -> Patch:
    """The same patch, for `quantized` instead of the base it was fitted on.

    Its thresholds were calibrated on the base: measure again what it does (`evaluate`).

    Args:
        patch: Fitted on `base`.
        base: What was quantized.
        quantized: What `quantize` made of it.

    Raises:
        PatchMismatchError: The patch was fitted on another model, or edits hidden units of layers that are not found in
            the quantized one.
    """
    found = graphs.fingerprint(base)
    if patch.base != found:
        raise PatchMismatchError(
            f"patch {patch.id}",
            expected=f"the model it was fitted on, {patch.base}",
            found=f"a model with the fingerprint {found}",
            advice="Quantize the model that it was fitted on.",
        )
    hidden = {layer.name for layer in find_hidden_layers(quantized)} if patch.edits else set()
    lost = [edit.layer for edit in patch.edits if edit.layer not in hidden]
    if lost:
        raise PatchMismatchError(
            "the quantized model",
            expected=f"the hidden layer {lost[0]!r}",
            found=", ".join(sorted(hidden)) or "none: products in int8 are not looked behind",
            advice="Neuron edits go with float16 (--precision fp16); for int8, patch the attention alone.",
        )
    return replace(patch, base=graphs.fingerprint(quantized))


def _with_weights(model: ir.Model) -> onnx.ModelProto:
    """The model with its external data read, and without shapes of weights."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        graphs.save(model, path, external="copy")
        return _without_weights_shapes(onnx.load(path))


def _without_weights_shapes(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The same, in place: torch declares shapes of weights, and the quantizer transposes some."""
    weights = {tensor.name for tensor in proto.graph.initializer}
    kept = [value for value in proto.graph.value_info if value.name not in weights]
    del proto.graph.value_info[:]
    proto.graph.value_info.extend(kept)
    return proto


def int8(proto: onnx.ModelProto, **settings: Any) -> onnx.ModelProto:
    """What onnxruntime's dynamic quantizer makes of a model, whose shapes of weights are taken away; int8 weights."""
    logging.disable(logging.WARNING)  # it asks for its preprocessing each time
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "int8.onnx"
            quantize_dynamic(_without_weights_shapes(proto), path, weight_type=QuantType.QInt8, **settings)
            return onnx.load(path)
    finally:
        logging.disable(logging.NOTSET)


_TOOLS: Mapping[str, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
    "int8": partial(int8, op_types_to_quantize=list(OP_TYPES)),
    "fp16": partial(convert_float_to_float16, keep_io_types=True),
}
