"""What detectors see of a map: which column features a site has, how many they are, and how they get into a graph.

Reading a whole map costs more than a hundredth of a large layer (docs/performance.md). Of large maps, detectors read
the rows of a few queries, the landmarks.
"""

import numpy as np
import onnx_ir as ir

from atpatch_onnx.baking.functions import LANDMARKS, SUMMARIES
from atpatch_onnx.errors import PatchMismatchError
from atpatch_onnx.graph.insertion import Insertion
from atpatch_onnx.matching.sites import AttentionSite, Dim
from atpatch_onnx.patches.patch import Features

MAX_WHOLE = 512
"""Weights that a whole column may have; columns of more are read at the landmarks."""


def choose_features(site: AttentionSite, wanted: Features | None = None) -> Features:
    """What is wanted, where a site has it; else the first of those that suit it."""
    if wanted is Features.LANDMARKS and not _has_landmarks(site):
        wanted = None
    return suitable_features(site)[0] if wanted is None else wanted


def suitable_features(site: AttentionSite) -> tuple[Features, ...]:
    """What suits a site, the cheapest first.

    Whole columns of small maps of one fixed, unmasked size; landmarks of large ones. Where something may be masked,
    landmarks and then summaries: they cost more, and tell of tokens that attend to each other, which few rows may miss.
    """
    if _is_fixed(site):
        whole = feature_count(site, Features.WHOLE)
        return (Features.WHOLE if whole is not None and whole <= MAX_WHOLE else Features.LANDMARKS,)
    return (Features.LANDMARKS, Features.SUMMARY) if _has_landmarks(site) else (Features.SUMMARY,)


def feature_count(site: AttentionSite, features: Features) -> int | None:
    """How many column features a site has; None where the site's own shape is not known."""
    if not isinstance(site.heads, int):
        return None
    if features is Features.WHOLE:
        return site.heads * site.queries if isinstance(site.queries, int) else None
    return site.heads * (LANDMARKS if features is Features.LANDMARKS else len(SUMMARIES))


def shares_in_one(site: AttentionSite, features: Features) -> int:
    """How many uniform shares a column feature of 1 is; what is read of a map says so itself where that varies: 1.

    Of maps of one size in which nothing is masked, features are the plain weights. The number of keys is folded into
    the detector, which saves a pass over them.

    Raises:
        PatchMismatchError: Whole columns are asked for, and their length is not known.
    """
    if features is not Features.WHOLE and not (features is Features.LANDMARKS and _is_fixed(site)):
        return 1
    if not isinstance(site.keys, int):
        raise PatchMismatchError(
            f"site {site.name}",
            expected="column features of a free length",
            found="a detector of whole columns",
            advice="Fit the patch again for this model.",
        )
    return site.keys


def _has_landmarks(site: AttentionSite) -> bool:
    return _is_fixed(site) or (site.self_attention and site.parts == 1)


def _is_fixed(site: AttentionSite) -> bool:
    """Whether the map has one size and nothing in it is masked."""
    return not site.masked and all(isinstance(size, int) for size in (site.heads, site.queries, site.keys))


class Landmarks:
    """The landmark queries of a graph's token axes, found once each: at the first site that asks."""

    def __init__(self) -> None:
        self._queries: dict[str, ir.Value] = {}
        self._rows: dict[tuple[str, Dim], ir.Value] = {}

    def rows(self, at: Insertion, P: ir.Value, site: AttentionSite) -> ir.Value:
        """Where the landmark rows of a site are, as `LandmarkRows` says."""
        axis = site.token_axis
        if axis not in self._queries:
            probes = at.call("ProbedQueries", P, name="probes")
            rows = rows_of(at, P, probes, "probed_rows")
            self._queries[axis] = at.call("LandmarkQueries", rows, probes, name="landmarks")
        if (axis, site.heads) not in self._rows:
            self._rows[axis, site.heads] = at.call("LandmarkRows", P, self._queries[axis], name="landmark_places")
        return self._rows[axis, site.heads]


def column_features(
    at: Insertion, P: ir.Value, site: AttentionSite, features: Features, landmarks: Landmarks
) -> ir.Value:
    """Column features `[maps, features, keys]`, float32, in units of `shares_in_one`."""
    if features is Features.WHOLE:
        return at.call("WholeColumns", P, name="features")
    if features is Features.LANDMARKS:
        return _landmark_columns(at, P, site, landmarks)
    queries = "ValidQueries" if site.self_attention else "AllQueries"
    return at.call("ColumnSummary", P, at.call(queries, P, name="valid_queries"), name="features")


def _landmark_columns(at: Insertion, P: ir.Value, site: AttentionSite, landmarks: Landmarks) -> ir.Value:
    """Where a map is of one size and nothing is masked, the rows are known now."""
    if not _is_fixed(site):
        read = at.call("RowsAt", P, landmarks.rows(at, P, site), name="landmark_rows")
        return at.call("LandmarkColumns", read, name="features")
    assert isinstance(site.queries, int)
    wanted = np.rint(np.linspace(0, site.queries - 1, LANDMARKS)).astype(np.int64)
    rows = rows_of(at, P, at.constant("landmarks", wanted), "landmark_rows")
    return at.call("WholeColumns", rows, name="features")


def rows_of(at: Insertion, P: ir.Value, queries: ir.Value, name: str) -> ir.Value:
    """The rows of the same queries in all maps, `[maps, heads, int64 [n], keys]`."""
    return at.op("Gather", P, queries, name=name, attributes=[ir.AttrInt64("axis", 2)])
