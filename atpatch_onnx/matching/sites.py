"""What is known of one attention computation: `AttentionSite`, and `NearMiss` for what was refused, with the reason.

The axis glossary, used by every room:

| name    | meaning                                                             |
|---------|---------------------------------------------------------------------|
| batch   | samples; one sample's result never depends on another               |
| parts   | windows, channels, chunks of a sample that attend on their own      |
| heads   | attention heads of the map; `kv_heads` of them share keys and values |
| queries | rows of the map: the positions that attend                          |
| keys    | columns of the map: the positions that are attended to              |
| depth   | the width of one head's value vector                                |
| column  | one key position: `P[b, :, :, j]`                                   |
"""

import math
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Form(StrEnum):
    """How the graph writes the attention down."""

    SOFTMAX = "softmax"
    """Decomposed: a Softmax whose result is multiplied with the values."""

    ATTENTION = "Attention"
    """The ONNX op `Attention` (opset 23 and later)."""

    FUSED = "com.microsoft"
    """An attention operator of onnxruntime's own domain."""


Dim = int | str | None
"""A static size, a symbolic name, or None where shape inference could not tell."""


@dataclass(frozen=True)
class Quantization:
    """How the whole numbers of a tensor stand for floats, `(number - zero_point) * scale`, one scale for all of it."""

    scale: float
    zero_point: int
    domain: str = ""
    """Of the operators QuantizeLinear and DequantizeLinear that take its type at the model's opset."""

    def dequantized(self, numbers: NDArray[np.generic]) -> NDArray[np.float32]:
        """What the numbers stand for, as DequantizeLinear computes it."""
        return np.asarray((numbers.astype(np.int32) - self.zero_point).astype(np.float32) * np.float32(self.scale))

    def quantized(self, floats: NDArray[np.generic], dtype: np.dtype[Any]) -> NDArray[np.generic]:
        """The nearest numbers of this type, as QuantizeLinear computes them: half to even, the largest beyond them."""
        with np.errstate(over="ignore"):
            numbers = np.rint(floats.astype(np.float32) / np.float32(self.scale)) + np.float32(self.zero_point)
        limits = np.iinfo(dtype)
        return np.asarray(np.clip(numbers, limits.min, limits.max), dtype)


@dataclass(frozen=True)
class Place:
    """A tensor in which the keys, or the values, of a site are per token: where they are read and replaced.

    Entry `(n, k, h, d)` of the keys, of map, token, head and depth, lies at `n` and `k` on the axes that `axes`
    names, and on the others, which have the sizes `sizes`, at the flat index `columns[h, d]`.
    """

    value: str
    """Name of the tensor."""

    axes: tuple[str, ...]
    """What each of its axes is: `n` maps, `k` tokens, `nk` or `kn` both in one, outer ones first, "" features.

    Either may be spread over several axes, as samples and windows are, or rows and columns of an image: outer ones
    first, all maps before or all behind the tokens.
    """

    sizes: tuple[int, ...]
    """Size of each axis of features; 1 for the others."""

    heads: int
    """Heads of keys and values."""

    depth: int
    start: int
    """Flat index of the first feature of the first head."""

    steps: tuple[tuple[int, int], ...]
    """(stride, size) of what heads and then depth are made of; outer ones first."""

    dtype: str = "FLOAT"
    """Element type of the tensor, as ONNX names it: FLOAT, FLOAT16, ..."""

    shape: tuple[Dim, ...] = ()
    """Of the tensor, as far as it can be told."""

    reader: str | None = None
    """First output of the only node that reads the replaced tensor; None: all nodes of the base do."""

    bias: str | None = None
    """Weights `[columns of Q, K and V]` that the operator adds to it by itself, and so our readings do."""

    bias_start: int = 0

    quantization: Quantization | None = None
    """Where the tensor holds whole numbers: it is dequantized to be read and replaced, and quantized again behind."""

    @property
    def features(self) -> int:
        """Features of a token: heads times depth."""
        return self.heads * self.depth

    @property
    def whole(self) -> bool:
        """Whether a token's features are all that the tensor has of it: not where Q, K and V are in one."""
        return math.prod(self.sizes) == self.features

    @property
    def order(self) -> str:
        """What of maps and tokens comes first: `nk` or `kn`."""
        return "".join(dict.fromkeys("".join(self.axes)))

    @property
    def apart(self) -> bool:
        """Whether maps and tokens have one axis each."""
        return sorted(letters for letters in self.axes if letters) == ["k", "n"]

    @property
    def folded(self) -> bool:
        """Whether one axis holds both maps and tokens, so that either has to be counted."""
        return any(len(letters) > 1 for letters in self.axes)

    @property
    def columns(self) -> NDArray[np.int64]:
        """The flat index of each feature, int64 `[heads, depth]`."""
        found = np.array([self.start], np.int64)
        for stride, size in self.steps:
            found = (found[:, None] + stride * np.arange(size)[None]).reshape(-1)
        return found.reshape(self.heads, self.depth)


