"""A backend of transformers' export framework: `OnnxExporter`, followed by baking a patch.

Importing this module registers it, so that transformers' auto classes know the format `atpatch_onnx`:

    import atpatch_onnx.exporters.transformers_backend

    exported = AutoHfExporter.from_config(AtPatchOnnxConfig(patch="fix.safetensors")).export(model, inputs)
    exported.save_pretrained("patched")
    ExportedModel.from_pretrained("patched")(**inputs)["atpatch/flagged"]
"""

import json
import os
import weakref
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from atpatch_onnx.baking.bake import bake
from atpatch_onnx.baking.targets import TARGETS
from atpatch_onnx.errors import MissingExtraError, PatchMismatchError
from atpatch_onnx.exporters.exporting import ExportError, exporting
from atpatch_onnx.graph.names import PREFIX
from atpatch_onnx.patches.patch import Patch

try:
    import torch  # noqa: F401 - transformers imports without it, but has no exporter then
    from transformers.exporters import OnnxConfig, OnnxExporter
    from transformers.exporters.auto import EXPORT_BACKENDS, register_backend
    from transformers.exporters.runners.runner_onnx import OnnxModelRunner
    from transformers.utils import ModelOutput
except ImportError as error:
    raise MissingExtraError("transformers", "transformers", "exporting a transformers model") from error

EXPORT_FORMAT = "atpatch_onnx"
"""The name that transformers knows this backend by, also in the `export.json` of a saved export."""

_asked: ContextVar["weakref.ref[AtPatchOnnxConfig] | None"] = ContextVar("_asked", default=None)


class _ExportFormat:
    """The field `export_format` of a config; reading it leaves the config for the exporter that is made next.

    transformers' `AutoHfExporter.from_config(config)` reads the format, makes the exporter and does not hand the config
    on: it is wanted once more, in `export(model, inputs, config)`. With this, `export(model, inputs)` does as well.
    """

    def __get__(self, config: "AtPatchOnnxConfig | None", owner: type) -> str:
        if config is not None:
            _asked.set(weakref.ref(config))
        return EXPORT_FORMAT

    def __set__(self, config: "AtPatchOnnxConfig", value: str) -> None:
        if value != EXPORT_FORMAT:
            raise ExportError(
                "export_format",
                expected=repr(EXPORT_FORMAT),
                found=repr(value),
                advice="Use the config of that format instead, e.g. OnnxConfig.",
            )
        config.__dict__["export_format"] = value  # where to_dict and to_json_string look


