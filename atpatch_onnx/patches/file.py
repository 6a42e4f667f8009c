"""The `.safetensors` file of a patch.

It (schema 1) holds one metadata entry, `atpatch`, a JSON object with `schema_version`, `base` (fingerprint of the model
the patch was fitted on), `after` (ids of patches that were in that model), `id` (digest of everything else), `sites`
(what each site does), `edits` (which hidden units are edited) and `figures` (what the fit measured); and the tensors
`<number of the site>/<field>` and `edits/<number>/<field>`. Nothing in it depends on when or where it was written: the
same fit gives the same bytes. A patch file is untrusted input: sizes, shapes, types and values are checked before use.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from atpatch_onnx.errors import PatchFileError
from atpatch_onnx.files import write_whole
from atpatch_onnx.patches.patch import Array, Detector, LayerEdit, Neutral, Patch, Places, SitePatch

SCHEMA_VERSION = 1
MAX_BYTES = 2**30
"""Patches are a few megabytes; a larger file is refused unread."""

MAX_UNITS = 2**31
"""Hidden units that a layer may have: no index needs more than 32 bits."""


def tensors(patch: Patch) -> dict[str, Array]:
    """The arrays of a patch by their names in the file."""
    found: dict[str, Array] = {}
    for number, site in enumerate(patch.sites):
        of_site: dict[str, Array | None] = {}
        detector = site.detector
        if isinstance(detector, Detector):
            of_site |= {"weights": detector.weights, "bias": detector.bias, "output": detector.output}
        elif detector is not None:
            of_site["places"] = detector.marks
        if detector is not None:
            of_site["threshold"] = np.array([detector.threshold], np.float32)
        if site.neutral is not None:
            of_site |= {"neutral_key": site.neutral.key, "neutral_value": site.neutral.value}
        found |= {f"{number}/{name}": array for name, array in of_site.items() if array is not None}
    for number, edit in enumerate(patch.edits):
        found |= {f"edits/{number}/factor": edit.factor, f"edits/{number}/constant": edit.constant}
    return {name: np.ascontiguousarray(array, np.float32) for name, array in found.items()}


def header(patch: Patch, *, patch_id: str | None) -> str:
    """The metadata entry of the file."""
    sites = [
        {
            "site": site.site,
            "detects": _kind(site.detector),
            "redistributes": site.neutral is not None,
        }
        for site in patch.sites
    ]
    entries = {
        "schema_version": SCHEMA_VERSION,
        "base": patch.base,
        "after": list(patch.after),
        "sites": sites,
        "edits": [{"layer": edit.layer, "units": edit.units.tolist()} for edit in patch.edits],
        "figures": patch.figures,
        "id": patch_id,
    }
    return json.dumps(entries, sort_keys=True)


def _kind(detector: Detector | Places | None) -> str | None:
    if isinstance(detector, Detector):
        return "linear" if detector.is_linear else "hidden"
    return None if detector is None else "place"


def to_bytes(patch: Patch) -> bytes:
    """The bytes of the patch file."""
    return bytes(safetensors.numpy.save(tensors(patch), metadata={"atpatch": header(patch, patch_id=patch.id)}))


def save(patch: Patch, path: str | os.PathLike[str]) -> None:
    """Write the patch; the file appears whole or not at all."""
    path = Path(path)
    try:
        write_whole(path, to_bytes(patch))
    except OSError as error:
        raise PatchFileError(
            str(path), expected="a place that can be written to", found=str(error), advice="Choose another path."
        ) from error


def load(path: str | os.PathLike[str]) -> Patch:
    """Read a patch file."""
    path = Path(path)
    if not path.is_file():
        raise PatchFileError(
            str(path), expected="a patch file (.safetensors)", found="nothing there", advice="Check the path."
        )
    if path.stat().st_size > MAX_BYTES:
        raise _refused(path, f"a file of at most {MAX_BYTES} bytes", f"{path.stat().st_size} bytes")
    text, arrays = _content(path)
    try:
        entries = json.loads(text)
        schema = entries["schema_version"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _refused(path, "a JSON object with a schema_version", f"metadata that is none ({error!r})") from error
    if schema != SCHEMA_VERSION:
        raise PatchFileError(
            str(path),
            expected=f"schema version {SCHEMA_VERSION}",
            found=f"schema version {schema}",
            advice="Use the version of atpatch-onnx that wrote the patch, or fit it again.",
        )
    try:
        patch = Patch(
            base=str(entries["base"]),
            sites=tuple(_site(entry, number, arrays) for number, entry in enumerate(entries["sites"])),
            figures=dict(entries["figures"]),
            edits=tuple(_edit(entry, number, arrays) for number, entry in enumerate(entries["edits"])),
            after=tuple(str(other) for other in entries["after"]),
        )
        stated = str(entries["id"])
    except (KeyError, TypeError, ValueError) as error:
        raise _refused(path, "consistent sites, edits and tensors", f"{type(error).__name__}: {error}") from error
    if set(tensors(patch)) != set(arrays):
        extra = sorted(set(arrays) - set(tensors(patch)))
        raise _refused(path, "only the tensors that its sites and edits name", f"{extra} as well")
    if patch.id != stated:
        raise _refused(path, f"content with the id {stated}", f"content with the id {patch.id}")
    return patch


def _content(path: Path) -> tuple[str, dict[str, Array]]:
    """The metadata entry and the tensors, of the right types."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if "atpatch" not in metadata:
                raise _refused(path, "the metadata entry 'atpatch'", "a safetensors file without it")
            arrays = {}
            for name in file.keys():  # noqa: SIM118 - not a mapping
                entry = file.get_slice(name)
                if entry.get_dtype() != "F32" or len(entry.get_shape()) > 2:
                    found = f"{name!r} of type {entry.get_dtype()} and shape {entry.get_shape()}"
                    raise _refused(path, "float32 tensors of at most 2 dimensions", found)
                arrays[name] = file.get_tensor(name)
            return metadata["atpatch"], arrays
    except (safetensors.SafetensorError, OSError) as error:
        raise _refused(path, "a complete safetensors file", str(error)) from error


