"""Parts of inputs that look alike: their keys point one way at some site, and they push to one class.

Where a trigger is recognised differs: a word at the first site, marks at any place of an image behind a few layers. So
every site is asked, and the largest group of any is taken first. At late sites whatever pushes to a class may look
alike, and a large group may take in a trigger; so those of the first site, where parts have the same content, are
asked besides.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx.baking.probe import key_output, probe
from atpatch_onnx.discovery.looking import Looked
from atpatch_onnx.matching.sites import AttentionSite
from atpatch_onnx.running.sessions import Array, Progress, Session, silent

FEWEST = 3
"""Inputs of a group: what is in fewer does not recur."""

ALIKE = 0.7
"""Cosine from which parts may look alike, at least."""

UNLIKE = 0.995
"""Share of pairs of parts that push to different classes whose cosine lies below that from which parts are alike."""


@dataclass(frozen=True)
class Group:
    """Inputs whose parts look alike."""

    site: str
    target: int
    """The class that their parts push to."""

    members: tuple[int, ...]
    """Numbers of the inputs, the most typical first."""


def directions(
    model: ir.Model,
    sites: Sequence[AttentionSite],
    inputs: Mapping[str, Array],
    parts: Mapping[int, tuple[int, ...]],
    looked: Looked,
    *,
    batch_size: int = 32,
    progress: Progress = silent,
) -> dict[str, NDArray[np.float64]]:
    """The direction of each part at each site, `[parts, features]` of length 1: of its standardised keys' mean."""
    rows = np.array(list(parts), np.int64)
    own = np.zeros((len(rows), 1 + max(max(part) for part in parts.values())), np.float64)
    for at, part in enumerate(parts.values()):
        own[at, list(part)] = 1 / len(part)
    session = Session(probe(model, sites))
    found: dict[str, list[NDArray[np.float64]]] = {site.name: [] for site in sites}
    given = {name: array[rows] for name, array in inputs.items()}
    names = [key_output(site) for site in sites]
    stream = session.stream(given, names, batch_size=batch_size, progress=progress, stage="reading keys of parts")
    for batch, outputs in stream:
        for site in sites:
            mean, deviation = looked.spread[site.name]
            keys = outputs[key_output(site)][:, : own.shape[1]]
            towards = (np.einsum("nt,ntf->nf", own[batch], keys) - mean) / deviation
            found[site.name].append(towards / np.maximum(np.linalg.norm(towards, axis=1, keepdims=True), 1e-12))
    return {name: np.concatenate(batches) for name, batches in found.items()}


def groups_of(
    towards: Mapping[str, NDArray[np.float64]],
    rows: Sequence[int],
    targets: NDArray[np.int64],
) -> list[Group]:
    """Groups of parts, the largest first; no part is in two.

    Around each part, at each site, those that are alike and push to the same class; the largest such set becomes a
    group, its parts are taken out, and so on. Parts are alike from a cosine on which `UNLIKE` of the pairs that push to
    different classes do not reach, at that site.

    Args:
        towards: Directions `[parts, features]` by site.
        rows: The input's number of each part.
        targets: The class that each part pushes to `[parts]`.
    """
    left = np.ones(len(rows), np.bool_)
    same = targets[:, None] == targets[None, :]
    near = {}
    for site, own in towards.items():
        cosines = own @ own.T
        least = float(np.quantile(cosines[~same], UNLIKE)) if not same.all() else ALIKE
        near[site] = (cosines >= max(least, ALIKE)) & same, cosines
    found = []
    while left.any():
        sizes = {site: (is_near[:, left].sum(axis=1) * left) for site, (is_near, _) in near.items()}
        site = max(sizes, key=lambda one: int(sizes[one].max()))
        seed = int(sizes[site].argmax())
        if sizes[site][seed] < FEWEST:
            break
        is_near, cosines = near[site]
        members = np.flatnonzero(is_near[seed] & left)
        members = members[np.argsort(-cosines[seed, members], kind="stable")]
        found.append(Group(site, int(targets[seed]), tuple(rows[int(member)] for member in members)))
        left[members] = False
    return found
