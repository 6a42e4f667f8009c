"""Weights in files beside the model: where they may lie, and how they are read."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnx_ir as ir

from atpatch_onnx.errors import ModelFileError
from atpatch_onnx.graph import protos
from atpatch_onnx.graph.parts import replace_tensors, tensors

_IN_MEMORY = "*/_ORT_"
"""With what onnxruntime's marks begin of tensors whose offsets are addresses in its own memory."""


def check_external_data(proto: onnx.ModelProto, path: Path) -> None:
    """External data must lie inside the model's folder (symlinks resolved) and be as long as the model says.

    Raises:
        ModelFileError: It does not, or is not.
    """
    folder = path.parent.resolve()
    for tensor in protos.tensors(proto):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        location = entries.get("location", "")
        where = f"{path}: external data of {tensor.name!r}"
        size = _data_file(folder, location, where).stat().st_size
        wanted = protos.tensor_bytes(tensor)
        try:
            offset = int(entries.get("offset", "0"))
            length = int(entries["length"]) if "length" in entries else wanted
        except ValueError:
            offset, length = -1, -1
        if offset < 0 or length != wanted or offset + length > size:
            raise _cut_short(where, location, wanted, offset, f"a file of {size} bytes and a stated length of {length}")


def _data_file(folder: Path, location: str, where: str) -> Path:
    """The file that `location` means, if it is a file inside `folder`."""
    target = (folder / location).resolve()
    if (
        not location
        or location.startswith(_IN_MEMORY)
        or Path(location).is_absolute()
        or not target.is_relative_to(folder)
    ):
        raise ModelFileError(
            where,
            expected=f"a file inside the model's folder {folder}",
            found=f"{location!r}, which is {target}",
            advice="Do not use this file unless you trust who made it; move the data beside the model otherwise.",
        )
    if not target.is_file():
        raise ModelFileError(
            where,
            expected=f"the file {location!r} beside the model",
            found="nothing there",
            advice="Copy the external data file together with the model.",
        )
    return target


def _cut_short(where: str, location: str, wanted: int, offset: int, found: str) -> ModelFileError:
    return ModelFileError(
        where,
        expected=f"{wanted} bytes at offset {offset} of {location!r}",
        found=found,
        advice="The data file was cut short or belongs to another model: copy it again.",
    )


class StoredTensor(ir.ExternalTensor):
    """A weight in a data file, read only when it is asked for, and only its own bytes.

    onnx-ir maps the whole file and refuses one with several hard links; here every read checks again that the file
    lies inside the model's folder.
    """

    def read(self, blocks: Iterable[tuple[int, int]]) -> bytes:
        """The bytes of some blocks of the weight, one after the other.

        Args:
            blocks: Where each block starts, from the weight's first byte, and its length.

        Raises:
            ModelFileError: The file is gone, has become too short, or lies outside the model's folder.
        """
        where = f"external data of {self.name!r}"
        found = bytearray()
        with _data_file(Path(self.base_dir).resolve(), str(self.location), where).open("rb") as file:
            for start, length in blocks:
                offset = (self.offset or 0) + start
                file.seek(offset)
                block = file.read(length)
                if len(block) < length:
                    raise _cut_short(where, str(self.location), length, offset, f"{len(block)} bytes")
                found += block
        return bytes(found)

    def tobytes(self) -> bytes:
        """All bytes of the weight, little endian."""
        return self.read([(0, self.nbytes)])

    def numpy(self) -> np.ndarray:
        """The weight as an array of its shape and type, read anew at each call."""
        proto = onnx.TensorProto(data_type=int(self.dtype), dims=self.shape.numpy(), raw_data=self.tobytes())
        return ir.serde.TensorProtoTensor(proto).numpy()

    def __array__(self, dtype: Any = None) -> np.ndarray:
        return self.numpy().__array__(dtype)


def stored(tensor: ir.ExternalTensor, *, folder: Path | None = None, location: str | None = None) -> StoredTensor:
    """The same weight, read by us; in another folder or file where these are given."""
    return StoredTensor(
        tensor.location if location is None else location,
        tensor.offset,
        tensor.length,
        tensor.dtype,
        shape=tensor.shape,
        name=tensor.name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
        base_dir=tensor.base_dir if folder is None else folder,
    )


def of_proto(tensor: onnx.TensorProto, folder: Path) -> StoredTensor:
    """The weight in a data file that a tensor of a file names."""
    return stored(cast(ir.ExternalTensor, ir.serde.deserialize_tensor(tensor)), folder=folder)


def take_in(tensor: onnx.TensorProto, content: bytes) -> None:
    """Put content in place of the name of the data file that it lies in."""
    tensor.raw_data = content
    tensor.ClearField("external_data")
    tensor.ClearField("data_location")


def read_from(model: ir.Model, folder: Path) -> None:
    """Let every external tensor of a model be read from `folder`."""
    replace_tensors(
        model, lambda tensor: stored(tensor, folder=folder) if isinstance(tensor, ir.ExternalTensor) else tensor
    )


def external_folder(model: ir.Model) -> Path | None:
    """The folder that the model's external data is relative to; None where it has none."""
    found = (Path(tensor.base_dir) for tensor in tensors(model) if isinstance(tensor, ir.ExternalTensor))
    return next(found, None)
