"""What the template shows, and the template filled in. Needs the extra `report`; `html` is the way in."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from atpatch_onnx.baking.metadata import PatchRecord
from atpatch_onnx.measuring.evaluate import Evaluation
from atpatch_onnx.measuring.examples import Example, ExampleSide, Story
from atpatch_onnx.measuring.verify import Verification
from atpatch_onnx.patches.patch import Patch
from atpatch_onnx.report import images, pictures, rows
from atpatch_onnx.report.environment import environment
from atpatch_onnx.report.glossary import terms
from atpatch_onnx.report.rows import number, percent, residual, shown
from atpatch_onnx.report.svg import Picture
from atpatch_onnx.report.verdict import judge, missed_goal
from atpatch_onnx.running.metrics import Difference, Rate

STORIES: Mapping[Story, tuple[str, str]] = {
    Story.REPAIRED: ("Repaired", "The base follows the change, the patched model does not."),
    Story.MISSED: ("Missed", "The patched model still follows the change."),
    Story.FALSE_ALARM: ("False alarm", "A benign token of the clean input is flagged."),
    Story.UNTOUCHED: ("Left alone", "Nothing is flagged on the clean input; its outputs are the base's bit for bit."),
}

SITES_IN_DETAIL = 4
"""Sites whose attention is drawn per example; the site with the largest change comes first."""


@dataclass(frozen=True)
class _Side:
    """One side of an example."""

    name: str
    side: ExampleSide
    picture: Picture | None
    strip: tuple[images.Chip, ...]


@dataclass(frozen=True)
class _Card:
    """One example."""

    example: Example
    story: str
    meaning: str
    sides: tuple[_Side, ...]
    site: str
    maps: Picture | None
    received: tuple[Picture, ...]


def render(
    title: str,
    patch: Patch | PatchRecord,
    evaluation: Evaluation | None,
    verification: Verification | None,
    examples: tuple[Example, ...],
    seconds: float | None,
) -> str:
    """The page."""
    from atpatch_onnx import __version__  # here: the package's own __init__ may import this room

    figures, sites = patch.figures, rows.site_rows(patch.figures)
    templates = environment()
    templates.tests |= {
        "rate": lambda value: isinstance(value, Rate),
        "difference": lambda value: isinstance(value, Difference),
    }
    return templates.get_template("report.html.j2").render(
        title=shown(title),
        version=__version__,
        seconds=number(seconds),
        verdict=judge(patch, evaluation, verification),
        evaluation=evaluation,
        metrics=() if evaluation is None else rows.before_after(evaluation),
        tiles=_tiles(evaluation, verification),
        detector=() if evaluation is None else rows.detector_rows(evaluation),
        curve=_curve(evaluation),
        cards=[_card(example, number) for number, example in enumerate(examples)],
        sites=sites,
        edits=rows.edit_rows(figures),
        contributions=_contributions(figures, sites),
        residual=residual(figures),
        verification=verification,
        checks=[] if verification is None else rows.check_lines(verification),
        identity=_identity(patch),
        goal=rows.goal_rows(figures),
        missed=missed_goal(figures),
        terms=terms(patch.figures, evaluation),
        svg=_markup,
    )


def _markup(picture: Picture) -> Markup:
    """One of our pictures for the page as it is; matplotlib has escaped the text in it."""
    return Markup(picture.svg)


def _curve(evaluation: Evaluation | None) -> Markup | None:
    if evaluation is None or evaluation.columns is None:
        return None
    return _markup(pictures.precision_recall(evaluation, "curve"))


def _tiles(evaluation: Evaluation | None, verification: Verification | None) -> list[tuple[str, str, str]]:
    """The figures that matter most: what, how much, and how much it was."""
    tiles = []
    if evaluation is not None:
        was, now = evaluation.accuracy_base, evaluation.accuracy_patched
        if evaluation.backdoor is not None:
            attack = evaluation.backdoor
            tiles.append(("Attack success", percent(attack.asr_patched.value), f"was {percent(attack.asr_base.value)}"))
        if evaluation.fairness is not None:
            flips = evaluation.fairness
            tiles.append(("Flip rate", percent(flips.uf_patched.value), f"was {percent(flips.uf_base.value)}"))
        tiles.append(("Clean accuracy", percent(now.value), f"was {percent(was.value)}"))
        flagged = evaluation.clean_flag_rate
        tiles.append(("Clean inputs flagged", percent(flagged.value), f"of {flagged.count:,}"))
    if verification is not None:
        passed = len(verification.checks) - len(verification.failures)
        verdict = "all passed" if verification.passed else f"{len(verification.failures)} failed"
        tiles.append(("Checks passed", f"{passed} of {len(verification.checks)}", verdict))
    return tiles


def _contributions(figures: Mapping[str, Any], sites: tuple[rows.SiteRow, ...]) -> Picture | None:
    goal = rows.goal_rows(figures)
    reached, bound = (goal[0].reached, goal[0].bound) if goal else (None, None)
    elements = [element for site in sites for element in site.elements]
    return pictures.contributions(elements, reached, bound, residual(figures), "contributions")


def _identity(patch: Patch | PatchRecord) -> list[tuple[str, str]]:
    """What the file says of itself, apart from its sites and its goal."""
    found = rows.facts(patch)
    if isinstance(patch, PatchRecord):
        monitors = ", ".join(map(shown, patch.monitors)) or "none"
        found[2:2] = [
            ("Written as", "with If" if patch.conditional else "without If"),
            ("Monitoring outputs", monitors),
        ]
    return found


def _card(example: Example, number: int) -> _Card:
    story, meaning = STORIES[example.story]
    only_clean = example.story is Story.UNTOUCHED
    names = ("clean",) if only_clean else ("clean", "counterfactual")
    shown_side = example.clean if example.story in (Story.UNTOUCHED, Story.FALSE_ALARM) else example.counterfactual
    change = [float(np.abs(view.after - view.before).max()) for view in shown_side.sites]
    order = list(np.argsort(change, kind="stable")[::-1])
    maps = None
    if order:
        maps = pictures.attention_maps(shown_side.sites[order[0]], shown_side.flags, f"example-{number}-map")
    return _Card(
        example=example,
        story=story,
        meaning=meaning,
        sides=tuple(_side(example, name, f"example-{number}-{name}") for name in names),
        site=shown(shown_side.sites[order[0]].site) if order else "",
        maps=maps,
        received=()
        if only_clean
        else tuple(
            pictures.received_attention(example, int(site), f"example-{number}-site-{site}")
            for site in sorted(order[:SITES_IN_DETAIL])
        ),
    )


def _side(example: Example, name: str, key: str) -> _Side:
    side = example.clean if name == "clean" else example.counterfactual
    other = example.counterfactual if name == "clean" else example.clean
    found = images.find_image(side.inputs, len(side.flags))
    if found is not None:
        source, grid = found
        pixels = images.to_pixels(side.inputs[source], other.inputs[source])
        picture = pictures.flagged_image(pixels, grid, side.flags, side.anomalous, key, f"The {name} input")
        return _Side(name, side, picture, ())
    visible = side.sites[0].visible if side.sites else np.ones(len(side.flags), np.bool_)
    visible = visible if visible.shape == side.flags.shape else np.ones(len(side.flags), np.bool_)
    return _Side(name, side, None, images.strip(side.inputs, side.flags, side.anomalous, visible))
