"""From an `.onnx` file."""

import os

import onnx_ir as ir

from atpatch_onnx.baking.bake import bake
from atpatch_onnx.patches.patch import Patch
from atpatch_onnx.running.opening import load


def from_onnx(path: str | os.PathLike[str], *, patch: Patch | None = None, target: str = "cpu") -> ir.Model:
    """The model in an `.onnx` file, patched where a patch is given. Weights in external data stay on disk.

    Args:
        path: The file; external data lies beside it.
        patch: The fix to bake in; None: the base as it is.
        target: Where the patched model will run, a key of `TARGETS`.

    Raises:
        ModelFileError: The file is missing, damaged, or its external data is not where it may be.
        BakeError: The target is unknown, or the model is patched already.
        PatchMismatchError: The patch was fitted on another model.
    """
    model = load(path)
    return model if patch is None else bake(model, patch, target=target)
