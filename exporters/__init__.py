"""Front ends: from a transformers model, a torch module or an `.onnx` file to a base model or a patched artifact.

Importing this package imports neither torch nor transformers; a name that needs one imports it when it is used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from atpatch_onnx.exporters.exporting import ExportError as ExportError
    from atpatch_onnx.exporters.onnx_file import from_onnx as from_onnx
    from atpatch_onnx.exporters.torch_module import from_torch as from_torch
    from atpatch_onnx.exporters.transformers_backend import AtPatchOnnxConfig as AtPatchOnnxConfig
    from atpatch_onnx.exporters.transformers_backend import AtPatchOnnxExporter as AtPatchOnnxExporter
    from atpatch_onnx.exporters.transformers_backend import AtPatchOnnxModelRunner as AtPatchOnnxModelRunner
    from atpatch_onnx.exporters.transformers_model import from_pretrained as from_pretrained
    from atpatch_onnx.exporters.transformers_model import from_transformers as from_transformers

_HOMES = {
    "AtPatchOnnxConfig": "transformers_backend",
    "AtPatchOnnxExporter": "transformers_backend",
    "AtPatchOnnxModelRunner": "transformers_backend",
    "ExportError": "exporting",
    "from_onnx": "onnx_file",
    "from_pretrained": "transformers_model",
    "from_torch": "torch_module",
    "from_transformers": "transformers_model",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
