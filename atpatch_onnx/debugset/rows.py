"""Arrays that stay where they are stored: rows are read when they are asked for.

`Rows` answers what the rest of the package asks of an array `[pairs, ...]`: its shape and type, and some of its rows,
which come as an array in memory. It says where it lies, so that another process reads its rows by itself.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from atpatch_onnx.errors import DebugSetError

Array = NDArray[Any]

_AT_ONCE = 2**24
"""Bytes that are read together where all rows are looked at."""


class Table(Protocol):
    """Where columns are stored, of plain types: the same in every process."""

    @property
    def where(self) -> str:
        """Its path."""

    def __len__(self) -> int: ...

    def read(self, column: str, rows: NDArray[np.int64]) -> Array:
        """Some rows of a column, `[rows, ...]`, in the order of `rows`."""

    def key(self) -> Mapping[str, Any]:
        """Of its files, by what JSON knows: the same as long as they are not written again."""


@dataclass(frozen=True, eq=False)
class Rows:
    """A stored array, or some rows of it."""

    table: Table
    column: str
    dtype: np.dtype[Any]
    inner: tuple[int, ...]
    """Its shape without the first axis."""

    chosen: NDArray[np.int64] | range
    """Numbers of the rows."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As of an array."""
        return (len(self.chosen), *self.inner)

    @property
    def ndim(self) -> int:
        """As of an array."""
        return 1 + len(self.inner)

    @property
    def size(self) -> int:
        """As of an array."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """What it would take in memory."""
        return self.size * self.dtype.itemsize

    @property
    def where(self) -> str:
        """The table's path."""
        return self.table.where

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, key: Any) -> Array:
        if isinstance(key, int | np.integer):
            found: Array = self[np.array([key])][0]
            return found
        if isinstance(key, tuple):
            one = isinstance(key[0], int | np.integer)
            found = self[key[0]][key[1:] if one else (slice(None), *key[1:])]
            return found
        return self.table.read(self.column, np.asarray(self._numbers(key), np.int64))

    def __iter__(self) -> Iterator[Array]:
        yield from self[:]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.asarray(self[:], dtype)

    def min(self, axis: Any = None, out: None = None) -> Array:
        """As of an array, over axes with the rows'; rows are read some at a time."""
        return self._edge(np.min, axis)

    def max(self, axis: Any = None, out: None = None) -> Array:
        """The same."""
        return self._edge(np.max, axis)

    def _edge(self, edge: Callable[..., Array], axis: Any) -> Array:
        step = max(1, _AT_ONCE * len(self) // max(1, self.nbytes))
        return edge(np.stack([edge(self[at : at + step], axis=axis) for at in range(0, len(self), step)]), axis=0)

    def take(self, rows: ArrayLike, axis: int = 0) -> "Rows":
        """Some of its rows, which stay where they are as well."""
        assert axis == 0, "rows are on the first axis"
        return Rows(self.table, self.column, self.dtype, self.inner, self._numbers(np.asarray(rows)))

    def part(self, rows: slice) -> "Rows":
        """Rows that follow each other."""
        return Rows(self.table, self.column, self.dtype, self.inner, self._numbers(rows))

    def kept_by(self, tables: dict[bytes, Table]) -> "Rows":
        """Itself, of the same table as others that one process reads: tables know what they read last."""
        return replace(self, table=tables.setdefault(repr(self.table.key()).encode(), self.table))

    def view(self) -> "Rows":
        """Itself: nobody can change it."""
        return self

    def key(self) -> bytes:
        """Tells its content, without reading it."""
        from json import dumps

        chosen = np.asarray(self.chosen, np.int64).tobytes()
        return dumps([self.column, str(self.dtype), self.inner, dict(self.table.key())]).encode() + chosen

    def _numbers(self, key: Any) -> NDArray[np.int64] | range:
        if isinstance(key, slice):
            return self.chosen[key]
        rows = np.asarray(key)
        if rows.dtype == np.bool_:
            rows = np.flatnonzero(rows)
        if rows.size and (rows.min() < -len(self) or rows.max() >= len(self)):
            raise DebugSetError(
                self.where,
                expected=f"rows below {len(self)}",
                found=f"rows up to {rows.max()}",
                advice="Take rows that there are.",
            )
        return np.asarray(self.chosen, np.int64)[rows.astype(np.int64)]


def as_stored(rows: Rows) -> Array:
    """Stored rows where an array is asked for: they answer like one, and turn into one where numpy needs it."""
    return cast(Array, rows)


def stored(array: object) -> Rows | None:
    """The rows, where they are read when they are asked for; None of an array in memory."""
    return array if isinstance(array, Rows) else None


def part_of(array: Array, rows: slice) -> Array:
    """Rows that follow each other: of an array in memory a view, of a stored one stored as well."""
    found = stored(array)
    return array[rows] if found is None else as_stored(found.part(rows))


def rows_of(array: Array, rows: NDArray[np.int64]) -> Array:
    """Some rows: of an array in memory a copy, of a stored one stored as well."""
    found = stored(array)
    return array[rows] if found is None else as_stored(found.take(rows))


def kept_by(array: Array, tables: dict[bytes, Table]) -> Array:
    """An array in memory itself, and a stored one as in `Rows.kept_by`."""
    found = stored(array)
    return array if found is None else as_stored(found.kept_by(tables))
