"""Columns of Parquet and Arrow files as arrays: a file, or a folder of them, partitioned or not, wherever fsspec opens.

A column holds numbers or bools, or lists of them of one length, nested as deep as the model's input has axes; a fixed
size list, a fixed shape tensor and a plain list are all taken. Rows are in the order of the files' names. A folder
`label=3/part-0.parquet` has a column `label` (Hive's way to partition). Columns that hold something else, such as the
name of a file, are left alone. Nothing is pickled: of extension types, only the storage is read.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.debugset.column_files import SUFFIXES, Files, Piece, Refusing, flat
from atpatch_onnx.debugset.rows import Array, Rows
from atpatch_onnx.errors import DebugSetError, require


@dataclass(frozen=True)
class Column:
    """What a column holds."""

    dtype: str
    inner: tuple[int, ...]
    """Of one row."""

    values: tuple[str, ...] | None = None
    """Where it is of the folders' names: its value in each piece."""


@dataclass(frozen=True, eq=False)
class ColumnTable:
    """Files with the same columns; what they hold is found out once, by `opened`."""

    path: str
    pieces: tuple[Piece, ...]
    columns: Mapping[str, Column]
    metadata: Mapping[bytes, bytes]
    """What the first file says of itself."""

    stamps: tuple[Any, ...]
    """Name, size and time of each file."""

    _read: dict[str, tuple[int, Array]] = field(default_factory=dict, repr=False)
    """The last piece of each column: rows are asked for in order."""

    @property
    def where(self) -> str:
        """Its path."""
        return self.path

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.pieces else 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_read": {}}

    def key(self) -> Mapping[str, Any]:
        """Path, size and time of its files."""
        return {"path": self.path, "files": self.stamps}

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        return np.cumsum([piece.rows for piece in self.pieces], dtype=np.int64)

    def stored(self, name: str) -> Rows:
        """A column, which stays where it is."""
        column = self.columns[name]
        return Rows(self, name, np.dtype(column.dtype), column.inner, range(len(self)))

    def read(self, column: str, rows: NDArray[np.int64]) -> Array:
        """Some rows of a column, in this order.

        Raises:
            DebugSetError: A file cannot be read, or holds something else than the first one.
        """
        about = self.columns[column]
        found = np.empty((len(rows), *about.inner), about.dtype)
        places = np.searchsorted(self._ends, rows, side="right")
        for place in dict.fromkeys(places.tolist()):
            start = int(self._ends[place]) - self.pieces[place].rows
            mine = places == place
            found[mine] = self._piece(column, place)[rows[mine] - start]
        return found

    def _piece(self, column: str, number: int) -> Array:
        if column in self._read and self._read[column][0] == number:
            return self._read[column][1]
        self._read.pop(column, None)  # not two at a time
        piece, about = self.pieces[number], self.columns[column]
        with Refusing(f"{piece.file}: row group {piece.number}, column {column!r}"):
            if about.values is not None:
                array = np.full(piece.rows, int(about.values[number]), about.dtype)
            else:
                array = self._numbers(column, about, piece)
        self._read[column] = number, array
        return array

    def _numbers(self, column: str, about: Column, piece: Piece) -> Array:
        data = Files(self.path).read(piece, column)
        values: Array = flat(data)
        if values.dtype != np.dtype(about.dtype) or values.size != piece.rows * int(np.prod(about.inner)):
            raise ValueError(
                f"{values.size} values of {values.dtype}, not {piece.rows} rows of {about.dtype} {list(about.inner)}"
            )
        return values.reshape(piece.rows, *about.inner)


def as_text(path: str | os.PathLike[str]) -> str:
    """A path or a URL, of which `pathlib` makes one slash where there are two."""
    return re.sub(r"^([a-z][a-z0-9+.-]+):/(?!/)", r"\1://", os.fspath(path))


def is_columns(path: str) -> bool:
    """Whether a path is of Parquet or Arrow files: by its end, as a URL, or a folder with such files in it."""
    if "://" in path or PurePosixPath(path).suffix in SUFFIXES:
        return True
    folder = Path(path)
    return folder.is_dir() and any(file.suffix in SUFFIXES for file in folder.rglob("*"))


def opened(path: str) -> ColumnTable:
    """What Parquet or Arrow files hold; only their footers are read, and one piece.

    Raises:
        DebugSetError: There are none, they are damaged, or not all have the same columns.
        MissingExtraError: pyarrow or fsspec is not installed.
    """
    require("pyarrow", "scale", "reading Parquet and Arrow files")
    require("fsspec", "scale", "reading Parquet and Arrow files")
    with Refusing(path):
        files = Files(path)
        names = files.names()
        if not names:
            raise DebugSetError(
                path, expected="Parquet or Arrow files", found="none there", advice="Check the path or the folder."
            )
        pieces: list[Piece] = []
        keys: list[dict[str, str]] = []
        for name in names:
            with Refusing(name):
                own = [Piece(name, number, rows) for number, rows in enumerate(files.counts(name)) if rows]
            pieces += own
            keys += [_partition(name)] * len(own)
        if not pieces:
            raise ValueError("no rows")
        metadata = files.metadata(names[0])
        columns: dict[str, Column] = {}
        for column in files.columns(names[0]):
            about = _about(files.read(pieces[0], column), pieces[0].rows)
            if about is not None:
                columns[column] = about
        for column in keys[0]:
            columns.setdefault(column, Column("int64", (), tuple(one.get(column, "") for one in keys)))
        return ColumnTable(path, tuple(pieces), columns, metadata, tuple(files.stamps(names)))


def _about(data: Any, rows: int) -> Column | None:
    """What a piece of a column holds; None where that is no numbers, or lists of different lengths."""
    import pyarrow as pa

    inner: list[int] = []
    kind, count = data.type, rows
    while not pa.types.is_primitive(kind):
        if pa.types.is_fixed_size_list(kind):
            size = kind.list_size
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
            size = len(flat(data, len(inner) + 1)) // max(count, 1)
        elif isinstance(kind, pa.FixedShapeTensorType):
            if list(kind.permutation or []) != sorted(kind.permutation or []):
                raise ValueError("tensors with their axes in another order")
            return Column(str(np.dtype(kind.value_type.to_pandas_dtype())), (*inner, *kind.shape))
        else:
            return None
        inner.append(size)
        kind, count = kind.value_type, count * size
    if pa.types.is_temporal(kind):
        return None
    return Column(str(np.dtype(kind.to_pandas_dtype())), tuple(inner))


def _partition(file: str) -> dict[str, str]:
    """What the folders of a file say: `label=3`."""
    found = (part.partition("=") for part in PurePosixPath(file).parts[:-1])
    return {name: unquote(value) for name, equals, value in found if equals and value.lstrip("-").isdigit()}
