"""A patch: everything that was fitted, and its `.safetensors` file.

The file (schema 4) holds one metadata entry, `atpatch`, a JSON object with `schema_version`, `base` (fingerprint of the
model the patch was fitted on), `after` (ids of patches that were in that model), `id` (digest of everything else),
`sites` (what each site does), `joint` (whether they decide jointly), `edits` (which hidden units are edited) and
`figures` (what the fit measured); and the tensors `<number of the site>/<field>`, `joint/<field>` and
`edits/<number>/<field>`. Nothing in it depends on when or where it was
written: the same fit gives the same bytes. A patch file is untrusted input: sizes, shapes, types and values are checked
before use.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from atpatch_onnx.errors import PatchFileError

SCHEMA_VERSION = 4
MAX_BYTES = 2**30
"""Patches are a few megabytes; a larger file is refused unread."""

OFFSET = 0.01
"""What detectors add to a column feature before they take its logarithm, in units of the uniform share."""

MAX_UNITS = 2**31
"""Hidden units that a layer may have: no index needs more than 32 bits."""

MAX_REACH = 4.001
"""Scores are differences of two cosines: no two are farther apart than 4, and a little more lets the lowest exceed."""

Array = NDArray[np.float32]


class Features(StrEnum):
    """Which column features a detector reads; see `atpatch_onnx.baking.features`."""

    WHOLE = "whole"
    """The whole column, `heads * queries` weights: fixed-length, unmasked maps."""

    LANDMARKS = "landmarks"
    """The column at eight queries, evenly spaced over a sample's tokens, which padding does not change."""

    SUMMARY = "summary"
    """Eight summaries a head that do not change with padding: every other map."""


@dataclass(frozen=True, eq=False)
class Detector:
    """Names anomalous columns: encoder to a unit-norm embedding, scored against two prototypes. All arrays float32.

    The encoder reads `log(x + OFFSET)` of every column feature x: attention weights have heavy tails, in which a linear
    scale hides what is common.
    """

    features: Features
    mean: Array
    """`[features, 1]`: benign mean of the logarithm of each column feature, in units of the uniform share."""

    scale: Array
    """`[features, 1]`: its benign standard deviation, with a floor."""

    weight_1: Array
    """`[hidden, features]`."""

    bias_1: Array
    """`[hidden, 1]`."""

    weight_2: Array
    """`[embedding, hidden]`."""

    bias_2: Array
    """`[embedding, 1]`."""

    prototypes: Array
    """`[2, embedding]`, unit norm: benign, anomalous."""

    threshold: float
    """A column is anomalous when its score exceeds this."""

    reach: float = 0.0
    """Once a column of an input exceeds the threshold, it is lower by this for the others: hysteresis, as of edges in
    Canny, 1986. The rest of a trigger is named with its strongest column, and no more inputs are flagged.
    """

    @property
    def direction(self) -> Array:
        """`[1, embedding]`: score = direction . embedding = similarity to anomalous - similarity to benign."""
        return np.asarray(self.prototypes[1] - self.prototypes[0], np.float32)[None, :]


@dataclass(frozen=True, eq=False)
class Redistribution:
    """What a site does with flagged columns."""

    beta: Array
    """Benign attention in [0, 1]: `[1, 1, 1]`, or `[heads, queries, 1]` for a profile per head and query."""

    neutral: Array | None
    """`[kv heads, depth]`: the neutral value; None: tokens keep their own value, as in the paper."""


@dataclass(frozen=True, eq=False)
class SitePatch:
    """What the patch does at one site: detect, redistribute, or both."""

    site: str
    """Name of the `AttentionSite`."""

    detector: Detector | None
    redistribution: Redistribution | None


@dataclass(frozen=True, eq=False)
class Joint:
    """One decision for all sites: a column is anomalous when the weighted sum of its scores exceeds the threshold.

    All sites score the base's own maps. Where a column of an input is anomalous, the model runs once more and
    redistributes there at all chosen sites, none of which decides too late. The thresholds of the detectors are unused.
    Ours; in the paper every site decides for itself.
    """

    weights: Array
    """`[detecting sites]`, in the order of the sites; none is negative, and their sum is 1."""

    threshold: float
    reach: float = 0.0
    """As of a `Detector`."""


