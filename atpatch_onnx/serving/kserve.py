"""A KServe `InferenceService` that serves a Triton model repository by the Open Inference Protocol."""

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from atpatch_onnx.baking.metadata import is_patched, read_record
from atpatch_onnx.errors import ServingError
from atpatch_onnx.files import write_whole
from atpatch_onnx.serving.triton import TritonOptions, write_model_repository

_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(frozen=True)
class KServeOptions:
    """Where the service finds its model and what it may use."""

    storage: str = "pvc://models"
    """URI of the model repository once it is uploaded."""

    cpu: str = "2"
    memory: str = "4Gi"
    triton: TritonOptions = field(default_factory=TritonOptions)


def write_inference_service(
    model: ir.Model, folder: str | os.PathLike[str], name: str, options: KServeOptions | None = None
) -> Path:
    """Write `<name>.yaml` and, in `models/`, the repository to upload; returns the manifest.

    Args:
        model: The model to serve, patched or not.
        folder: Made if it is not there.
        name: Of the service and the model: a label of Kubernetes.
        options: Where and with what it is served.

    Raises:
        ServingError: The name is no label, a file is in the way, or a tensor has a type that Triton does not know.
        ModelFileError: The model cannot be written.
    """
    if not _LABEL.fullmatch(name):
        raise ServingError(
            f"the service's name {name!r}",
            expected="a label of Kubernetes: up to 63 lower-case letters, digits and '-'",
            found="something else",
            advice="Choose another name.",
        )
    options = options or KServeOptions()
    place = Path(folder)
    write_model_repository(model, place / "models", name, options.triton)
    file = place / f"{name}.yaml"
    try:
        write_whole(file, manifest(model, name, options).encode())
    except OSError as error:
        raise ServingError(
            str(file), expected="a place that can be written to", found=str(error), advice="Choose another folder."
        ) from error
    return file


def manifest(model: ir.Model, name: str, options: KServeOptions) -> str:
    """The YAML of the service. Strings are written as JSON, which YAML reads."""
    notes = {}
    if is_patched(model):
        record = read_record(model)
        notes = {"atpatch/patch": record.patch, "atpatch/base": record.base}
    lines = [
        "apiVersion: serving.kserve.io/v1beta1",
        "kind: InferenceService",
        "metadata:",
        f"  name: {json.dumps(name)}",
        *(["  annotations:"] if notes else []),
        *(f"    {key}: {json.dumps(value)}" for key, value in notes.items()),
        "spec:",
        "  predictor:",
        "    model:",
        "      modelFormat:",
        "        name: triton",
        "      protocolVersion: v2",
        f"      storageUri: {json.dumps(options.storage)}",
        "      resources:",
        *(
            f"        {kind}: {{cpu: {json.dumps(options.cpu)}, memory: {json.dumps(options.memory)}}}"
            for kind in ("requests", "limits")
        ),
    ]
    return "\n".join(lines) + "\n"
