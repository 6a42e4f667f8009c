"""Rows of a table file as a model reads them: numbers, by column."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from atpatch_onnx.debugset.arrays import Array, listed
from atpatch_onnx.debugset.checks import InputSpec
from atpatch_onnx.debugset.texts import column
from atpatch_onnx.errors import DebugSetError


@dataclass(frozen=True, eq=False)
class Table:
    """What a table holds for a model."""

    inputs: dict[str, Array]
    """`[rows, ...]` by the model's input names."""

    name: str
    """The input with the attribute."""

    column: int | None
    """Its place among the input's features; None where the input holds nothing else."""


def as_inputs(
    rows: Sequence[Mapping[str, str]], attribute: str, label: str | None, specs: Mapping[str, InputSpec]
) -> Table:
    """Put the columns of a table into a model's inputs.

    A model with one input `[rows, features]` takes all columns but the label, in the order of the file. A model with
    several takes for each the column of its name.

    Raises:
        DebugSetError: There is no such column, a field is no number, or the columns are not what the model takes.
    """
    names = [name for name in rows[0] if name != label]
    if attribute not in names:
        raise DebugSetError(
            "attribute",
            expected=f"one of the columns {listed(names)}",
            found=repr(attribute),
            advice="Name the protected attribute's column.",
        )
    if len(specs) == 1 and len(next(iter(specs.values())).shape) == 2:
        (spec,) = specs.values()
        whole = np.stack([numbers(rows, name, spec.dtype) for name in names], axis=1)
        return Table({spec.name: whole}, spec.name, names.index(attribute))
    if specs.keys() != set(names) or any(len(spec.shape) > 2 for spec in specs.values()):
        raise DebugSetError(
            "the table's columns",
            expected=f"one for each of the model's inputs {listed(specs)}, or a model with one input [rows, features]",
            found=listed(names),
            advice="Name the columns as the inputs, or build the arrays yourself and use DebugSet.from_attribute.",
        )
    inputs = {
        name: numbers(rows, name, spec.dtype).reshape(len(rows), *[1] * (len(spec.shape) - 1))
        for name, spec in specs.items()
    }
    return Table(inputs, attribute, None)


def numbers(rows: Sequence[Mapping[str, str]], name: str, dtype: np.dtype[Any]) -> Array:
    """One column `[rows]` as numbers of a type; as texts where that is what the model takes.

    Raises:
        DebugSetError: There is no such column, or a field is no number of this type.
    """
    fields = column(rows, name, "the table")
    if dtype.kind not in "biuf":
        return np.array(fields)
    try:
        found = np.array([float(field) for field in fields])
        cast = found.astype(dtype)
        if dtype.kind != "f" and not np.array_equal(cast, found):
            raise ValueError("not all are whole")
    except (ValueError, OverflowError) as error:
        raise DebugSetError(
            f"column {name!r}",
            expected=f"numbers of type {dtype}, as the model reads them",
            found=str(error),
            advice="Encode and scale the table as for the model in use, and save that.",
        ) from error
    return cast
