"""Models as all rooms work with them: read from their files, old ones lifted, with the libraries that they need."""

import os
from collections.abc import Sequence

import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.graph import ModelOrPath
from atpatch_onnx.graph.names import MIN_OPSET
from atpatch_onnx.graph.parts import LIFTED_IR, copy, opset_version, with_custom_ops

Libraries = Sequence[str | os.PathLike[str]]
"""Shared libraries with custom operators."""


def load(path: str | os.PathLike[str], *, custom_ops: Libraries = ()) -> ir.Model:
    """Read an `.onnx` file. Weights in external data stay on disk.

    A file that is too old to be patched (before opset 13, or IR version 4) is lifted by onnx's version converter, where
    onnxruntime then computes the same bits of drawn inputs; else it stays as it is, and can be looked at only.

    Args:
        path: The file.
        custom_ops: Libraries with operators that are not onnxruntime's own, such as onnxruntime-extensions' tokenizers
            (`onnxruntime_extensions.get_library_path()`). Their code is run wherever the model is.

    Raises:
        ModelFileError: The file is missing, truncated or no ONNX model, readers could understand it differently, or its
            external data is missing, shorter than the model says, or outside the model's folder.
        RunError: A library is not one that onnxruntime loads.
    """
    model = with_custom_ops(graphs.load(path), custom_ops)
    if opset_version(model) >= MIN_OPSET and model.ir_version >= LIFTED_IR:
        return model
    from atpatch_onnx.running.lifting import lifted  # which runs models: most need not

    return lifted(model)


def as_model(model: ModelOrPath, custom_ops: Libraries = ()) -> ir.Model:
    """A model as it is, or read from its path; with these libraries as well."""
    if not isinstance(model, ir.Model):
        return load(model, custom_ops=custom_ops)
    return with_custom_ops(copy(model), custom_ops) if custom_ops else model
