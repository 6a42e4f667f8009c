"""Patches drawn at random: of the sizes that a fit gives them, before there is a fit."""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from atpatch_onnx.fitting.options import Kind, Training
from atpatch_onnx.graph import fingerprint
from atpatch_onnx.matching.sites import AttentionSite, Place
from atpatch_onnx.patches.patch import Detector, Neutral, Patch, SitePatch
from atpatch_onnx.running.sessions import Array

NEVER = 1e30
"""A threshold that no score exceeds."""


def draw_patch(
    model: ir.Model, sites: Sequence[AttentionSite], rng: np.random.Generator, *, kind: Kind = "linear"
) -> Patch:
    """A patch that detects and redistributes at every one of these sites, with thresholds that nothing exceeds."""
    entries = [SitePatch(site.name, draw_detector(site.key, rng, kind), draw_neutral(site, rng)) for site in sites]
    return Patch(base=fingerprint(model), sites=tuple(entries))


def draw_detector(key: Place, rng: np.random.Generator, kind: Kind = "linear", threshold: float = NEVER) -> Detector:
    """A detector that gives every token a separate score."""
    units = 1 if kind == "linear" else Training().hidden
    weights = _normal(rng, key.features, units, scale=key.features**-0.5)
    if kind == "linear":
        return Detector(weights, None, None, threshold)
    return Detector(weights, _normal(rng, units), _normal(rng, units, scale=units**-0.5), threshold)


def draw_neutral(site: AttentionSite, rng: np.random.Generator) -> Neutral:
    """A neutral key and value."""
    return Neutral(*(_normal(rng, place.heads, place.depth) for place in (site.key, site.value)))


def _normal(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> Array:
    return np.asarray(scale * rng.standard_normal(shape), np.float32)
