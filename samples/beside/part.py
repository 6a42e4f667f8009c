"""What a part of the page is: what it measures, and what it says of that."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from atpatch_onnx.running.sessions import Progress

Figures = Mapping[str, Mapping[int, dict[str, Any]]]
"""What was measured, by case and seed: JSON types."""


@dataclass(frozen=True)
class Part:
    """One table of the page, with its picture."""

    name: str
    """Such as `rivals`: of its folder of figures, and of its picture."""

    title: str
    """Its headline."""

    cases: Callable[[bool], tuple[str, ...]]
    """What is measured, in its fast form or whole: names of cases, or of its own."""

    measure: Callable[[str, int, Path, bool, Progress], dict[str, Any]]
    """Figures of a case and seed; further: the folder of trained models, whether it is the fast form, who is told."""

    section: Callable[[Figures], str]
    """Markdown without the headline; its first paragraph says what came out, and first of all what wins or resists."""

    picture: Callable[[Figures, Axes], None]
    """Draws it."""
