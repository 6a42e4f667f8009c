"""Which pairs go to which part: reproducible, balanced over labels, and no clean input in two parts.

Pairs that share a clean input, byte for byte, form a group; so do two pairs of which one's counterfactual is the
other's clean input, as happens when a protected attribute is flipped in a table. Groups are never divided. Their order
within a label comes from hashing the seed with their content, so that neither the order of the rows nor numpy's random
generator matters; each group then goes to the part that lacks most of its share.
"""

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from atpatch_onnx.debugset.arrays import Array
from atpatch_onnx.errors import DebugSetError

_AT_ONCE = 2**24
"""Bytes of rows that are read together: they may be stored in a file."""


def part_rows(
    clean: Mapping[str, Array],
    counterfactual: Mapping[str, Array],
    labels: NDArray[np.int64] | None,
    *,
    shares: Mapping[str, float],
    seed: int,
) -> dict[str, NDArray[np.int64]]:
    """Rows `[n]` int64 of each part, ascending; together all rows, each once.

    Both sides are arrays `[pairs, ...]` by input name; parts are balanced by the labels, int64 `[pairs]`.
    """
    if not all(0 < share <= 1 for share in shares.values()) or abs(sum(shares.values()) - 1) > 1e-6:
        raise DebugSetError(
            "split",
            expected="positive shares that add up to 1",
            found=", ".join(f"{part}={share:g}" for part, share in shares.items()),
            advice="Give every part a share, such as fit=0.5, calibration=0.25, validation=0.25.",
        )
    groups = _groups(_digests(clean), _digests(counterfactual))
    parts = list(shares)
    rows: dict[str, list[int]] = {part: [] for part in parts}
    placed = 0
    for group in sorted(groups, key=lambda group: _place(group, groups[group], labels, seed)):
        placed += len(groups[group])
        neediest = max(parts, key=lambda part: shares[part] * placed - len(rows[part]))
        rows[neediest] += groups[group]
    if not all(rows.values()):
        raise DebugSetError(
            "split",
            expected="at least one pair in each part",
            found=", ".join(f"{part}: {len(rows[part])}" for part in parts)
            + f" (from {placed} pairs, {len(groups)} of them unlike the others)",
            advice="Add pairs with other clean inputs, or give the empty part a larger share.",
        )
    return {part: np.array(sorted(rows[part]), dtype=np.int64) for part in parts}


def _digests(inputs: Mapping[str, Array]) -> list[bytes]:
    """Hash each row over all inputs; the byte length of a row is the same for all rows."""
    digests = []
    rows = len(next(iter(inputs.values())))
    step = max(1, _AT_ONCE * rows // max(1, sum(array.nbytes for array in inputs.values())))
    for start in range(0, rows, step):
        some = [inputs[name][start : start + step] for name in sorted(inputs)]
        for cells in zip(*some, strict=True):
            content = hashlib.blake2b(digest_size=16)
            for cell in cells:
                content.update(cell.tobytes())
            digests.append(content.digest())
    return digests


def _groups(clean: Sequence[bytes], counterfactual: Sequence[bytes]) -> dict[bytes, list[int]]:
    """Rows by the smallest hash among the clean inputs of their group (union-find over the hashes)."""
    parent = {digest: digest for digest in clean}

    def root(digest: bytes) -> bytes:
        while parent[digest] != digest:
            parent[digest] = parent[parent[digest]]
            digest = parent[digest]
        return digest

    for before, after in zip(clean, counterfactual, strict=True):
        if after in parent:
            low, high = sorted((root(before), root(after)))
            parent[high] = low
    groups = defaultdict(list)
    for row, digest in enumerate(clean):
        groups[root(digest)].append(row)
    return dict(groups)


def _place(group: bytes, rows: list[int], labels: NDArray[np.int64] | None, seed: int) -> tuple[int, bytes]:
    label = 0 if labels is None else int(labels[rows].min())
    return label, hashlib.blake2b(f"{seed} ".encode() + group).digest()
