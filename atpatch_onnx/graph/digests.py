"""Digests of tensors, wherever their content lies: every byte counts, and none is held longer than it is needed."""

import hashlib
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir as ir

from atpatch_onnx.graph.external import StoredTensor, stored

BLOCK = 2**26
"""Bytes that are digested apart from each other, several at a time, where a model is large."""

_CHUNK = 2**22
_KNOWN = "atpatch/digest"
"""In a tensor's `meta`, which no file holds: the state of its data file when its digest was taken, and the digest."""
_THREADS = min(8, os.cpu_count() or 1)

Read = Callable[[int, int], "bytes | memoryview"]
"""A part of a content: its first byte, and how many."""


def tensor_digest(tensor: ir.TensorProtocol, in_blocks: bool) -> bytes:
    """The digest of a tensor's content, or of the digests of its blocks."""
    if tensor.dtype is ir.DataType.STRING:
        return _of_texts(tensor.numpy().reshape(-1).tolist())
    if isinstance(tensor, ir.ExternalTensor):
        return _of_stored(tensor, in_blocks)
    if tensor.dtype.bitwidth < 8 or isinstance(tensor, ir.serde.TensorProtoTensor):
        view = memoryview(tensor.tobytes())  # none where a file leaves the content out
    else:  # in place: `tobytes` would copy gigabytes
        view = np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8).data
    return _digest(lambda start, length: view[start : start + length], view.nbytes, in_blocks)


def _of_texts(texts: Iterable[bytes | str]) -> bytes:
    found = hashlib.sha256()
    for text in texts:
        data = text.encode() if isinstance(text, str) else text
        found.update(len(data).to_bytes(8, "little") + data)
    return found.digest()


def _of_stored(tensor: ir.ExternalTensor, in_blocks: bool) -> bytes:
    ours = stored(tensor)
    if ours.nbytes < BLOCK:
        return _digest(_reader(ours), ours.nbytes, in_blocks)
    path = Path(ours.path).resolve()
    state = path.stat()
    now = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns, in_blocks)
    if (known := tensor.meta.get(_KNOWN)) is None or known[0] != now:  # one command asks for it several times
        known = now, _digest(_reader(ours), ours.nbytes, in_blocks, _holes(path, ours.offset or 0))
        tensor.meta[_KNOWN] = known
    return bytes(known[1])


def _reader(tensor: StoredTensor) -> Read:
    return lambda start, length: tensor.read([(start, length)])


def _digest(
    read: Read, size: int, in_blocks: bool, is_hole: Callable[[int, int], bool] = lambda start, length: False
) -> bytes:
    def part(start: int, length: int) -> bytes:
        if is_hole(start, length):
            return _of_zeros(length)
        found = hashlib.sha256()
        for at in range(start, start + length, _CHUNK):
            found.update(read(at, min(_CHUNK, start + length - at)))
        return found.digest()

    if not in_blocks or size <= BLOCK:
        return part(0, size)
    starts = range(0, size, BLOCK)
    with ThreadPoolExecutor(_THREADS) as pool:  # hashlib lets other threads run
        found = pool.map(part, starts, (min(BLOCK, size - start) for start in starts))
        return hashlib.sha256(b"".join(found)).digest()


def _holes(path: Path, offset: int) -> Callable[[int, int], bool]:
    """Whether a part of the content was never written: a hole in a sparse file holds zeros, and need not be read."""

    def is_hole(start: int, length: int) -> bool:
        if not hasattr(os, "SEEK_DATA"):
            return False
        with path.open("rb", buffering=0) as file:
            try:
                return file.seek(offset + start, os.SEEK_DATA) >= offset + start + length
            except OSError:  # no data from there on, or a file system that cannot tell
                return _ends_in_hole(path, offset + start)

    return is_hole


def _ends_in_hole(path: Path, start: int) -> bool:
    with path.open("rb", buffering=0) as file:
        try:
            return file.seek(start, os.SEEK_HOLE) == start < path.stat().st_size
        except OSError:
            return False


@cache
def _of_zeros(length: int) -> bytes:
    found, zeros = hashlib.sha256(), bytes(_CHUNK)
    for at in range(0, length, _CHUNK):
        found.update(zeros[: min(_CHUNK, length - at)])
    return found.digest()
