"""Samples of a batch: which are flagged, and which outputs change in those that are not."""

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.measuring.rehearse_base import same_bits
from atpatch_onnx.running.sessions import Array


def flagged_samples(sites: Sequence[AttentionSite], flags: Iterable[Array]) -> NDArray[np.bool_]:
    """The samples with a flag at some site, `[samples]`.

    Args:
        sites: All sites.
        flags: The flags of each, `[samples, columns]`.
    """
    flagged: NDArray[np.bool_] = np.any([of_site.any(axis=1) for of_site in flags], axis=0)
    if any(site.parts == 0 for site in sites) and flagged.any():  # samples share a map, and what happens to it
        return np.ones_like(flagged)
    return flagged


def has_samples(array: Array, flagged: NDArray[np.bool_]) -> bool:
    """Whether the samples are on the first axis."""
    return array.ndim > 0 and len(array) == len(flagged)


def keeps_unflagged(expected: Array, found: Array, flagged: NDArray[np.bool_]) -> bool:
    """Whether samples without a flag keep their bits, and all their shape; true where there are no samples."""
    if expected.shape != found.shape:
        return False
    if not has_samples(expected, flagged):
        return True
    pairs = zip(expected, found, flagged, strict=True)
    return all(has_flag or same_bits(one, other) for one, other, has_flag in pairs)
