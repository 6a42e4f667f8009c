"""Reading arrays out of files that are not trusted: nothing unfolds to more than its own header says.

A zip's members may be packed a million to one (bzip2, lzma), and a member's header may claim any size. So a member is
unpacked only where numpy's `savez` and `savez_compressed` could have packed it, and an array is only made where the
bytes for it can be there: stored as they are, or by deflate, which makes a thousand bytes of one at the most.
"""

import io
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)

_RATIO = 1032
"""Bytes that deflate can make of one, at the most."""

_HEADER = 2**16
"""More than numpy's header takes."""


def read_member(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> NDArray[Any]:
    """The array in a member.

    Raises:
        ValueError: It is packed otherwise, does not have the size that its header says, or has elements without bytes.
        Exception: What zipfile and numpy raise for damaged ones.
    """
    if member.compress_type not in PACKINGS:
        raise ValueError(f"packed by method {member.compress_type}, not stored or deflated as numpy does")
    with archive.open(member) as file:
        size = _array_bytes(file.read(_HEADER))  # no more: a header may claim to be of any length
        if member.file_size - _HEADER > size or member.file_size < size:
            raise ValueError(f"{member.file_size} bytes, and a header of an array of {size}")
        if size > _RATIO * (member.compress_size + 1):
            raise ValueError(f"{member.compress_size} bytes packed, and a header of an array of {size}")
    with archive.open(member) as file:
        array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
        if file.read(1):
            raise ValueError("there is more after the array")
    return array


def map_file(path: Path) -> NDArray[Any]:
    """The array in a `.npy` file, which stays on disk.

    Raises:
        ValueError: The file is shorter than its header says, or has elements without bytes.
        Exception: What numpy raises for damaged ones.
    """
    with path.open("rb") as file:
        size = _array_bytes(file.read(_HEADER))
    if size > path.stat().st_size:
        raise ValueError(f"{path.stat().st_size} bytes, and a header of an array of {size}")
    array: NDArray[Any] = np.lib.format.open_memmap(path, mode="r")
    return array


def _array_bytes(start: bytes) -> int:
    """How large the array is that a header announces."""
    file = io.BytesIO(start)
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(file)
    return _checked_bytes(shape, dtype)


def _checked_bytes(shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
    """The bytes of an array of this shape.

    Raises:
        ValueError: Elements of no bytes, of which any number fits into a file; or a negative size.
    """
    if any(size < 0 for size in shape):
        raise ValueError(f"the shape {shape}")
    if not dtype.itemsize and math.prod(shape) > 1:
        raise ValueError(f"{math.prod(shape)} elements of type {dtype}, without any bytes")
    return math.prod(shape) * dtype.itemsize
