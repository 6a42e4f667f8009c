"""What the attributes of a table may be: kinds, valid values, bounds and steps; and moving within them.

A table is float `[rows, features]`, one column an attribute, as the model reads it: a category is written as a number.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from atpatch_onnx.errors import DebugSetError

Table = NDArray[np.float32]

LARGEST = 2**10
"""Combinations of protected values above which a search is refused: each input is compared with all of them."""


@dataclass(frozen=True)
class Attribute:
    """One column of a table.

    Raises:
        DebugSetError: Fewer than two values, values that are not distinct and finite, or bounds and steps that allow
            no move.
    """

    name: str
    kind: Literal["categorical", "numeric"]
    values: tuple[float, ...] = ()
    """Of a categorical attribute: its valid values; a move goes to a neighbour in this order."""

    low: float = 0.0
    high: float = 0.0
    step: float = 1.0
    """Of a numeric attribute: its bounds, which are valid values, and how far a move goes, in the column's own unit."""

    def __post_init__(self) -> None:
        categorical = self.kind == "categorical"
        if self.kind not in ("categorical", "numeric"):
            raise _unfit(self.name, "kind 'categorical' or 'numeric'", repr(self.kind))
        if categorical and (len(set(self.values)) < max(2, len(self.values)) or not np.isfinite(self.values).all()):
            raise _unfit(self.name, "two or more distinct finite values", repr(self.values))
        if not categorical and not (
            math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high and 0 < self.step < math.inf
        ):
            raise _unfit(self.name, "low < high and step > 0", f"{self.low:g}, {self.high:g} and {self.step:g}")

    @classmethod
    def categorical(cls, name: str, values: int | Sequence[float]) -> "Attribute":
        """A category with these values, or with 0 to `values` - 1."""
        return cls(name, "categorical", tuple(range(values) if isinstance(values, int) else values))

    @classmethod
    def numeric(cls, name: str, low: float, high: float, step: float = 1.0) -> "Attribute":
        """A number between bounds."""
        return cls(name, "numeric", low=low, high=high, step=step)

    def every_value(self) -> NDArray[np.float32]:
        """All values `[values]` that moves from the lower bound, or between categories, can reach."""
        if self.kind == "categorical":
            return np.array(self.values, np.float32)
        count = min(math.floor((self.high - self.low) / self.step + 1e-9) + 1, LARGEST + 1)
        return np.array(self.low + self.step * np.arange(count), np.float32)

    def moved(self, column: Table, direction: NDArray[Any]) -> Table:
        """`column` `[rows]` one move on in `direction` `[rows]` (-1, 0 or 1); at a bound it stays."""
        if self.kind == "numeric":
            return np.clip(column + np.float32(self.step) * direction, self.low, self.high).astype(np.float32)
        values = np.array(self.values, np.float32)
        place = np.argmax(column[:, None] == values, axis=1)
        return np.asarray(values[np.clip(place + direction.astype(np.int64), 0, len(values) - 1)])

    def drawn(self, rows: int, generator: np.random.Generator) -> Table:
        """Values `[rows]`, uniform over the categories or between the bounds, in whole steps."""
        if self.kind == "categorical":
            return np.array(self.values, np.float32)[generator.integers(len(self.values), size=rows)]
        steps = math.floor((self.high - self.low) / self.step + 1e-9)
        return (self.low + self.step * generator.integers(steps + 1, size=rows)).astype(np.float32)

    def valid(self, column: Table) -> NDArray[np.bool_]:
        """Which values of `column` `[rows]` the attribute may have."""
        if self.kind == "categorical":
            return np.isin(column, np.array(self.values, np.float32))
        return np.asarray((column >= np.float32(self.low)) & (column <= np.float32(self.high)))


def checked_table(table: ArrayLike, attributes: Sequence[Attribute]) -> Table:
    """`table` as float32 `[rows, features]`, every value one that its attribute may have."""
    names = [attribute.name for attribute in attributes]
    if len(set(names)) < len(names):
        raise _unfit("attributes", "names that differ", ", ".join(names))
    try:
        rows = np.array(table, np.float32)
    except (TypeError, ValueError) as error:
        raise _unfit("table", "numbers [rows, features]", " ".join(str(error).split())) from error
    if rows.ndim != 2 or not len(rows) or rows.shape[1] != len(attributes):
        raise _unfit("table", f"shape [rows, {len(attributes)}], at least one row", f"shape {list(rows.shape)}")
    for attribute, column in zip(attributes, rows.T, strict=True):
        valid = attribute.valid(column)
        if not valid.all():
            row = int(np.argmin(valid))
            bounds = f"one of {attribute.values}" if attribute.values else f"{attribute.low:g} to {attribute.high:g}"
            raise _unfit(f"table, attribute {attribute.name!r}", bounds, f"{column[row]:g} in row {row}")
    return rows


def protected_columns(attributes: Sequence[Attribute], protected: str | Sequence[str]) -> list[int]:
    """Where the protected attributes stand."""
    names = [attribute.name for attribute in attributes]
    wanted = [protected] if isinstance(protected, str) else list(protected)
    unknown = [name for name in wanted if name not in names]
    if unknown or not wanted or len(set(wanted)) == len(names):
        found = ", ".join(map(repr, unknown or wanted)) or "none"
        raise _unfit("protected", f"some, not all, of {', '.join(map(repr, names))}", found)
    columns = sorted(names.index(name) for name in set(wanted))
    combinations = math.prod(len(attributes[column].every_value()) for column in columns)
    if combinations > LARGEST:
        raise _unfit("protected", f"at most {LARGEST} combinations of values", "more")
    return columns


def variants(table: Table, attributes: Sequence[Attribute], columns: Sequence[int]) -> Table:
    """Every row with every combination of protected values `[rows, combinations, features]`, its own among them."""
    combinations = np.array(list(product(*(attributes[column].every_value() for column in columns))), np.float32)
    repeated = np.repeat(table[:, None], len(combinations), axis=1)
    repeated[:, :, list(columns)] = combinations
    return repeated


def _unfit(where: str, expected: str, found: str) -> DebugSetError:
    advice = "Describe each column of the table by one Attribute, in order, and name the protected ones."
    return DebugSetError(where, expected=expected, found=found, advice=advice)