@dataclass
class AtPatchOnnxConfig(OnnxConfig):  # type: ignore[misc]  # transformers is not typed
    """How to export a patched model: everything of `OnnxConfig`, and the patch.

    Raises:
        ExportError: A field has a value that is not allowed; the message names those that are.
        PatchFileError: The file named as the patch cannot be read.
    """

    export_format: _ExportFormat = _ExportFormat()

    patch: Patch | str | os.PathLike[str] | None = None
    """The fix, or its `.safetensors` file, which is read at once: afterwards this is a `Patch`. None: the base."""

    target: str = "cpu"
    """Where the patched model will run, a key of `TARGETS`."""

    monitor: bool = True
    """Whether to add the outputs `atpatch/flagged` and `atpatch/score`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.patch, str | os.PathLike):
            self.patch = Patch.load(self.patch)
        if self.patch is not None and not isinstance(self.patch, Patch):
            raise ExportError(
                "patch",
                expected="a Patch, the path of a patch file, or None",
                found=type(self.patch).__name__,
                advice="Load it with Patch.load; export.json only names the patch of an export, it does not hold it.",
            )
        if self.target not in TARGETS:
            raise ExportError(
                "target",
                expected=f"one of {', '.join(TARGETS)}",
                found=repr(self.target),
                advice="Choose one of these.",
            )

    def to_json_string(self) -> str:
        """The config as JSON, as `export.json` records it: of the patch what it is for, not its arrays."""
        values = json.loads(super().to_json_string())
        if isinstance(self.patch, Patch):
            sites = [entry.site for entry in self.patch.sites]
            layers = [edit.layer for edit in self.patch.edits]
            values["patch"] = {"id": self.patch.id, "base": self.patch.base, "sites": sites, "layers": layers}
        return json.dumps(values, indent=2, sort_keys=True)


class AtPatchOnnxExporter(OnnxExporter):  # type: ignore[misc]  # transformers is not typed
    """Exports a transformers model to ONNX as `OnnxExporter` does, and bakes the config's patch into the graph."""

    export_format = EXPORT_FORMAT
    config_class = AtPatchOnnxConfig

    tested_versions = {"torch": "2.13.0", "onnx": "1.23.2", "onnxscript": "0.7.2"}  # noqa: RUF012 - as the base class

    def __init__(self, config: AtPatchOnnxConfig | None = None) -> None:
        """Keep the config, given here or to `AutoHfExporter.from_config`, for exports that are given none."""
        super().__init__()
        asked = _asked.get()
        _asked.set(None)
        self.config = config if config is not None or asked is None else asked()

    def export(
        self, model: Any, sample_inputs: Mapping[str, Any], config: AtPatchOnnxConfig | Mapping[str, Any] | None = None
    ) -> Any:
        """The model as one patched graph, an `ExportedModel`.

        Args:
            model: A transformers model, in inference mode.
            sample_inputs: As for `model(**sample_inputs)`: tensors, of the shapes that the graph shall take.
            config: The config or its fields; None: the one that the exporter was made from.

        Raises:
            ExportError: There is no config, or the model cannot be exported with these inputs.
            BakeError: The opset is too old.
            PatchMismatchError: The patch was fitted on another model, or on another export of this one.
        """
        return super().export(model, sample_inputs, self._config(config))

    def export_for_generation(
        self, model: Any, sample_inputs: Mapping[str, Any], config: Any = None, **options: Any
    ) -> Any:
        """One graph for each stage of generation; a patch is for one of them, so give the configs by component name."""
        return super().export_for_generation(model, sample_inputs, self._config(config), **options)

    def _config(self, config: Any) -> Any:
        config = self.config if config is None else config
        if config is None:
            raise ExportError(
                "config",
                expected="an AtPatchOnnxConfig",
                found="none",
                advice="Give it to export(), to AtPatchOnnxExporter() or to AutoHfExporter.from_config().",
            )
        return config

    def export_program(self, model: Any, sample_inputs: Any, config: AtPatchOnnxConfig) -> tuple[ir.Model, Any]:
        """The patched graph and transformers' metadata; errors as `export`."""
        with exporting(f"the export of {type(model).__name__}"):
            program, metadata = super().export_program(model, sample_inputs, config=config)
        if isinstance(config.patch, Patch):
            try:
                program = bake(program, config.patch, target=config.target, monitor=config.monitor)
            except PatchMismatchError as error:
                raise PatchMismatchError(
                    error.where,
                    expected=error.expected,
                    found=error.found,
                    advice="Fit on from_transformers(model, inputs, config=...) with these very weights, inputs and "
                    "export options, and the same versions of torch and transformers.",
                ) from error
        return program, metadata


class AtPatchOnnxModelRunner(OnnxModelRunner):  # type: ignore[misc]  # transformers is not typed
    """Runs a patched graph in ONNX Runtime and tells the monitoring outputs from the model's own.

    A model that answers with a `ModelOutput` or a dict gets them as the last entries, under their own names:
    `outputs["atpatch/flagged"]` bool `[batch, 1]` and `outputs["atpatch/score"]` float `[batch, 1]`. One that answers
    with a tuple or a tensor answers as ever, without them.
    """

    def unflatten(self, outputs: list[Any]) -> Any:
        """The model's own answer from the flat outputs, of which transformers would take the last, our monitors."""
        named = list(zip((spec.name for spec in self.session.get_outputs()), outputs, strict=True))
        result = super().unflatten([value for name, value in named if not name.startswith(PREFIX)])
        if isinstance(result, ModelOutput | dict):
            for name, value in named:
                if name.startswith(PREFIX):
                    result[name] = value
        return result


def register() -> None:
    """Make the backend known to transformers; called when this module is imported, and harmless when called again."""
    known = EXPORT_BACKENDS.get(EXPORT_FORMAT)
    if known is None:
        register_backend(AtPatchOnnxExporter, AtPatchOnnxModelRunner)


register()
