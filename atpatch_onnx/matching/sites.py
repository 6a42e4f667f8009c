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

from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


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
class AttentionSite:
    """One attention computation of a graph; the unit that is patched.

    Values are referred to by name: names are unique in a graph, nodes may have none.
    """

    name: str
    """Stable and recognisable, e.g. `vit.layers.3.attention`; else `site_3`."""

    index: int
    """Position among the graph's sites, in the graph's node order."""

    form: Form

    map: str | None
    """Name of the attention map `P` where it meets the values; None in a fused op, which keeps it to itself."""

    value: str
    """Name of the values `V` that meet the map."""

    output: str
    """Name of `Y = P V`, the result of the site."""

    map_layout: str
    """How the map is laid out, e.g. `nhqk` or `(nh)qk`: see `atpatch_onnx.matching.layout`."""

    value_layout: str
    output_layout: str

    parts: Dim
    """Maps of one sample: 1, or more where windows, channels or chunks attend on their own; 0 where samples share a
    map, None where it cannot be told. Columns and flags of a sample are those of all its parts, one after the other."""

    heads: Dim
    kv_heads: Dim
    queries: Dim
    keys: Dim
    depth: Dim

    dtype: str
    """Element type of the output, as ONNX names it: FLOAT, FLOAT16, ..."""

    masked: bool
    """Whether a mask, a bias or causality can make weights of the map zero."""

    self_attention: bool
    """Whether queries and keys are positions of the same sequence."""

    token_axis: str
    """The sequence that the keys are positions of; flags are carried between sites of one token axis."""

    nodes: tuple[str, ...]
    """The nodes from the product of Q and K to the product with V, for people to find the place."""

    @property
    def columns(self) -> Dim:
        """Columns of one sample: the keys of all its parts; None where that is not a fixed number."""
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
            how = "self-attention" if site.self_attention else "its queries are not the positions of its keys"
        others = [other for other in self.sites if other.token_axis == site.token_axis and other.name != site.name]
        if not others:
            return f"not carried: no other site's keys are positions of this sequence ({how})"
        return f"carried among the {len(others) + 1} sites of {site.token_axis} ({how})"

    def to_json(self) -> dict[str, Any]:
        """Both lists as plain JSON types."""
        return {
            "sites": [{**site.to_json(), "carry": self.carry_note(site)} for site in self.sites],
            "near_misses": [miss.to_json() for miss in self.near_misses],
        }
