"""From a matplotlib figure to one inline `<svg>`: no fixed colours, no fixed size, the same bytes every time.

Pictures are drawn in stand-in colours, which become CSS variables here: one picture serves light, dark and paper.
matplotlib's global state is left alone: no pyplot, and settings are only changed within `style`.
"""

import hashlib
import html
import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib import RcParams
from matplotlib.figure import Figure

TEXT, RULE, PAPER = "#010101", "#020202", "#030303"
BEFORE, AFTER, CLEAN, FLAG = "#040404", "#050505", "#060606", "#070707"

VARIABLES: Mapping[str, str] = {
    TEXT: "currentColor",
    RULE: "var(--rule, #c8ccd2)",
    PAPER: "var(--paper, #ffffff)",
    BEFORE: "var(--before, #d55e00)",
    AFTER: "var(--after, #0072b2)",
    CLEAN: "var(--clean, #6b7280)",
    FLAG: "var(--flag, #d55e00)",
}
"""What each stand-in becomes. The fallbacks are of Okabe and Ito's palette, told apart with any colour vision."""

FONT_SIZE = 10.0

_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.image_inline": True,
    "font.family": "sans-serif",
    "font.size": FONT_SIZE,
    "text.parse_math": False,  # names are untrusted: a $ in one is no formula
    "text.usetex": False,
    "axes.unicode_minus": False,
    "text.color": TEXT,
    "axes.edgecolor": RULE,
    "axes.labelcolor": TEXT,
    "axes.titlecolor": TEXT,
    "axes.titlesize": FONT_SIZE,
    "axes.labelsize": FONT_SIZE,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "figure.facecolor": "none",
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": TEXT,
    "ytick.labelcolor": TEXT,
    "xtick.labelsize": FONT_SIZE - 1,
    "ytick.labelsize": FONT_SIZE - 1,
    "legend.frameon": False,
    "legend.fontsize": FONT_SIZE - 1,
    "hatch.linewidth": 0.8,
}


@dataclass(frozen=True)
class Picture:
    """A picture for a page."""

    svg: str
    """One `<svg>` element; everything untrusted in it is escaped."""

    alt: str
    """What it shows, in words."""


@contextmanager
def style(name: str) -> Iterator[None]:
    """Our settings, for as long as a picture is drawn and written; `name` keeps its ids apart from other pictures'."""
    with matplotlib.rc_context(), warnings.catch_warnings():
        # Text stays text: the reader's browser has the glyphs that matplotlib's font lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        # Not the backend: to look at it would choose one, and import pyplot.
        defaults = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
        matplotlib.rcParams.update(RcParams(defaults))
        matplotlib.rcParams.update(RcParams({**_SETTINGS, "svg.hashsalt": name}))
        yield


def to_picture(figure: Figure, name: str, alt: str) -> Picture:
    """Write a figure, within `style`."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    width = figure.get_size_inches()[0] * 96
    return Picture(_inline(buffer.getvalue(), name, alt, width), alt)


def _inline(svg: str, name: str, alt: str, width: float) -> str:
    """An element for a page of a file for itself: sized by the page, named, ids its own, colours the page's."""
    found = re.search(r'<svg[^>]*viewBox="([^"]+)"[^>]*>', svg)
    assert found is not None, "matplotlib writes a view box"
    body = re.sub(r"<metadata>.*?</metadata>", "", svg[found.end() :], flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->\s*", "", body, flags=re.DOTALL)  # matplotlib repeats every text as a comment
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', body))
    prefix = hashlib.sha256(name.encode()).hexdigest()[:8]
    ids = {old: f"{prefix}-{number}" for number, old in enumerate(re.findall(r' id="([^"]+)"', body)) if old in used}
    body = re.sub(r' id="([^"]+)"', lambda m: f' id="{ids[m[1]]}"' if m[1] in ids else "", body)
    body = re.sub(r'(url\(#|href="#)([^")]+)', lambda m: m[1] + ids.get(m[2], m[2]), body)
    body = re.sub(r"font: (?:(\d+) )?([\d.]+)px [^;\"]*", lambda m: f"font: {m[1] or 400} {m[2]}px var(--sans)", body)
    body = re.sub(r"#0[1-7]0[1-7]0[1-7]", lambda m: VARIABLES.get(m[0], m[0]), body)
    body = re.sub(r"\n\s*", "\n", body)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img"'
        f' aria-label="{html.escape(alt)}" viewBox="{found[1]}" style="max-width:{width:.0f}px">{body.strip()}'
    )