def _refused(path: Path, expected: str, found: str) -> PatchFileError:
    return PatchFileError(
        str(path),
        expected=expected,
        found=found,
        advice="This is no patch of atpatch-onnx, or it was damaged: copy it again, or fit it again.",
    )


def _edit(entry: Mapping[str, Any], number: int, arrays: Mapping[str, Array]) -> LayerEdit:
    """One edited layer from its header entry and tensors; ValueError where they do not fit together."""
    units = entry["units"]
    known = bool(units) and all(type(unit) is int and 0 <= unit < MAX_UNITS for unit in units)
    if not known or units != sorted(set(units)):
        raise ValueError(f"edit {number} has units that are not ascending numbers, each once")
    found = [arrays[f"edits/{number}/{name}"] for name in ("factor", "constant")]
    for array in found:
        if array.shape != (len(units),) or not np.isfinite(array).all():
            raise ValueError(f"edit {number} has {len(units)} units and a tensor of shape {array.shape} or not finite")
    return LayerEdit(str(entry["layer"]), np.array(units, np.int64), *found)


def _site(entry: Mapping[str, Any], number: int, arrays: Mapping[str, Array]) -> SitePatch:
    """One site from its header entry and tensors; ValueError where they do not fit together."""

    def tensor(name: str, *shape: int | None) -> Array:
        array = arrays[f"{number}/{name}"]
        fits = len(array.shape) == len(shape) and all(
            want in (None, size) for want, size in zip(shape, array.shape, strict=True)
        )
        if not fits or array.size == 0 or not np.isfinite(array).all():
            raise ValueError(f"tensor {number}/{name} has shape {array.shape} (wanted {shape}) or is not finite")
        return array

    detects, redistributes = entry["detects"], entry["redistributes"]
    if (
        detects not in (None, "linear", "hidden", "place")
        or not isinstance(redistributes, bool)
        or not (detects or redistributes)
    ):
        raise ValueError(f"site {number} says detects={detects!r} and redistributes={redistributes!r}")
    detector: Detector | Places | None = None
    neutral = None
    if detects == "place":
        marks, threshold = tensor("places", None), tensor("threshold", 1)
        if not np.isin(marks, (0, 1)).all() or not marks.any():
            raise ValueError(f"tensor {number}/places does not mark some tokens by ones among zeros")
        detector = Places(marks, threshold=float(threshold[0]))
    elif detects is not None:
        weights, threshold = tensor("weights", None, 1 if detects == "linear" else None), tensor("threshold", 1)
        units = weights.shape[1]
        bias, output = (None if detects == "linear" else tensor(name, units) for name in ("bias", "output"))
        detector = Detector(weights, bias, output, threshold=float(threshold[0]))
    if redistributes:
        key = tensor("neutral_key", None, None)
        neutral = Neutral(key, tensor("neutral_value", key.shape[0], None))
    return SitePatch(site=str(entry["site"]), detector=detector, neutral=neutral)
