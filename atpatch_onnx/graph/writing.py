"""Writing models: the file appears whole or not at all, and its external data comes along as the user asks."""

import os
from collections.abc import Iterable
from pathlib import Path

import onnx_ir as ir

from atpatch_onnx.errors import ModelFileError
from atpatch_onnx.files import staging
from atpatch_onnx.graph.carrying import External, bring, plan_move, relocated
from atpatch_onnx.graph.kept_types import put_back
from atpatch_onnx.graph.parts import copy, replace_tensors, weights
from atpatch_onnx.graph.shapes import SHAPE_BYTES

PROTOBUF_LIMIT = 2**31 - 2**20
"""Bytes of in-memory weights above which they are written to an external data file (protobuf holds at most 2 GiB)."""


def save(model: ir.Model, path: str | os.PathLike[str], *, external: str | None = None) -> None:
    """Write a model; the file appears whole or not at all.

    External data is never loaded. In-memory weights of more than 2 GiB go to `<name>.data`.

    Args:
        model: The model.
        path: The file to write.
        external: How external data gets there: "reference" leaves it where it is, which must be in the folder of
            `path` or below it; "link" clones or hard-links it (onnxruntime and `load` read hard links; onnx's own
            loader refuses them, for the base as well); "copy" copies it. By default what can be referenced is, and
            the rest is copied. Data that is already where the new file looks for it always stays.

    Raises:
        ModelFileError: The target cannot be written, the external data cannot get there as asked, or another file is
            in its way.
    """
    path, how = Path(path), _choice(external)
    try:
        folder = path.parent.resolve(strict=True)
        with staging(folder) as made:
            plan = plan_move(model, folder, how)
            _require_apart(folder / path.name, [*plan.locations, *(folder / one for one in plan.locations.values())])
            moves: list[tuple[Path, Path]] = []
            for number, (source, target) in enumerate(plan.missing.items()):
                bring(source, made / str(number), how)
                moves.append((made / str(number), target))
            model = relocated(model, plan.locations)
            if _bytes_in_memory(model) > PROTOBUF_LIMIT:
                name = _free_name(folder, path.name, set(plan.locations.values()))
                model = _with_weights_outside(model, made / name)
                moves.append((made / name, folder / name))
            (made / "model").write_bytes(to_bytes(model))
            moves.append((made / "model", folder / path.name))  # the data before the model that names it
            for staged, target in moves:
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(staged, target)
    except OSError as error:
        raise ModelFileError(
            str(path),
            expected="a place that can be written to",
            found=str(error),
            advice="Choose another path, or make room.",
        ) from error


def _require_apart(target: Path, data: Iterable[Path]) -> None:
    """Refuse to write a model over data that it reads."""
    for file in data:
        if file == target or (target.exists() and file.exists() and target.samefile(file)):
            raise ModelFileError(
                str(target),
                expected="a separate file for the model",
                found=f"external data of it, {file}",
                advice="Choose another path: the weights in this file would be lost.",
            )


def to_bytes(model: ir.Model) -> bytes:
    """The model as the bytes of an `.onnx` file; external data stays referenced."""
    proto = ir.to_proto(model)
    put_back(proto, model)
    return bytes(proto.SerializeToString(deterministic=True))


def _choice(external: str | None) -> External | None:
    try:
        return None if external is None else External(external)
    except ValueError as error:
        raise ModelFileError(
            "external",
            expected=" or ".join(External),
            found=repr(external),
            advice="Choose one of these, or leave it out.",
        ) from error


def _in_memory(tensor: ir.TensorProtocol) -> bool:
    return not isinstance(tensor, ir.ExternalTensor)


def _bytes_in_memory(model: ir.Model) -> int:
    return sum(tensor.nbytes for tensor in weights(model).values() if _in_memory(tensor))


def _free_name(folder: Path, name: str, taken: set[str]) -> str:
    """`<name>.data`, or `<name>.2.data`, ... where there is such a file: the model that is replaced may read it."""
    found, count = f"{name}.data", 1
    while found in taken or (folder / found).exists():
        count += 1
        found = f"{name}.{count}.data"
    return found


def _with_weights_outside(model: ir.Model, file: Path) -> ir.Model:
    """A copy of the model whose in-memory weights lie in `file`.

    Those that shapes are computed from stay in the model: onnxruntime infers shapes before it opens data files.
    """
    moved = copy(model)
    large = [tensor for tensor in weights(moved).values() if _in_memory(tensor) and tensor.nbytes > SHAPE_BYTES]
    written = ir.external_data.convert_tensors_to_external(large, file.parent, file.name)
    by_identity = {id(old): new for old, new in zip(large, written, strict=True)}
    replace_tensors(moved, lambda tensor: by_identity.get(id(tensor), tensor))
    return moved
