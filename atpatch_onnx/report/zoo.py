"""A survey of many models as a page, as columns of a Parquet file, and in a few lines."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from atpatch_onnx.errors import AtPatchError, require
from atpatch_onnx.files import write_whole
from atpatch_onnx.report.rows import NONE, shown
from atpatch_onnx.report.tables import FOLD, RIGHT, WIDE, Columns, table

if TYPE_CHECKING:  # modules that run models
    from atpatch_onnx.measuring.zoo import Looked


def outcome(looked: Looked) -> str:
    """What a model is, in a word or two."""
    if looked.error:
        return "not read"
    if looked.sites:
        return "part of it" if looked.refused else "can be patched"
    return "refused" if looked.refused else "no attention"


def why(looked: Looked) -> str:
    """Why what is not patched is not."""
    return looked.error or "; ".join(f"{count} x {reason}" for reason, count in looked.refused)


def in_a_line(found: Sequence[Looked]) -> str:
    """How many of each."""
    counts = Counter(map(outcome, found))
    return f"{len(found)} models: " + ", ".join(f"{count} {what}" for what, count in counts.most_common())


def zoo_table(found: Sequence[Looked]) -> Table:
    """For the terminal."""
    verdicts = any(one.verdict or one.scanned for one in found)
    rehearsals = any(one.rehearsed for one in found)
    columns: Columns = {"Model": FOLD, "Sites": RIGHT, "Form": FOLD, "Outcome": {}, "Refused, and why": WIDE}
    columns = {**columns, **({"Rehearsed": FOLD} if rehearsals else {}), **({"Scan": FOLD} if verdicts else {})}
    cells = (
        (
            *(shown(one.model), str(one.sites), ", ".join(one.forms) or NONE, outcome(one), shown(why(one)) or NONE),
            *((shown(one.rehearsed) or NONE,) if rehearsals else ()),
            *((shown(one.verdict or one.scanned) or NONE,) if verdicts else ()),
        )
        for one in found
    )
    return table("Models", columns, cells)


def render_zoo(found: Sequence[Looked], title: str) -> str:
    """The page; names in it are escaped.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    require("jinja2", "report", "writing a report")
    from atpatch_onnx import __version__  # here: the package's own __init__ may import this room
    from atpatch_onnx.report.environment import environment

    return (
        environment()
        .get_template("zoo.html.j2")
        .render(
            title=shown(title),
            version=__version__,
            found=[(one, outcome(one), why(one)) for one in found],
            line=in_a_line(found),
            verdicts=any(one.verdict or one.scanned for one in found),
            rehearsals=any(one.rehearsed for one in found),
        )
    )


def write_columns(path: str | os.PathLike[str], found: Sequence[Looked]) -> None:
    """Write the survey as a Parquet file: a row a model, a column for each field of `Looked`, and the outcome.

    Raises:
        AtPatchError: The file cannot be written.
        MissingExtraError: pyarrow is not installed.
    """
    require("pyarrow", "scale", "writing Parquet files")
    import pyarrow as pa
    from pyarrow.parquet import write_table

    rows = [one.to_json() | {"outcome": outcome(one), "refused": why(one) if one.refused else ""} for one in found]
    buffer = pa.BufferOutputStream()
    write_table(pa.Table.from_pylist(rows), buffer)
    try:
        write_whole(Path(path), buffer.getvalue().to_pybytes())
    except OSError as error:
        raise AtPatchError(
            str(path), expected="a place that can be written to", found=str(error), advice="Choose another path."
        ) from error