@dataclass(frozen=True)
class AttentionSite:
    """One attention computation of a graph; the unit that is patched.

    Values are referred to by name: names are unique in a graph, nodes may have none.
    """

    name: str
    """Stable and recognisable, e.g. `vit.layers.3.attention`; else `site_3`."""

    index: int
    """Position among the graph's sites, in the order in which the graph computes their keys."""

    form: Form

    key: Place
    """Where its keys are replaced."""

    value: Place
    """Where its values are replaced."""

    map: str | None
    """Name of the attention map `P` where it meets the values; None in an op that keeps it to itself: a fused one, or a
    product of whole numbers."""

    map_layout: str
    """How the map is laid out, e.g. `nhqk` or `(nh)qk`: see `atpatch_onnx.matching.layout`."""

    output: str
    """Name of `Y = P V`, the result of the site."""

    parts: Dim
    """Maps of one sample: 1, or more where windows, channels or chunks attend on their own; 0 where samples share a
    map, None where it cannot be told. Tokens and flags of a sample are those of all its parts, one after the other."""

    heads: Dim
    queries: Dim
    keys: Dim
    """Tokens whose keys are computed here, of one map: not those in a cache."""

    dtype: str
    """Element type of keys and values, as ONNX names it: FLOAT, FLOAT16, ..."""

    masked: bool
    """Whether a mask, a bias or causality can make weights of the map zero."""

    self_attention: bool | None
    """Whether queries and keys are positions of the same sequence; None where that is not known."""

    token_axis: str
    """The sequence that the keys are positions of; flags are carried between sites of one token axis."""

    samples: tuple[str, int] | None
    """An input of the model with samples, and their axis; None: the model takes one sample at a time."""

    nodes: tuple[str, ...]
    """The nodes from the product of Q and K to the product with V, for people to find the place."""

    @property
    def shows_map(self) -> bool:
        """Whether the graph returns the map, or can be made to; other operators keep theirs to themselves."""
        return self.map is not None or self.form is Form.ATTENTION

    @property
    def columns(self) -> Dim:
        """Tokens of one sample: the keys of all its parts; None where that is not a fixed number."""
        if self.parts == 1:
            return self.keys
        both = isinstance(self.parts, int) and isinstance(self.keys, int)
        return self.parts * self.keys if both and self.parts else None  # type: ignore[operator]

    def to_json(self) -> dict[str, Any]:
        """The site as plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class NearMiss:
    """Something that looked like attention and was refused."""

    nodes: tuple[str, ...]
    reason: str

    attention: bool = False
    """Whether this is attention, in a form that is not supported; else it is e.g. a softmax over classes."""

    def to_json(self) -> dict[str, Any]:
        """The near miss as plain JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class Matches:
    """Everything that matching found out about a graph."""

    sites: tuple[AttentionSite, ...]
    near_misses: tuple[NearMiss, ...]

    def carry_note(self, site: AttentionSite) -> str:
        """Whether flags are carried to and from a site, and if not, what breaks its token axis."""
        if site.parts == 0:
            how = "samples share one map"
        elif site.parts != 1:
            count = "several" if site.parts is None else site.parts
            return f"not carried: {count} parts of a sample, such as windows or channels, attend on their own"
        else:
            how = {
                True: "self-attention",
                False: "its queries are not the positions of its keys",
                None: "whether its queries are the positions of its keys is not known",
            }[site.self_attention]
        others = [other for other in self.sites if other.token_axis == site.token_axis and other.name != site.name]
        if not others:
            return f"not carried: no other site's keys are known to be positions of this sequence ({how})"
        return f"carried among the {len(others) + 1} sites of {site.token_axis} ({how})"

    def to_json(self) -> dict[str, Any]:
        """Both lists as plain JSON types."""
        return {
            "sites": [{**site.to_json(), "carry": self.carry_note(site)} for site in self.sites],
            "near_misses": [miss.to_json() for miss in self.near_misses],
        }
