"""Look into a patched model: its inner values as outputs, for `verify`, `evaluate` and `report`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from atpatch_onnx import graph as graphs
from atpatch_onnx.baking.metadata import PatchedSite, PatchRecord, edited_file
from atpatch_onnx.baking.read_back import BakedDetector, always_on
from atpatch_onnx.debugset import DebugSet
from atpatch_onnx.errors import PatchMismatchError
from atpatch_onnx.fitting.collect import find_suspects
from atpatch_onnx.matching import find_sites
from atpatch_onnx.matching.sites import AttentionSite, Place
from atpatch_onnx.patches.patch import Places
from atpatch_onnx.running.executors import LOCAL, Executor
from atpatch_onnx.running.sessions import Array, Progress, silent


def require_base(base: ir.Model, record: PatchRecord) -> None:
    """Refuse a model that is not the one that a patched file names.

    Raises:
        PatchMismatchError: It is another.
    """
    found = graphs.fingerprint(base)
    if found != record.base:
        raise PatchMismatchError(
            "the base",
            expected=f"the model that the patched file names, {record.base}",
            found=f"a model with the fingerprint {found}",
            advice="Give the base that the patch was baked into.",
        )


def last_margin(sites: Sequence[PatchedSite]) -> str:
    """The value that holds the largest margins of one token axis: they are carried along, so the last site has them."""
    if not sites:
        raise edited_file("the metadata entry atpatch.sites", "at least one patched site", "none")
    return sites[-1].margin


def axis_sites(base: ir.Model, record: PatchRecord) -> tuple[AttentionSite, ...]:
    """The base's sites on the token axes that the patch works on; all of them where the patch names none of them."""
    sites, patched = find_sites(base), {site.site for site in record.sites}
    axes = {site.token_axis for site in sites if site.name in patched}
    return tuple(site for site in sites if site.token_axis in axes) or sites


def with_columns(
    base: ir.Model,
    patched: ir.Model,
    record: PatchRecord,
    debug: DebugSet,
    *,
    batch_size: int = 32,
    executor: Executor = LOCAL,
    progress: Progress = silent,
) -> DebugSet:
    """The debug set with its suspects, as a fit finds them; of a patch that is always on, the same in every pair.

    Raises:
        DebugSetError: The suspects do not fit the token axis, or no token differs in any pair.
    """
    how: dict[str, Any] = {"batch_size": batch_size, "executor": executor, "progress": progress}
    return find_suspects(base, axis_sites(base, record), debug, always=always_on(patched, record), **how)


def margins(
    detector: BakedDetector | Places, keys: Array, place: Place, maps: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """How far each score is above the threshold, `[maps, tokens]`, and by how much float32 may round it.

    Args:
        detector: As its file has it.
        keys: The tensor of the place.
        place: Of the site's keys.
        maps: How many there are, which tells them from tokens where they do not have an axis each.
    """
    if isinstance(detector, Places):
        marks = np.broadcast_to(detector.marks.astype(np.float64), (maps, len(detector.marks)))
        return marks - detector.threshold, _ROUNDING["FLOAT"] * (marks + abs(detector.threshold))
    tokens = [axis for axis, letters in enumerate(place.axes) if letters]
    features = [axis for axis, letters in enumerate(place.axes) if not letters]
    floats = keys if place.quantization is None else place.quantization.dequantized(keys)
    X = np.asarray(floats, np.float64).transpose(tokens + features)
    X = X.reshape(*X.shape[: len(tokens)], -1)
    W = detector.weights.astype(np.float64)
    found, size = X @ W, np.abs(X) @ np.abs(W)
    if detector.output is not None and detector.bias is not None:
        w = detector.output.astype(np.float64)
        found, size = np.maximum(found + detector.bias, 0) @ w, (size + np.abs(detector.bias)) @ np.abs(w)
    found, size = found[..., 0] - detector.threshold, size[..., 0] + np.abs(detector.threshold)
    if not place.apart and maps and found.size % maps == 0:  # else the file was edited, or there is no sample
        sizes = (maps, -1) if place.order == "nk" else (-1, maps)
        found, size = found.reshape(sizes), size.reshape(sizes)
    if place.order == "kn":
        found, size = found.T, size.T
    return found, _ROUNDING[place.dtype if place.quantization is None else "FLOAT"] * size


_ROUNDING = {"FLOAT": 1e-5, "FLOAT16": 2**-10, "BFLOAT16": 2**-7}
"""By the type of the keys, of a float32 sum, relative to the sum of its terms' sizes: many times what is seen. In half
precision a runtime may read keys before it has rounded them."""
