"""From a torch module."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from atpatch_onnx.baking.bake import bake
from atpatch_onnx.errors import MissingExtraError
from atpatch_onnx.exporters.exporting import exporting, require_inference
from atpatch_onnx.patches.patch import Patch

if TYPE_CHECKING:
    import torch


def from_torch(
    module: "torch.nn.Module",
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    opset: int | None = None,
    dynamic_shapes: Any = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    patch: Patch | None = None,
    target: str = "cpu",
) -> ir.Model:
    """A torch module as an ONNX model, patched where a patch is given.

    Two exports of one module with the same arguments have the same fingerprint, so that a patch fitted on the first is
    baked into the second. The weights stay in memory and are the module's own tensors: save the model before training
    the module any further.

    Args:
        module: The module, in inference mode.
        args: Sample inputs by position: tensors, of the shapes that the graph shall take.
        kwargs: Sample inputs by name.
        opset: Version of the ONNX operators; None: torch's default. From 23 on attention is the op `Attention`.
        dynamic_shapes: Which axes vary, as in `torch.onnx.export`, e.g. `({0: "batch"},)`; None: none does.
        input_names: Names of the graph's inputs; None: those of the arguments of `forward`.
        output_names: Names of the graph's outputs; None: torch's.
        patch: The fix to bake in; None: the base.
        target: Where the patched model will run, a key of `TARGETS`.

    Raises:
        MissingExtraError: torch is not installed.
        ExportError: The module is in training mode, or torch cannot export it with these inputs.
        BakeError: The target is unknown, or the opset is too old.
        PatchMismatchError: The patch was fitted on another model.
    """
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("torch", "fit", "exporting a torch module") from error
    what = f"the export of {type(module).__name__}"
    require_inference(module, what)
    with exporting(what):
        program = torch.onnx.export(
            module,
            tuple(args),
            kwargs=None if kwargs is None else dict(kwargs),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            dynamic_shapes=dynamic_shapes,
            input_names=input_names,
            output_names=output_names,
        )
    assert program is not None, "with dynamo=True torch returns the program"
    return program.model if patch is None else bake(program.model, patch, target=target)
