"""A model repository of NVIDIA Triton Inference Server: `<name>/config.pbtxt` and `<name>/1/model.onnx`.

The text follows `inference.ModelConfig` of Triton's `model_config.proto`. With `max_batch_size` above 0 the first axis
of every tensor is the batch and is left out of `dims`; that the monitoring outputs have it is what lets requests be
batched.
"""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.metadata import is_patched, read_record
from atpatch_onnx.errors import ServingError
from atpatch_onnx.files import staging
from atpatch_onnx.serving.interface import Interface, ServedTensor, interface

_SAME = ("BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "STRING")
_RENAMED = {"FLOAT16": "FP16", "FLOAT": "FP32", "DOUBLE": "FP64", "BFLOAT16": "BF16"}

DTYPES = {ir.DataType[name]: f"TYPE_{called}" for name, called in ({name: name for name in _SAME} | _RENAMED).items()}

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class TritonOptions:
    """How Triton serves the model."""

    max_batch_size: int = 32
    """Of models whose batch axis is free; others are served one request at a time."""

    max_queue_delay: int = 100
    """Microseconds that a request may wait for others to be batched with."""

    kind: Literal["auto", "cpu", "gpu"] = "auto"
    """Where instances run; auto: where Triton finds a device."""

    instances: int = 1


def write_model_repository(
    model: ir.Model, folder: str | os.PathLike[str], name: str, options: TritonOptions | None = None
) -> Path:
    """Write the repository; returns the model's folder in it.

    Args:
        model: The model to serve, patched or not.
        folder: The repository; made if it is not there. Another model in it is left alone.
        name: Of the model.
        options: How it is served.

    Raises:
        ServingError: The name cannot be one of a model, the model's folder is there already, or a tensor has a type
            that Triton does not know.
        ModelFileError: The model cannot be written.
    """
    if not _NAME.fullmatch(name):
        raise ServingError(
            f"the model's name {name!r}",
            expected="letters, digits, '.', '_' and '-'",
            found="something else",
            advice="Choose another name.",
        )
    text = config_pbtxt(model, name, options or TritonOptions())
    place = Path(folder) / name
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with staging(place.parent) as made:
            (made / name / "1").mkdir(parents=True)
            (made / name / "config.pbtxt").write_text(text)
            graphs.save(model, made / name / "1" / "model.onnx", external="copy")
            place.mkdir()  # nothing may be there
            os.replace(made / name, place)
    except OSError as error:
        raise ServingError(
            str(place),
            expected="a folder that can be made",
            found=str(error),
            advice="Choose another folder or name, or move that model away.",
        ) from error
    return place


def config_pbtxt(model: ir.Model, name: str, options: TritonOptions) -> str:
    """The text of `config.pbtxt`."""
    seen = interface(model)
    return "\n".join(_config(seen, name, options, _parameters(model))) + "\n"


def _config(seen: Interface, name: str, options: TritonOptions, parameters: dict[str, str]) -> Iterator[str]:
    yield f"name: {_quoted(name)}"
    yield 'backend: "onnxruntime"'
    yield f"max_batch_size: {options.max_batch_size if seen.batched else 0}"
    for kind, tensors in (("input", seen.inputs), ("output", seen.outputs)):
        for tensor in tensors:
            yield from _tensor(kind, tensor, seen.batched)
    if seen.batched and options.max_batch_size > 1:
        yield f"dynamic_batching {{ max_queue_delay_microseconds: {options.max_queue_delay} }}"
    yield f"instance_group [ {{ kind: KIND_{options.kind.upper()} count: {options.instances} }} ]"
    for key, value in parameters.items():
        yield f"parameters {{ key: {_quoted(key)} value {{ string_value: {_quoted(value)} }} }}"


def _tensor(kind: str, tensor: ServedTensor, batched: bool) -> Iterator[str]:
    if tensor.dtype not in DTYPES:
        raise ServingError(
            f"the {kind} {tensor.name}",
            expected="a type that Triton knows",
            found=tensor.dtype.name,
            advice="Cast it within the model, then bake again.",
        )
    sizes = [-1 if size is None else size for size in (tensor.shape[1:] if batched else tensor.shape)]
    yield f"{kind} {{"
    yield f"  name: {_quoted(tensor.name)}"
    yield f"  data_type: {DTYPES[tensor.dtype]}"
    if sizes:
        yield f"  dims: {sizes}"
    else:  # Triton asks for one axis at least: the value is one without
        yield "  dims: [ 1 ]"
        yield "  reshape { shape: [ ] }"
    yield "}"


def _parameters(model: ir.Model) -> dict[str, str]:
    """What operators want to see of the patch without opening the file."""
    if not is_patched(model):
        return {}
    record = read_record(model)
    return {
        "atpatch.patch": record.patch,
        "atpatch.base": record.base,
        "atpatch.conditional": "yes" if record.conditional else "no",
    }


def _quoted(text: str) -> str:
    """A string of protobuf's text format, which reads JSON's escapes but for those of surrogate pairs."""
    return json.dumps(text, ensure_ascii=False)
