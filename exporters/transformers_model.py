"""From a transformers model, in memory or as `save_pretrained` wrote it."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from atpatch_onnx.errors import require
from atpatch_onnx.exporters.exporting import ExportError, require_inference
from atpatch_onnx.patches.patch import Patch

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.exporters import OnnxConfig


def from_transformers(
    model: "PreTrainedModel",
    inputs: Mapping[str, Any],
    *,
    config: "OnnxConfig | None" = None,
    patch: Patch | None = None,
    target: str = "cpu",
) -> ir.Model:
    """A transformers model as transformers' own `OnnxExporter` writes it, patched where a patch is given.

    Two exports of one model with the same inputs and config have the same fingerprint: a patch fitted on what this
    returns can be baked by `AtPatchOnnxConfig(patch=...)` with the same other fields. The weights stay in memory and
    are the model's own tensors: save the result before training the model any further.

    Args:
        model: The model, in inference mode.
        inputs: Sample inputs, as for `model(**inputs)`: tensors, of the shapes that the graph shall take.
        config: How to export, e.g. `OnnxConfig(dynamic=True, opset_version=23)`; None: static shapes, default opset.
            Of an `AtPatchOnnxConfig` only the fields of `OnnxConfig` count.
        patch: The fix to bake in; None: the base.
        target: Where the patched model will run, a key of `TARGETS`.

    Raises:
        MissingExtraError: transformers or torch is not installed.
        ExportError: The model is in training mode, cannot be exported with these inputs, or the config holds a patch.
        BakeError: The opset is too old.
        PatchMismatchError: The patch was fitted on another model.
    """
    from atpatch_onnx.exporters.transformers_backend import AtPatchOnnxConfig, AtPatchOnnxExporter

    require_inference(model, f"the export of {type(model).__name__}")
    if getattr(config, "patch", None) is not None:
        raise ExportError(
            "config",
            expected="a config without a patch",
            found="an AtPatchOnnxConfig with one",
            advice="Give the patch as patch=, or export with AtPatchOnnxExporter.",
        )
    how = {}
    if config is not None:
        names = {field.name for field in dataclasses.fields(AtPatchOnnxConfig)}
        how = {name: getattr(config, name) for name in names - {"export_format", "patch", "target", "monitor"}}
    exported = AtPatchOnnxExporter().export(model, inputs, AtPatchOnnxConfig(**how, patch=patch, target=target))
    program: ir.Model = exported.program
    return program


def from_pretrained(
    folder: str | os.PathLike[str],
    inputs: str | os.PathLike[str],
    *,
    dynamic: bool = True,
    opset: int | None = None,
    patch: Patch | None = None,
    target: str = "cpu",
) -> ir.Model:
    """A transformers model from disk, with the head that it was saved with; nothing is downloaded, no code is run.

    Args:
        folder: What `save_pretrained` wrote.
        inputs: An `.npz` file of sample inputs by name.
        dynamic: Leave batch and sequence axes free.
        opset: ONNX opset; None: the exporter's own.
        patch: The fix to bake in; None: the base.
        target: Where the patched model will run, a key of `TARGETS`.

    Raises:
        MissingExtraError: transformers or torch is not installed.
        ExportError: The folder holds no such model, the file no arrays, or the model cannot be exported.
        BakeError: The opset is too old.
        PatchMismatchError: The patch was fitted on another model.
    """
    require("transformers", "transformers", "exporting a transformers model")
    import torch
    import transformers
    from transformers.exporters import OnnxConfig

    folder, inputs = Path(folder), Path(inputs)
    try:
        if not (folder / "config.json").is_file():  # transformers would take the path for the name of a hub's model
            raise OSError("no config.json")
        architecture = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).architectures[0]
        model = getattr(transformers, architecture).from_pretrained(folder, local_files_only=True).eval()
    except (OSError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise ExportError(
            str(folder),
            expected="a transformers model with its architecture and weights",
            found=f"{type(error).__name__}: {error}",
            advice="Give the folder that model.save_pretrained wrote.",
        ) from error
    try:
        with np.load(inputs, allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(np.array(arrays[name])) for name in arrays.files}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ExportError(
            str(inputs),
            expected="an .npz file of sample inputs by name",
            found=f"{type(error).__name__}: {error}",
            advice="Write it with numpy.savez(file, pixel_values=...).",
        ) from error
    config = OnnxConfig(dynamic=dynamic, opset_version=opset)
    return from_transformers(model, tensors, config=config, patch=patch, target=target)
