"""Aim a drawn patch: some tokens of one sample are flagged, at the first site of every token axis, and carried on."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.probe import key_output, probe
from atpatch_onnx.baking.write import constants, write
from atpatch_onnx.errors import RunError
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.measuring.drawn import NEVER
from atpatch_onnx.measuring.rehearse_base import BaseRuns
from atpatch_onnx.patches.patch import Detector, Patch, SitePatch
from atpatch_onnx.running.sessions import Array, Session

_GAP = 1e-4
"""Two scores this far apart, relative to the largest, stay on their sides of a threshold however they are rounded."""


def aimed(
    base: ir.Model, sites: Sequence[AttentionSite], patch: Patch, runs: BaseRuns, threads: int | None
) -> tuple[Patch, NDArray[np.bool_]]:
    """The same patch with thresholds such that some tokens fire, and which samples it flags, bool `[samples]`.

    One sample where its scores allow it: the one with the highest. Of its tokens at most half are flagged. One site is
    aimed at after the other: what fires at one moves the keys of all behind it, whatever their token axis.
    """
    flagged: list[NDArray[np.bool_]] = []
    entries = {entry.site: entry for entry in patch.sites}
    seen: set[str] = set()
    for number, site in enumerate(sites):
        if site.token_axis in seen:
            continue
        seen.add(site.token_axis)
        detector = entries[site.name].detector
        assert isinstance(detector, Detector), "drawn sites read keys"
        before = [(other, entries[other.name]) for other in sites[:number]]
        keys = _keys(base, site, before, runs, threads)
        with np.errstate(over="ignore", invalid="ignore"):
            scores = detector.scores(keys)
        threshold = threshold_of(scores)
        entries[site.name] = replace(entries[site.name], detector=replace(detector, threshold=threshold))
        own = (scores > threshold).any(axis=1)
        shared = site.parts == 0 and bool(own.any())  # samples share a map
        flagged.append(np.asarray(own | shared, np.bool_))
    return replace(patch, sites=tuple(entries.values())), np.asarray(np.any(flagged, axis=0))


def _keys(
    base: ir.Model,
    site: AttentionSite,
    before: Sequence[tuple[AttentionSite, SitePatch]],
    runs: BaseRuns,
    threads: int | None,
) -> Array:
    """The keys of a site behind patched ones, float `[samples, tokens, features]`."""
    model = graphs.copy(base)
    write(model, before, constants, conditional=False)
    session = Session(probe(model, [site]), optimize=runs.levels[0].optimize, threads=threads)
    wanted = {name: array for name, array in runs.inputs.items() if name in session.input_names}
    return session.run(wanted)[key_output(site)]


def threshold_of(scores: NDArray[np.float64]) -> float:
    """In the widest gap between scores of the sample with the highest one, above all others' and its own median.

    Args:
        scores: Of each token, float `[samples, tokens]`.

    Raises:
        RunError: There are none.
    """
    if not scores.size:
        raise RunError(
            "the inputs",
            expected="at least one sample and one token",
            found=f"{len(scores)} samples of {scores.shape[1]} tokens",
            advice="Give larger inputs.",
        )
    scores = np.where(np.isfinite(scores), scores, -NEVER)
    best = int(scores.max(axis=1).argmax())
    floor = max(float(np.median(scores[best])), float(np.delete(scores, best, axis=0).max(initial=-np.inf)))
    own = np.unique(scores[best])[::-1]
    ends = [max(low, floor) for low in own[1:]] + [floor]
    width, high, low = max((high - low, high, low) for high, low in zip(own, ends, strict=True))
    if width <= _GAP * max(abs(high), abs(low)):  # equal samples, or tokens that are all alike
        return float(np.float32(own[0] - max(abs(float(own[0])), 1.0) * 1e-2))
    return float(np.float32((high + low) / 2))
