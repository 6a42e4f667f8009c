"""From a transformers model."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from atpatch_onnx.exporters.exporting import ExportError, require_inference
from atpatch_onnx.patch import Patch

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
        target: Where the patched model will run, a key of `bake.TARGETS`.

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
