"""How tables for the terminal are made: columns, cells and figures."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from atpatch_onnx.report.rows import decimal
from atpatch_onnx.running.metrics import Difference, Rate


def measure(value: Rate | Difference | float | None) -> str:
    """A rate or a difference of rates with its interval, or a plain number."""
    if not isinstance(value, Rate | Difference):
        return decimal(value, 4)
    if isinstance(value, Rate) and value.count == 0:
        return "no inputs"
    return f"{value.value:.2%} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


INTERVALS = "In brackets: 95 % intervals."

Columns = Mapping[str, Mapping[str, Any]]
"""Names of columns, and what rich is told of each."""

RIGHT: Mapping[str, Any] = {"justify": "right"}
NARROW: Mapping[str, Any] = {**RIGHT, "no_wrap": True}
FOLD: Mapping[str, Any] = {"overflow": "fold"}
WIDE: Mapping[str, Any] = {**FOLD, "ratio": 1}


def table(title: str, columns: Columns, cells: Iterable[Iterable[str]], caption: str | None = None) -> Table:
    """A table with these columns and rows of cells, which are plain text."""
    made = Table(
        title=title,
        caption=caption,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
        title_style="bold",
        caption_style="dim",
        padding=(0, 1, 0, 0),
        pad_edge=False,
        show_edge=False,
    )
    for name, told in columns.items():
        made.add_column(name, **told)
    for row in cells:
        made.add_row(*texts(row))
    return made


def texts(cells: Iterable[str]) -> tuple[Text, ...]:
    """Cells as plain text: names may hold what rich would take for markup."""
    return tuple(Text(cell) for cell in cells)