@dataclass(frozen=True, eq=False)
class LayerEdit:
    """What the patch does to hidden units of one layer, whatever the input: `h_u` becomes `factor_u h_u + constant_u`.

    A factor of 0 freezes a unit at its constant.
    """

    layer: str
    """Name of the `HiddenLayer`."""

    units: NDArray[np.int64]
    """`[edited]`, ascending."""

    factor: Array
    """`[edited]`."""

    constant: Array
    """`[edited]`."""


@dataclass(frozen=True, eq=False)
class Patch:
    """A fitted fix for one model: of its attention, of its hidden units, or of both."""

    base: str
    """Fingerprint of the model it was fitted on."""

    sites: tuple[SitePatch, ...]
    """The chosen sites, in the order of the graph."""

    figures: Mapping[str, Any] = field(default_factory=dict)
    """What the fit measured, JSON types only."""

    edits: tuple[LayerEdit, ...] = ()
    """The edited layers, in the order of the graph."""

    after: tuple[str, ...] = ()
    """Ids of the patches that were in the model when this one was fitted; see `compose`."""

    joint: Joint | None = None
    """How the sites decide together; None: each for itself, and flags are carried to those behind it."""

    @property
    def id(self) -> str:
        """Digest of the patch's content; two patches with one id do the same."""
        digest = hashlib.sha256(_header(self, patch_id=None).encode())
        for name, tensor in sorted(_tensors(self).items()):
            digest.update(f"{name}:{tensor.shape}".encode())
            digest.update(np.ascontiguousarray(tensor, "<f4").tobytes())
        return digest.hexdigest()[:16]

    @property
    def weights(self) -> dict[str, float]:
        """Of the detecting sites of a joint decision, by name; ValueError where there are not as many."""
        detecting = [entry.site for entry in self.sites if entry.detector is not None]
        weights = [] if self.joint is None else self.joint.weights.tolist()
        return dict(zip(detecting, weights, strict=True)) if self.joint is not None else {}

    @property
    def meets_target(self) -> bool:
        """Whether the fit reached its target; False only for patches written with `force`."""
        return bool(self.figures.get("meets_target", True))

    def with_figures(self, figures: Mapping[str, Any]) -> "Patch":
        """The same patch with other figures."""
        return replace(self, figures=dict(figures))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the patch as `.safetensors`; the file appears whole or not at all.

        Raises:
            PatchFileError: The target cannot be written.
        """
        path = Path(path)
        staged = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            staged.write_bytes(self.to_bytes())
            os.replace(staged, path)
        except OSError as error:
            staged.unlink(missing_ok=True)
            raise PatchFileError(
                str(path), expected="a place that can be written to", found=str(error), advice="Choose another path."
            ) from error

    def to_bytes(self) -> bytes:
        """The bytes of the patch file."""
        metadata = {"atpatch": _header(self, patch_id=self.id)}
        return bytes(safetensors.numpy.save(_tensors(self), metadata=metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Patch":
        """Read a patch file.

        Raises:
            PatchFileError: The file is missing, damaged, no patch, of another schema, or its content does not match
                its id.
        """
        return _load(Path(path))


_DETECTOR_TENSORS = ("mean", "scale", "weight_1", "bias_1", "weight_2", "bias_2", "prototypes")


def _tensors(patch: Patch) -> dict[str, Array]:
    tensors: dict[str, Array] = {}
    for number, site in enumerate(patch.sites):
        if site.detector is not None:
            for name in _DETECTOR_TENSORS:
                tensors[f"{number}/{name}"] = np.ascontiguousarray(getattr(site.detector, name), np.float32)
            tensors[f"{number}/threshold"] = np.array([site.detector.threshold], np.float32)
            tensors[f"{number}/reach"] = np.array([site.detector.reach], np.float32)
        if site.redistribution is not None:
            tensors[f"{number}/beta"] = np.ascontiguousarray(site.redistribution.beta, np.float32)
            if site.redistribution.neutral is not None:
                tensors[f"{number}/neutral"] = np.ascontiguousarray(site.redistribution.neutral, np.float32)
    if patch.joint is not None:
        tensors["joint/weights"] = np.ascontiguousarray(patch.joint.weights, np.float32)
        tensors["joint/threshold"] = np.array([patch.joint.threshold], np.float32)
        tensors["joint/reach"] = np.array([patch.joint.reach], np.float32)
    for number, edit in enumerate(patch.edits):
        tensors[f"edits/{number}/factor"] = np.ascontiguousarray(edit.factor, np.float32)
        tensors[f"edits/{number}/constant"] = np.ascontiguousarray(edit.constant, np.float32)
    return tensors


def _header(patch: Patch, *, patch_id: str | None) -> str:
    sites = [
        {
            "site": site.site,
            "features": None if site.detector is None else site.detector.features.value,
            "redistributes": site.redistribution is not None,
            "value": None
            if site.redistribution is None
            else ("own" if site.redistribution.neutral is None else "neutral"),
        }
        for site in patch.sites
    ]
    header = {
        "schema_version": SCHEMA_VERSION,
        "base": patch.base,
        "after": list(patch.after),
        "sites": sites,
        "joint": patch.joint is not None,
        "edits": [{"layer": edit.layer, "units": edit.units.tolist()} for edit in patch.edits],
        "figures": patch.figures,
        "id": patch_id,
    }
    return json.dumps(header, sort_keys=True)


def _load(path: Path) -> Patch:
    if not path.is_file():
        raise PatchFileError(
            str(path), expected="a patch file (.safetensors)", found="nothing there", advice="Check the path."
        )
    if path.stat().st_size > MAX_BYTES:
        raise _refused(path, f"a file of at most {MAX_BYTES} bytes", f"{path.stat().st_size} bytes")
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if "atpatch" not in metadata:
                raise _refused(path, "the metadata entry 'atpatch'", "a safetensors file without it")
            tensors = {}
            for name in file.keys():  # noqa: SIM118 - not a mapping
                entry = file.get_slice(name)
                if entry.get_dtype() != "F32" or len(entry.get_shape()) > 3:
                    raise _refused(
                        path,
                        "float32 tensors of at most 3 dimensions",
                        f"{name!r} of type {entry.get_dtype()} and shape {entry.get_shape()}",
                    )
                tensors[name] = file.get_tensor(name)
    except (safetensors.SafetensorError, OSError) as error:
        raise _refused(path, "a complete safetensors file", str(error)) from error
    try:
        header = json.loads(metadata["atpatch"])
        schema = header["schema_version"]
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
        sites = tuple(_site(entry, number, tensors) for number, entry in enumerate(header["sites"]))
        patch = Patch(
            base=str(header["base"]),
            sites=sites,
            figures=dict(header["figures"]),
            edits=tuple(_edit(entry, number, tensors) for number, entry in enumerate(header["edits"])),
            after=tuple(str(other) for other in header["after"]),
            joint=_joint(header["joint"], tensors, sum(site.detector is not None for site in sites)),
        )
        stated = str(header["id"])
    except (KeyError, TypeError, ValueError) as error:
        raise _refused(path, "consistent sites, edits and tensors", f"{type(error).__name__}: {error}") from error
    if set(_tensors(patch)) != set(tensors):
        extra = sorted(set(tensors) - set(_tensors(patch)))
        raise _refused(path, "only the tensors that its sites and edits name", f"{extra} as well")
    if patch.id != stated:
        raise _refused(path, f"content with the id {stated}", f"content with the id {patch.id}")
    return patch


def _refused(path: Path, expected: str, found: str) -> PatchFileError:
    return PatchFileError(
        str(path),
        expected=expected,
        found=found,
        advice="This is no patch of atpatch-onnx, or it was damaged: copy it again, or fit it again.",
    )


def _edit(entry: Mapping[str, Any], number: int, tensors: Mapping[str, Array]) -> LayerEdit:
    """One edited layer from its header entry and tensors; ValueError where they do not fit together."""
    units = entry["units"]
    known = bool(units) and all(type(unit) is int and 0 <= unit < MAX_UNITS for unit in units)
    if not known or units != sorted(set(units)):
        raise ValueError(f"edit {number} has units that are not ascending numbers, each once")
    arrays = [tensors[f"edits/{number}/{name}"] for name in ("factor", "constant")]
    for array in arrays:
        if array.shape != (len(units),) or not np.isfinite(array).all():
            raise ValueError(f"edit {number} has {len(units)} units and a tensor of shape {array.shape} or not finite")
    return LayerEdit(str(entry["layer"]), np.array(units, np.int64), *arrays)


def _joint(entry: object, tensors: Mapping[str, Array], detecting: int) -> Joint | None:
    """The joint decision of so many detecting sites, if there is one; ValueError where it is none."""
    if not isinstance(entry, bool):
        raise ValueError(f"joint is {entry!r}")
    if not entry:
        return None
    weights, threshold, reach = (tensors[f"joint/{name}"] for name in ("weights", "threshold", "reach"))
    sound = weights.shape == (detecting,) and detecting > 0 and threshold.shape == reach.shape == (1,)
    if not sound or not all(np.isfinite(array).all() for array in (weights, threshold, reach)):
        raise ValueError(f"the joint decision has weights of shape {weights.shape} for {detecting} detecting sites")
    if (weights < 0).any() or abs(float(weights.sum()) - 1) > _ROUNDED or not 0 <= reach[0] <= MAX_REACH:
        raise ValueError("the joint decision has weights or a reach out of bounds")
    return Joint(weights, float(threshold[0]), float(reach[0]))


_ROUNDED = 1e-4
"""How far the sum of some float32 weights may be from 1."""

_REDISTRIBUTES = ((True, "own"), (True, "neutral"), (False, None))


def _site(entry: Mapping[str, Any], number: int, tensors: Mapping[str, Array]) -> SitePatch:
    """One site from its header entry and tensors; ValueError where they do not fit together."""

    def tensor(name: str, *shape: int | None) -> Array:
        array = tensors[f"{number}/{name}"]
        fits = len(array.shape) == len(shape) and all(
            want in (None, size) for want, size in zip(shape, array.shape, strict=True)
        )
        if not fits or array.size == 0 or not np.isfinite(array).all():
            raise ValueError(f"tensor {number}/{name} has shape {array.shape} (wanted {shape}) or is not finite")
        return array

    detector = None
    if entry["features"] is not None:
        features, hidden, embedding = (tensor(name, None, 1).shape[0] for name in ("mean", "bias_1", "bias_2"))
        detector = Detector(
            features=Features(entry["features"]),
            mean=tensor("mean", features, 1),
            scale=tensor("scale", features, 1),
            weight_1=tensor("weight_1", hidden, features),
            bias_1=tensor("bias_1", hidden, 1),
            weight_2=tensor("weight_2", embedding, hidden),
            bias_2=tensor("bias_2", embedding, 1),
            prototypes=tensor("prototypes", 2, embedding),
            threshold=float(tensor("threshold", 1)[0]),
            reach=float(tensor("reach", 1)[0]),
        )
        if not (detector.scale > 0).all() or not math.isfinite(detector.threshold):
            raise ValueError(f"site {number} has a scale that is not positive or a threshold that is not finite")
        if not 0 <= detector.reach <= MAX_REACH:
            raise ValueError(f"tensor {number}/reach is not within [0, {MAX_REACH:g}]")
    redistribution = None
    if (entry["redistributes"], entry["value"]) not in _REDISTRIBUTES:
        raise ValueError(f"site {number} says redistributes={entry['redistributes']!r} with value={entry['value']!r}")
    if entry["redistributes"]:
        beta = tensor("beta", None, None, 1)
        if not ((beta >= 0) & (beta <= 1)).all():
            raise ValueError(f"tensor {number}/beta is not within [0, 1]")
        neutral = None if entry["value"] == "own" else tensor("neutral", None, None)
        redistribution = Redistribution(beta=beta, neutral=neutral)
    if detector is None and redistribution is None:
        raise ValueError(f"site {number} neither detects nor redistributes")
    return SitePatch(site=str(entry["site"]), detector=detector, redistribution=redistribution)
