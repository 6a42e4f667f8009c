"""A patch: everything that was fitted. Its file is `atpatch_onnx.patches.file`."""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class Detector:
    """Names anomalous tokens by their own key. All arrays float32.

    score = key @ weights, where linear; with a hidden layer, score = relu(key @ weights + bias) @ output. A token is
    anomalous when its score exceeds the threshold.
    """

    weights: Array
    """`[heads * depth, units]`, one unit where linear: learned reference queries, all heads one after the other."""

    bias: Array | None
    """`[units]`; None where linear."""

    output: Array | None
    """`[units]`; None where linear."""

    threshold: float
    """Rounded to float32, which its file and the graph hold."""

    def __post_init__(self) -> None:
        with np.errstate(over="ignore"):
            object.__setattr__(self, "threshold", float(np.float32(self.threshold)))

    @property
    def is_linear(self) -> bool:
        """Whether there is no hidden layer."""
        return self.output is None

    def scores(self, keys: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """The reference of the graph's scores: float64 `[...]`, of keys `[..., heads * depth]`."""
        found = np.asarray(keys, np.float64) @ self.weights.astype(np.float64)
        if self.output is None or self.bias is None:
            return np.asarray(found[..., 0])
        return np.asarray(np.maximum(found + self.bias, 0) @ self.output.astype(np.float64))


@dataclass(frozen=True, eq=False)
class Places:
    """Names tokens by where they stand, whatever they hold: a fix that is always on.

    score = marks, the same in every input. A token is named when its score exceeds the threshold.
    """

    marks: Array
    """`[tokens]`: 1 where a token is named, 0 elsewhere."""

    threshold: float = 0.5
    """Rounded to float32, which its file and the graph hold."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", float(np.float32(self.threshold)))


@dataclass(frozen=True, eq=False)
class Neutral:
    """What a flagged token shows and hands over instead of its own key and value: means over clean data."""

    key: Array
    """`[heads, depth]`."""

    value: Array
    """`[heads, depth]`; its depth may be another than the key's."""


@dataclass(frozen=True, eq=False)
class SitePatch:
    """What the patch does at one site: detect, redistribute, or both."""

    site: str
    """Name of the `AttentionSite`."""

    detector: Detector | Places | None
    neutral: Neutral | None
    """None: the site does not redistribute."""


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

    @property
    def id(self) -> str:
        """Digest of the patch's content; two patches with one id do the same."""
        from atpatch_onnx.patches.file import header, tensors

        digest = hashlib.sha256(header(self, patch_id=None).encode())
        for name, tensor in sorted(tensors(self).items()):
            digest.update(f"{name}:{tensor.shape}".encode())
            digest.update(np.ascontiguousarray(tensor, "<f4").tobytes())
        return digest.hexdigest()[:16]

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
        from atpatch_onnx.patches.file import save

        save(self, path)

    def to_bytes(self) -> bytes:
        """The bytes of the patch file."""
        from atpatch_onnx.patches.file import to_bytes

        return to_bytes(self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Patch":
        """Read a patch file.

        Raises:
            PatchFileError: The file is missing, damaged, no patch, of another schema, or its content does not match
                its id.
        """
        from atpatch_onnx.patches.file import load

        return load(path)
