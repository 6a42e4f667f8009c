"""Read and write models, fingerprint them, know their shapes.

Weights in external data files are never read to do so: a model of tens of gigabytes is opened in the time its graph
takes. A model file is untrusted input: external data must lie inside the model's folder, symlinks resolved.
"""

from atpatch_onnx.graph.branches import beginning, branch, branches, joined
from atpatch_onnx.graph.carrying import External
from atpatch_onnx.graph.external import external_folder
from atpatch_onnx.graph.fingerprints import fingerprint
from atpatch_onnx.graph.parts import (
    Model,
    all_names,
    constant,
    copy,
    custom_ops,
    opset_version,
    subgraphs,
    tensors,
    undefined_value,
    unique_name,
    weights,
    with_custom_ops,
)
from atpatch_onnx.graph.reading import ModelOrPath, load
from atpatch_onnx.graph.shapes import infer_shapes, skeleton
from atpatch_onnx.graph.writing import save, to_bytes

__all__ = [
    "External",
    "Model",
    "ModelOrPath",
    "all_names",
    "beginning",
    "branch",
    "branches",
    "constant",
    "copy",
    "custom_ops",
    "external_folder",
    "fingerprint",
    "infer_shapes",
    "joined",
    "load",
    "opset_version",
    "save",
    "skeleton",
    "subgraphs",
    "tensors",
    "to_bytes",
    "undefined_value",
    "unique_name",
    "weights",
    "with_custom_ops",
]
