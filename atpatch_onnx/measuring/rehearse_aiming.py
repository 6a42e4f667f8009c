"""Draw a patch and aim it: flags for one sample of the batch, none for the others, half of its columns benign."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.baking.emission import Emission
from atpatch_onnx.baking.features import choose_features
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.measuring.rehearse_base import BaseRuns, Inside
from atpatch_onnx.measuring.rehearse_drawing import (
    NEVER,
    draw_detector,
    draw_prototypes,
    draw_redistribution,
    feature_count,
)
from atpatch_onnx.measuring.rehearse_samples import flagged_samples
from atpatch_onnx.measuring.rehearse_trial import Scores, Trial
from atpatch_onnx.patches.patch import Detector, SitePatch

DRAWS = 8
"""Pairs of prototypes that are drawn for a site until one has a threshold as wanted."""

_GAP = 1e-5
"""Two scores this far apart stay on their sides of a threshold between them, however they are rounded."""


def draw_entries(sites: Sequence[AttentionSite], inside: Inside, rng: np.random.Generator) -> tuple[SitePatch, ...]:
    """A patch of all sites that never fires."""
    entries = []
    for site in sites:
        features = choose_features(site)
        _, kv_heads, _, depth = inside.value_shapes[site.name]
        detector = draw_detector(rng, features, feature_count(features, inside.maps[site.name].shape), NEVER)
        entries.append(SitePatch(site.name, detector, draw_redistribution(rng, kv_heads, depth)))
    return tuple(entries)


def aimed(
    base: ir.Model,
    sites: Sequence[AttentionSite],
    entries: Sequence[SitePatch],
    runs: BaseRuns,
    emission: Emission,
    rng: np.random.Generator,
    threads: int | None,
) -> tuple[tuple[SitePatch, ...], NDArray[np.bool_]]:
    """The same patch with prototypes and thresholds such that some columns of one sample fire.

    Sites are set one after the other, since flags of one move the scores of the next. A site that would not spare the
    other samples and enough columns is left to the flags that are carried to it; where none are, it is drawn anew.

    Returns:
        The patch, and which samples it flags, `[samples]`.
    """
    trial = Trial(base, list(zip(sites, entries, strict=True)), runs, emission, threads)
    detectors = {entry.site: entry.detector for entry in entries if entry.detector is not None}
    target = _target(trial.run(detectors).values())
    for site in sites:
        silent_one = detectors[site.name]
        best: _Aim | None = None
        carried = False
        for _ in range(DRAWS):
            found = trial.run(detectors)[site.name]
            aims = _aims(found, detectors[site.name], target)
            best = max((aim for aim in (best, *aims) if aim is not None), key=lambda aim: aim.rank, default=None)
            carried = bool(found.flags.any())
            if carried or (best is not None and best.spares):
                break
            detectors[site.name] = replace(silent_one, prototypes=draw_prototypes(rng))
        chosen = best is not None and (best.spares or not carried)
        detectors[site.name] = best.detector if best is not None and chosen else silent_one
    flagged = flagged_samples(sites, [found.flags for found in trial.run(detectors).values()])
    return tuple(replace(entry, detector=detectors[entry.site]) for entry in entries), flagged


def _target(scores: Iterable[Scores]) -> int:
    """The sample that most often has the highest or the lowest score of a site."""
    leads: Counter[int] = Counter()
    for found in scores:
        if found.seen.any():
            seen = np.where(found.seen, found.scores, np.nan)
            leads.update(int(at) // seen.shape[1] for at in (np.nanargmax(seen), np.nanargmin(seen)))
    return max(leads, key=lambda sample: leads[sample], default=0)


@dataclass(frozen=True, eq=False)
class _Aim:
    """A detector that some column of the chosen sample makes fire."""

    detector: Detector
    alone: bool
    """Whether no other sample makes it fire."""

    sparing: bool
    """Whether half of the sample's columns stay benign."""

    gap: float
    """How far apart the scores on both sides of the threshold are."""

    @property
    def spares(self) -> bool:
        return self.alone and self.sparing

    @property
    def rank(self) -> tuple[bool, bool, float]:
        return (self.alone, self.sparing, self.gap)


def _aims(found: Scores, detector: Detector, target: int) -> Iterator[_Aim]:
    """All thresholds that some column of the sample `target` exceeds."""
    half = found.seen[target].sum() / 2
    for swapped in (False, True):  # prototypes that change places negate every score exactly
        scores = -found.scores if swapped else found.scores
        prototypes = detector.prototypes[::-1] if swapped else detector.prototypes
        steps = np.unique(scores[found.seen])
        for low, high in zip([*steps[:1] - 1, *steps[:-1]], steps, strict=True):
            threshold = float(np.float32((low + high) / 2))
            own = (scores > threshold) & found.seen
            if own[target].any() and high - low >= _GAP:
                flagged = (own | found.flags)[target] & found.seen[target]
                yield _Aim(
                    replace(detector, threshold=threshold, prototypes=prototypes),
                    alone=bool(own.sum() == own[target].sum()),
                    sparing=bool(flagged.sum() <= half),
                    gap=float(high - low),
                )
