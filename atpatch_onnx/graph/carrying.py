"""Data files of a model that is saved to another folder: referenced, linked or copied, and never loaded."""

import errno
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from io import FileIO
from pathlib import Path

import onnx_ir as ir

from atpatch_onnx.errors import ModelFileError
from atpatch_onnx.graph.external import stored
from atpatch_onnx.graph.parts import copy, replace_tensors, tensors

if sys.platform == "linux":
    import fcntl

_FICLONE = 0x40049409
"""Linux's ioctl that makes one file a clone of another: the same blocks, until either is written to."""

_CHUNK = 2**24


class External(StrEnum):
    """How external data that lies elsewhere gets to the model's new folder."""

    REFERENCE = "reference"
    """It stays where it is; it must lie in the new model's folder or below it."""

    LINK = "link"
    """A clone where the file system can (Btrfs, XFS, ...), else a hard link: no bytes are copied.

    Of a hard link, onnxruntime and `load` read both models; onnx's and onnx-ir's loaders refuse files with several
    hard links, and with that the base as well.
    """

    COPY = "copy"
    """A separate file; what the file system can clone is cloned, and holes stay holes."""


@dataclass(frozen=True)
class Move:
    """The data files of a model, seen from the folder that it is to be saved in."""

    locations: Mapping[Path, str]
    """Where each file is to be found, relative to that folder."""

    missing: Mapping[Path, Path]
    """The files that have to be brought there first, and where to."""


def plan_move(model: ir.Model, folder: Path, how: External | None) -> Move:
    """Decide for each data file how `folder` gets it: a file that is there already, or may be referenced, stays.

    Args:
        model: The model.
        folder: The new folder, resolved.
        how: As the user asks; None: reference what lies in `folder` or below it, and copy the rest.

    Raises:
        ModelFileError: Another file or a symlink to elsewhere is in the way, or data cannot be referenced from there.
    """
    locations: dict[Path, str] = {}
    missing: dict[Path, Path] = {}
    for source, location in sorted(_data_files(model)):
        if source in locations:
            continue
        target = folder / location
        locations[source] = location
        if target.exists() and target.samefile(source):
            continue
        if how in (None, External.REFERENCE) and source.is_relative_to(folder):
            locations[source] = source.relative_to(folder).as_posix()
            continue
        if how is External.REFERENCE:
            raise ModelFileError(
                str(source),
                expected=f"external data in {folder} or below it, where it can be referenced",
                found="data that lies elsewhere; loaders refuse data outside the model's folder",
                advice="Save to the base's folder or one above it, or link or copy the data instead.",
            )
        _require_way(source, target, folder)
        if not target.exists():
            missing[source] = target
    return Move(locations, missing)


def _data_files(model: ir.Model) -> set[tuple[Path, str]]:
    return {
        (Path(tensor.path).resolve(), str(tensor.location))
        for tensor in tensors(model)
        if isinstance(tensor, ir.ExternalTensor)
    }


def _require_way(source: Path, target: Path, folder: Path) -> None:
    if not target.resolve().is_relative_to(folder):
        raise ModelFileError(
            str(target),
            expected=f"external data inside {folder}",
            found=str(target.resolve()),
            advice="Save to a folder without that symlink.",
        )
    if target.exists() and not (target.is_file() and _same_content(target, source)):
        raise ModelFileError(
            str(target),
            expected="no other file where the model's external data has to go",
            found=f"a file of {target.stat().st_size} bytes",
            advice="Save to an empty folder, or beside the base model.",
        )


def relocated(model: ir.Model, locations: Mapping[Path, str]) -> ir.Model:
    """A copy of the model that finds each data file at its new location; the model itself where nothing changes."""

    def change(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        if not isinstance(tensor, ir.ExternalTensor):
            return tensor
        location = locations[Path(tensor.path).resolve()]
        return tensor if location == str(tensor.location) else stored(tensor, location=location)

    if all(change(tensor) is tensor for tensor in tensors(model)):
        return model
    moved = copy(model)
    replace_tensors(moved, change)
    return moved


def bring(source: Path, target: Path, how: External | None) -> None:
    """Make `target`, a new file, hold what `source` holds.

    Raises:
        ModelFileError: The file system can neither clone nor hard-link the file, and a link was asked for.
        OSError: The file cannot be read or written.
    """
    if _cloned(source, target):
        return
    if how is not External.LINK:
        _copy(source, target)
        return
    try:
        os.link(source, target)
    except OSError as error:
        raise ModelFileError(
            str(source),
            expected="a file that can be cloned or hard-linked to the model's new folder",
            found=str(error.strerror),
            advice="Stay on the data's file system, or copy the data instead.",
        ) from error


def _cloned(source: Path, target: Path) -> bool:
    if sys.platform != "linux":
        return False
    try:
        with source.open("rb") as old, target.open("xb") as new:
            fcntl.ioctl(new, _FICLONE, old.fileno())
    except OSError:  # another file system, or one that cannot
        target.unlink(missing_ok=True)
        return False
    return True


def _copy(source: Path, target: Path) -> None:
    with source.open("rb", buffering=0) as old, target.open("xb", buffering=0) as new:
        size = source.stat().st_size
        new.truncate(size)
        position = 0
        while (position := _next_written(old, position, size)) < size:
            chunk = _read(old, position)
            new.seek(position)
            position += new.write(chunk)


def _same_content(first: Path, second: Path) -> bool:
    size = first.stat().st_size
    if size != second.stat().st_size:
        return False
    with first.open("rb", buffering=0) as one, second.open("rb", buffering=0) as other:
        position = 0
        while (position := min(_next_written(file, position, size) for file in (one, other))) < size:
            chunk = _read(one, position)
            if chunk != _read(other, position):
                return False
            position += len(chunk)
    return True


def _next_written(file: FileIO, position: int, size: int) -> int:
    """The next position from `position` on that is in no hole of a sparse file; `size` where there is none."""
    if position >= size or not hasattr(os, "SEEK_DATA"):
        return position
    try:
        return file.seek(position, os.SEEK_DATA)
    except OSError as error:
        return size if error.errno == errno.ENXIO else position


def _read(file: FileIO, position: int) -> bytes:
    file.seek(position)
    chunk = file.read(_CHUNK)
    if not chunk:
        raise OSError(errno.EIO, f"{file.name} became shorter while it was read")
    return chunk
