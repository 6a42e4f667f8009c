"""Reads Fashion-MNIST from its four idx files, gzipped or not; the files are not trusted.

Debian ships them: `apt-get install dataset-fashion-mnist` (in non-free). The format is described at
http://yann.lecun.com/exdb/mnist: two zero bytes, a type code, the number of dimensions, the sizes as big-endian
32-bit integers, and the values.
"""

import gzip
import io
import math
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.errors import AtPatchError

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package puts the files."""

LARGEST = 2**28
"""Bytes of values above which a file is refused; the largest of the four holds 47 million."""

_UNSIGNED_BYTES = 0x08
_GZIP = b"\x1f\x8b"


class DataFileError(AtPatchError):
    """A data file is missing, damaged or not what its name says."""


@dataclass(frozen=True)
class Images:
    """Images `[N, 1, height, width]` float32 in [0, 1] and their labels `[N]` int64."""

    images: NDArray[np.float32]
    labels: NDArray[np.int64]


def load_fashion(folder: Path = DEBIAN) -> tuple[Images, Images]:
    """The 60,000 training and the 10,000 test images.

    Raises:
        DataFileError: A file is missing, damaged, or does not fit the others.
    """
    return _part(folder, "train"), _part(folder, "t10k")


def _part(folder: Path, part: str) -> Images:
    images = read_idx(_find(folder, f"{part}-images-idx3-ubyte"))
    labels = read_idx(_find(folder, f"{part}-labels-idx1-ubyte"))
    if images.shape[1:] != (28, 28) or labels.shape != images.shape[:1] or not len(labels) or labels.max() > 9:
        raise DataFileError(
            f"{folder}: the files {part}-*",
            expected="images of 28 x 28 pixels and as many labels from 0 to 9",
            found=f"images of shape {images.shape} and labels of shape {labels.shape}, at most {labels.max(initial=0)}",
            advice="Take all four files from one copy of the data set.",
        )
    scaled = images[:, np.newaxis].astype(np.float32) / np.float32(255)
    return Images(scaled, labels.astype(np.int64))


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise DataFileError(
        str(folder / name),
        expected="a file of this name, or of this name with .gz",
        found="neither",
        advice="Install Debian's dataset-fashion-mnist, or name the folder of the four files with --data.",
    )


def read_idx(path: Path) -> NDArray[np.uint8]:
    """The array of unsigned bytes in an idx file. No more is read than its header announces, and one byte."""
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == _GZIP
        with gzip.open(path, "rb") if zipped else path.open("rb") as file:
            return _read(file, path)
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, f"bytes that cannot be read ({error})") from error


def _read(file: io.BufferedIOBase, path: Path) -> NDArray[np.uint8]:
    magic = file.read(4)
    if len(magic) < 4 or magic[:3] != bytes((0, 0, _UNSIGNED_BYTES)) or not 1 <= magic[3] <= 3:
        raise _damaged(path, f"a file that begins with {magic.hex(' ') or 'nothing'}")
    header = file.read(4 * magic[3])
    if len(header) < 4 * magic[3]:
        raise _damaged(path, "a header that was cut short")
    shape = tuple(int(size) for size in np.frombuffer(header, ">u4"))
    count = math.prod(shape)
    if count > LARGEST:
        raise _damaged(path, f"a header that announces {count} values, more than {LARGEST}")
    values = file.read(count + 1)
    if len(values) != count:
        found = "more values" if len(values) > count else f"{len(values)} values"
        raise _damaged(path, f"{found} where the header announces {count}")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _damaged(path: Path, found: str) -> DataFileError:
    return DataFileError(
        str(path),
        expected="an idx file of unsigned bytes in one to three dimensions, plain or gzipped",
        found=found,
        advice="Copy the file again.",
    )
