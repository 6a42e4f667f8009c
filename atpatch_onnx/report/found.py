"""What a search found, as one HTML page that needs nothing beside it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.discovery.verdict import Part, Search, Verdict
from atpatch_onnx.errors import require
from atpatch_onnx.report import images
from atpatch_onnx.report.rows import shown

TONES: Mapping[Verdict, str] = {
    Verdict.CLEAN: "good",
    Verdict.AUDITED: "good",
    Verdict.SUSPICIOUS: "warning",
    Verdict.BACKDOORED: "bad",
}

MARKS = {"good": "✓", "warning": "!", "bad": "✕"}

CELLS = 64
"""Rows and columns of an image's picture, at most."""


def render_search(found: Search, title: str) -> str:
    """The page; names in it are escaped.

    Args:
        found: What was found.
        title: The heading.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    require("jinja2", "report", "writing a report")
    from atpatch_onnx import __version__  # here: the package's own __init__ may import this room
    from atpatch_onnx.report.environment import environment

    tone = TONES[found.verdict]
    return (
        environment()
        .get_template("found.html.j2")
        .render(
            title=shown(title),
            version=__version__,
            found=found,
            tone=tone,
            mark=MARKS[tone],
            pictures=[_picture(part) for part in found.parts],
        )
    )


def _picture(part: Part) -> list[list[tuple[str, bool]]] | None:
    """Grey values and whether the part lies there, by row, of an image with the part; None of other inputs."""
    for array in part.shown.values():
        if array.ndim == 3 and array.shape[0] in (1, 3) and min(array.shape[1:]) > 1:
            pixels = images.to_pixels(array)
            grey = pixels if pixels.ndim == 2 else pixels.mean(axis=2)
            step = max(1, -(-max(grey.shape) // CELLS))
            thinned = max(1, -(-max(array.shape[1:]) // images.MAX_PIXELS))
            marks = _marks(part, array)[::thinned, ::thinned]
            return [
                [
                    (f"{100 * grey[row, column]:.0f}%", bool(marks[row, column]))
                    for column in range(0, grey.shape[1], step)
                ]
                for row in range(0, grey.shape[0], step)
            ]
    return None


def _marks(part: Part, image: NDArray[Any]) -> NDArray[np.bool_]:
    marks = np.zeros(image.shape[1:], np.bool_)
    for rows, columns in part.boxes:
        marks[rows[0] : rows[1], columns[0] : columns[1]] = True
    return marks
