"""Parquet and Arrow files: what is in them, piece by piece, and how such a file is written.

Nothing is pickled: of extension types, only the storage is read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from atpatch_onnx.debugset.rows import Array
from atpatch_onnx.errors import DebugSetError, one_line, require

SUFFIXES = {".parquet": "parquet", ".pq": "parquet", ".arrow": "arrow", ".feather": "arrow"}

PIECE_BYTES = 2**30
"""What a column of one row group may take in memory: it is read as a whole."""


GROUP_BYTES = 2**26
"""What a row group takes in memory, all columns together, of files that are written here."""


@dataclass(frozen=True)
class Piece:
    """A row group of a Parquet file, or a record batch of an Arrow file."""

    file: str
    number: int
    rows: int


class Files:
    """Files at a path, as fsspec opens it."""

    def __init__(self, path: str) -> None:
        from fsspec.core import url_to_fs

        self._fs, self._root = url_to_fs(path)

    def names(self) -> list[str]:
        """In the order of their names."""
        if self._fs.isfile(self._root):
            return [self._root]
        return sorted(name for name in self._fs.find(self._root) if PurePosixPath(name).suffix in SUFFIXES)

    def stamps(self, names: list[str]) -> list[tuple[str, int, str]]:
        """Name, size and time of each."""
        found = [self._fs.info(name) for name in names]
        return [
            (
                name,
                int(info.get("size") or 0),
                str(info.get("mtime") or info.get("LastModified") or info.get("created")),
            )
            for name, info in zip(names, found, strict=True)
        ]

    def counts(self, name: str) -> list[int]:
        """Rows of each piece of a file."""
        file = self._open(name)
        if _kind(name) == "parquet":
            about = file.metadata
            for group in range(about.num_row_groups):
                for column in range(about.num_columns):
                    values = about.row_group(group).column(column).num_values
                    if 8 * values > PIECE_BYTES:
                        raise ValueError(f"row group {group} with {values} values of a column: write smaller ones")
            return [about.row_group(group).num_rows for group in range(about.num_row_groups)]
        return [file.get_batch(number).num_rows for number in range(file.num_record_batches)]

    def columns(self, name: str) -> list[str]:
        """Names of the columns of a file."""
        file = self._open(name)
        return list((file.schema_arrow if _kind(name) == "parquet" else file.schema).names)

    def metadata(self, name: str) -> dict[bytes, bytes]:
        """What a file says of itself."""
        file = self._open(name)
        return dict((file.schema_arrow if _kind(name) == "parquet" else file.schema).metadata or {})

    def read(self, piece: Piece, column: str) -> Any:
        """A column of a piece."""
        file = self._open(piece.file)
        if _kind(piece.file) == "parquet":
            return file.read_row_group(piece.number, columns=[column]).column(column)
        return file.get_batch(piece.number).column(column)

    def _open(self, name: str) -> Any:
        if _kind(name) == "parquet":
            from pyarrow.parquet import ParquetFile

            return ParquetFile(name, filesystem=self._fs)
        from pyarrow import ipc
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        return ipc.open_file(PyFileSystem(FSSpecHandler(self._fs)).open_input_file(name))


def flat(data: Any, levels: int | None = None) -> Any:
    """The numbers of a column `[rows]`, one after the other, without the lists that they are in; no null among them.

    Raises:
        ValueError: There is a null, or lists are of different lengths.
    """
    import pyarrow as pa

    if isinstance(data, pa.ChunkedArray):
        data = data.combine_chunks() if data.num_chunks != 1 else data.chunk(0)
    if isinstance(data, pa.ExtensionArray):
        data = data.storage
    depth = 0
    while not pa.types.is_primitive(data.type) and depth != levels:
        if data.null_count:
            raise ValueError("an empty place in it")
        if not pa.types.is_fixed_size_list(data.type) and len(data.value_lengths().unique()) > 1:
            raise ValueError("lists of different lengths")
        data, depth = data.flatten(), depth + 1
    if data.null_count:
        raise ValueError("an empty place in it")
    return np.asarray(data.to_numpy(zero_copy_only=False)) if pa.types.is_primitive(data.type) else data


def write(path: str, arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> None:
    """Write arrays `[rows, ...]` of numbers or bools as columns of a Parquet file, some rows at a time.

    Raises:
        ValueError: There are arrays of something else.
        MissingExtraError: pyarrow is not installed.
    """
    require("pyarrow", "scale", "writing Parquet files")
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    rows = len(next(iter(arrays.values())))
    step = max(1, GROUP_BYTES * rows // max(1, sum(array.nbytes for array in arrays.values())))
    writer = None
    try:
        for start in range(0, rows, step):
            part = {name: as_lists(np.asarray(array[start : start + step])) for name, array in arrays.items()}
            table = pa.table(part).replace_schema_metadata(dict(metadata))
            writer = writer or ParquetWriter(path, table.schema)
            writer.write_table(table, row_group_size=step)
    finally:
        if writer is not None:
            writer.close()


def as_lists(array: Array) -> Any:
    """An array `[rows, ...]` as a column of nested lists of fixed sizes."""
    import pyarrow as pa

    if array.dtype.kind not in "biuf":
        raise ValueError(f"{array.dtype}, and columns hold numbers or bools")
    data = pa.array(np.ascontiguousarray(array).reshape(-1))
    for size in reversed(array.shape[1:]):
        data = pa.FixedSizeListArray.from_arrays(data, size)
    return data


class Refusing:
    """What goes wrong with a file is said as its, in one line."""

    def __init__(self, where: str) -> None:
        self._where = where

    def __enter__(self) -> None: ...

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, DebugSetError):  # Arrow and fsspec raise many types
            raise DebugSetError(
                self._where,
                expected="whole Parquet or Arrow files, of numbers in lists of one length",
                found=one_line(error),
                advice="Write this file again, or copy it again if it was cut short.",
            ) from error


def _kind(name: str) -> str:
    return SUFFIXES.get(PurePosixPath(name).suffix, "parquet")
